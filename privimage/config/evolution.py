"""The section `evolve` of the settings."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from privimage.config.section import Section, on


class Evolve(Section):
    """Private Evolution.

    Sensitive images vote for synthetic ones of a public model or a simulator, which are resampled and varied.
    """

    affects = on("evolve", "synthesize")

    iterations: int = Field(
        10,
        ge=1,
        description="T, noisy histograms of votes",
        json_schema_extra=on("evolve", "synthesize", planned=True),
    )
    api: Literal["diffusion", "glyphs"] = Field(
        "diffusion",
        description="what makes and varies images: a diffusion model that is pretrained, or a renderer of "
        "characters, without pretraining",
        json_schema_extra=on("evolve", "synthesize", "evaluate"),
    )
    population: int = Field(
        200, ge=1, description="synthetic images of each sensitive class that its images vote for"
    )
    threshold: float = Field(
        2.0,
        ge=0,
        description="H, subtracted from noisy counts (down to 0), in standard deviations of their noise",
    )
    features: Literal["query"] | Path = Field(
        "query",
        description="by which images are compared: those of the query network, or of a network in a weights "
        "file: Inception, DINOv2 or CLIP, as for `evaluate`",
        json_schema_extra=on("evolve", place=True),
    )
    lookahead: int = Field(
        0,
        ge=0,
        le=100,
        description="k, variations of a synthetic image whose mean features stand for it when images vote; "
        "0: its own features. Costs no privacy, but k times the work",
        json_schema_extra=on("evolve"),
    )
    first_degree: float = Field(
        2.0,
        gt=0.002,
        lt=80,
        description="noise level sigma of the variations of the first iteration, for pixels in [-1, 1]; of a "
        "simulator for parameters of unit variance",
    )
    last_degree: float = Field(
        0.5,
        gt=0.002,
        lt=80,
        description="the same of the last iteration; those between are a geometric series",
    )
    sampler_steps: int = Field(
        18,
        ge=2,
        le=1000,
        description="noise levels from 80 (variations: from their degree) to 0.002, by Euler",
    )
    guidance: float = Field(
        0.0, ge=0, description="classifier-free guidance scale towards an image's public class; 0 is off"
    )
    batch_size: int = Field(500, ge=1, description="images per rank that go through a network at once")

    @property
    def simulated(self) -> bool:
        """Whether a simulator makes the images, and no model that is pretrained."""
        return self.api != "diffusion"

    @model_validator(mode="after")
    def _degrees_fall(self) -> "Evolve":
        # Coarse variations first, fine ones last (Lin et al. 2024).
        if self.last_degree > self.first_degree:
            raise ValueError(
                f"last_degree {self.last_degree:g} is more than first_degree {self.first_degree:g}; "
                "variations become finer"
            )
        return self
