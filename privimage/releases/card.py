"""The data card of a release, README.md: the promise in words, contents, how to load it and how to cite it.

Its YAML header is that of dataset cards on the Hugging Face hub. It is made from the statement, public
settings and the synthetic set alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from privimage.config.methods import METHODS, PAPERS
from privimage.privacy.mechanisms import LabelCounts
from privimage.privacy.statement import statement_for_people
from privimage.releases.formats import FORMATS
from privimage.releases.synthetic import SyntheticSet

PRETRAINING = {
    "selected": "was pretrained on the public images of those classes that a noisy vote of the sensitive "
    "images had chosen",
    "random": "was pretrained on public images of classes drawn by lot",
    "all": "was pretrained on public images",
    "none": "started from random weights",
}
GENERATORS = {
    "diffusion": "A diffusion model",
    "gan": "A GAN",
    "matching": "A generator",
    "evolution": "A diffusion model",
}
SIMULATORS = {
    "glyphs": "A renderer of characters, in place of a model (Lin et al. 2025, arXiv:2502.05505), drew images"
}
TRAINING = {
    "finetune": "then learnt from the sensitive images by DP-SGD: each image's gradient was clipped, and "
    "noise was added to their sum",
    "match": "then learnt from one noisy mean of features of the sensitive images",
    "evolve": "then had its samples voted for by the sensitive images, with noise on the votes",
}
WITHOUT_NOISE = "then learnt from the sensitive images without protection"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class About:
    """What a card says beside the statement and the images."""

    labelled: bool
    has_model: bool
    rows: list[int]  # the classes of the rows of samples.png; none where it has none
    formats: tuple[str, ...]
    simulator: str | None = None  # what made the images, in place of a model
    drawn_later: int | None = None  # the seed, for images drawn from a released model afterwards


def card(synthetic: SyntheticSet, said: dict[str, Any], about: About) -> str:
    """README.md of a folder that holds `synthetic` under the statement `said` (PRIVACY.json)."""
    method = METHODS[said["method"]]
    training = TRAINING[method.training] if method.private else WITHOUT_NOISE
    first = f"{GENERATORS[method.generator]} {PRETRAINING[method.pretraining]}"
    if about.simulator:
        first = SIMULATORS[about.simulator]
    return page(
        "card.md.j2",
        _header(synthetic, about),
        # One level down: the card has a heading of its own.
        statement=re.sub("^# ", "## ", statement_for_people(said), flags=re.MULTILINE).strip(),
        said=said,
        synthetic=synthetic,
        about=about,
        classes=[_plain(name) for name in synthetic.classes],
        made=f"{first}, {training}.",
        # What is drawn later has its labels in turn.
        counted=about.drawn_later is None and any(m["name"] == LabelCounts.name for m in said["mechanisms"]),
        paper=PAPERS.get(said["method"]),
        formats=[FORMATS[name] for name in FORMATS if name in about.formats],
    )


def page(template: str, header: dict[str, Any], **values: Any) -> str:
    """A page of Markdown from a template of this folder, which gets `header` as YAML, and `values`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    dumped = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return environment.get_template(template).render(header=dumped, **values)


def _header(synthetic: SyntheticSet, about: About) -> dict[str, Any]:
    labelled, count = about.labelled, len(synthetic)
    header: dict[str, Any] = {
        "pretty_name": "Synthetic images under differential privacy",
        "task_categories": ["image-classification" if labelled else "unconditional-image-generation"],
        "size_categories": [next((name for limit, name in SIZES if count < limit), "n>1M")],
        "tags": ["synthetic", "differential-privacy"],
    }
    # The hub and `datasets` read one format; synthetic.npz is none of theirs.
    readable = [FORMATS[name].data_files for name in FORMATS if name in about.formats]
    if files := next((pattern for pattern in readable if pattern), None):
        header["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    return header


def _plain(name: str) -> str:
    """The name of a class as text in Markdown, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(name.split()))


def card_of_starter(query: dict[str, Any], diffusion: dict[str, Any], folder: str) -> str:
    """README.md of the starter `folder`, from what its two files state."""
    header = {
        "license": query["licence"],
        "library_name": "privimage",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "differential-privacy"],
    }
    return page(
        "starter.md.j2",
        header,
        query=query | {"file": "`query.safetensors`"},
        diffusion=diffusion | {"file": "`diffusion.safetensors`"},
        shape=query["architecture"],
        folder=f"starter/{folder}",
    )
