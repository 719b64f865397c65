"""The sections `synthesize` and `evaluate` of the settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from privimage.config.section import AUTO, Auto, Section, on


class Synthesize(Section):
    """Sampling of the synthetic set."""

    affects = on("synthesize")

    samples: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO,
        description="images to synthesise",
    )
    labels: Literal["uniform", "noisy"] = Field(
        "uniform",
        description=(
            "uniform: each class gets the same share; noisy: about its share of the sensitive set, by a "
            "noisy count that is charged"
        ),
        json_schema_extra=on("synthesize", planned=True),
    )
    max_rise: float = Field(
        0.005,
        gt=0,
        le=1,
        description="allowed relative rise of the training's noise for the noisy count of labels",
        json_schema_extra=on("synthesize", planned=True),
    )
    sampler: Literal["dpm++", "euler", "heun"] = Field(
        "dpm++", description="diffusion: DPM-Solver++ (2M), Euler (the paper's), or EDM's stochastic Heun"
    )
    sampler_steps: int = Field(18, ge=2, le=1000, description="diffusion: noise levels from 80 to 0.002")
    guidance: float = Field(0.0, ge=0, description="diffusion: classifier-free guidance scale; 0 is off")
    classifier_guidance: Auto[Annotated[float, Field(ge=0)]] = Field(
        AUTO,
        description="diffusion, where `classify.use`: by how much images are led to what the private "
        "classifier takes for their class; 0 is off; auto: 2 where it contradicts most labels of a few "
        "images without guidance, else 0",
    )
    batch_size: int = Field(500, ge=1, description="images per rank that go through the network at once")
    formats: tuple[Literal["parquet", "png", "webdataset", "beton"], ...] = Field(
        (),
        description="of the release, beside synthetic.npz: Parquet for Hugging Face datasets, PNG files in a "
        "folder for each class, WebDataset tars, FFCV's beton",
    )


class Evaluate(Section):
    """Measures of the synthetic set; those that use sensitive data are not covered by the promise."""

    affects = on("evaluate")

    classifiers: tuple[Literal["lr", "mlp", "cnn", "resnet", "wrn", "resnext"], ...] = Field(
        ("lr", "mlp", "cnn"),
        description="trained on synthetic images, tested on real ones; resnet, wrn and resnext are "
        "DPImageBench's, and take hours on a CPU",
    )
    benchmark: Literal["small", "large"] = Field(
        "small", description="sizes and schedule of DPImageBench's networks; large is what it takes for CIFAR"
    )
    benchmark_epochs: int | None = Field(
        None, ge=1, description="epochs of these networks; unset: 50 of the small, 200 of the large ones"
    )
    cnn_epochs: Auto[Annotated[int, Field(ge=1)]] = Field(AUTO, description="epochs of the CNN")
    cnn_batch_size: Auto[Annotated[int, Field(ge=2)]] = Field(AUTO, description="batch size of the CNN")
    ceiling: bool = Field(
        True,
        description="also train them on as many sensitive images, once, to judge the accuracies by",
    )
    before: Auto[bool] = Field(
        AUTO,
        description="also measure the pretrained generator, before private fine-tuning",
        json_schema_extra=on("synthesize", "evaluate"),
    )
    features: Literal["auto", "2048", "768", "stand-in"] = Field(
        AUTO, description="features of FID and KID; auto: what the weights allow"
    )
    inception_weights: Path | None = Field(
        None, description="Inception 2015-12-05 weights in torch-fidelity's format"
    )
    vision_weights: Path | None = Field(
        None,
        description="weights of DINOv2 or of CLIP's image tower (.pth or .safetensors): fidelity in their "
        "features too",
    )
    fidelity_samples: Auto[Annotated[int, Field(ge=10)]] = Field(
        AUTO,
        description="synthetic images that enter FID, KID, precision and recall",
        json_schema_extra=on("synthesize", "evaluate"),
    )
    reference_samples: int | None = Field(
        None,
        ge=10,
        description="sensitive training images to compare with; unset: as many as fidelity_samples",
    )
    word_vectors: Path | None = Field(
        None, description="npz of words and vectors for the semantic distribution similarity"
    )
