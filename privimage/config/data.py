"""The sections `run` and `data` of the settings: where a run lives, and its two image sets."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from privimage.config.section import Section, on
from privimage.config.stages import SENSITIVE, STAGES

SensitiveKind = Literal[
    "folder",
    "zip",
    "webdataset",
    "parquet",
    "hdf5",
    "csv",
    "jsonl",
    "npz",
    "beton",
    "cifar10",
    "celeba",
    "mnist",
    "fashion-mnist",
    "digits",
]
Byte = Annotated[int, Field(ge=0, le=255)]
PublicKind = SensitiveKind | Literal["glyphs"]


class RunSection(Section):
    """Where a run lives."""

    affects = on()

    dir: Path = Field(description="the run directory; everything that a run writes is below it")
    hours: float = Field(
        2.0,
        gt=0,
        le=10_000,
        description="hours that the run may take; settings left at auto are chosen by it",
    )
    shared: Path | None = Field(
        None,
        description=(
            "folder where public stages are kept for other runs that need the same; unset: each run does "
            "its own"
        ),
    )


class PublicData(Section):
    """The public set: anyone may see it. Its labels are what the query function learns.

    Without labels, images are grouped into clusters.
    """

    affects = on("prepare", place=True)

    kind: PublicKind = Field(description="how to read it")
    path: Path | None = Field(None, description="file or folder; not needed for embedded sets")
    labelled: bool = Field(
        True,
        description=(
            "whether its labels are used; without them a folder needs no class sub-folders, an npz no labels"
        ),
    )
    skip_bad: bool = Field(
        False, description="leave out images that do not decode, and count them, in place of stopping"
    )
    image_column: str | None = Field(
        None, description="column or array of the images, or of their paths; unset: the usual names"
    )
    label_column: str | None = Field(
        None, description="column or array of the labels; unset: the usual names"
    )
    images_per_class: int = Field(400, ge=1, description="for kind glyphs: images rendered of each character")


class SensitiveData(Section):
    """The set that must stay private."""

    affects = on(*SENSITIVE, place=True)

    kind: SensitiveKind = Field(description="how to read it")
    path: Path | None = Field(
        None, description="training split: file or folder; not needed for embedded sets"
    )
    test_path: Path | None = Field(
        None,
        description="held-out split for evaluation; kinds with an own test split need none",
        json_schema_extra=on("evaluate", place=True),
    )
    labelled: bool = Field(
        True,
        description="whether its labels are used; without them there is one row and one class",
        json_schema_extra=on(*SENSITIVE, "pretrain"),
    )
    image_column: str | None = Field(
        None, description="column or array of the images, or of their paths; unset: the usual names"
    )
    label_column: str | None = Field(
        None, description="column or array of the labels; unset: the usual names"
    )
    group: Annotated[int, Field(ge=1, le=9)] | str | None = Field(
        None,
        description=(
            "what names whom an image belongs to (a person, a patient): a column, an array, or a field of "
            "webdataset's .json; of a folder, zip or tar the level of sub-folders (1 is the first), or a "
            "regular expression on the path; of celeba `identity`"
        ),
    )
    per_group: int = Field(
        4,
        ge=1,
        description="m, images of a group that a private step averages over, drawn anew in each step",
        json_schema_extra=on("finetune", planned=True),
    )
    skip_bad: bool = Field(
        False,
        description=(
            "leave out images that do not decode, and count them for the owner, in place of stopping; N "
            "counts them too"
        ),
    )
    residence: Literal["auto", "device", "host", "disk"] = Field(
        "auto",
        description="where private steps take images from, with equal results; auto: the first with room",
        json_schema_extra=on(),
    )
    count: int | None = Field(
        None,
        ge=1,
        description=(
            "N, the number of training images (of groups where they are the unit), taken as public; `plan` "
            "needs it, the data must agree"
        ),
    )
    classes: Annotated[int, Field(ge=1)] | tuple[str, ...] | None = Field(
        None,
        description=(
            "the number of classes, or a list of their names, taken as public; `plan` and sets that do not "
            "name their classes need it"
        ),
    )

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: int | tuple[str, ...] | None) -> int | tuple[str, ...] | None:
        if isinstance(classes, tuple) and (not classes or len(set(classes)) < len(classes)):
            raise ValueError("a list of names, each once")
        return classes

    @property
    def class_count(self) -> int | None:
        """The stated number of classes."""
        return len(self.classes) if isinstance(self.classes, tuple) else self.classes


class Data(Section):
    """Both image sets, converted to one shape."""

    affects = on(*STAGES)

    resolution: int = Field(
        ge=8, le=256, description="pixels of a side; images are resized to it, after `fit`"
    )
    channels: Literal[1, 3] = Field(3, description="1 grey, 3 RGB")
    fit: Literal["crop", "pad", "squash"] = Field(
        "crop",
        description="images that are not square: a centred square is cut out, bars are added, or squashed",
    )
    background: tuple[Byte, Byte, Byte] = Field(
        (255, 255, 255), description="red, green, blue of 0 to 255: behind transparent pixels, and of bars"
    )
    window: tuple[float, float] | Literal["full"] | None = Field(
        None,
        description=(
            "[low, high], the values of 16-bit and float pixels that become black and white; full: the range "
            "of their type; 8-bit images need none"
        ),
    )
    flip: bool = Field(
        True,
        description="whether a mirror image is of the same class: public training, and the classifiers of an "
        "evaluation, see images mirrored at random, a private classifier sees both as one. Off for "
        "characters, and where left and right tell classes apart",
        json_schema_extra=on(*(stage for stage in STAGES if stage not in ("prepare", "finetune"))),
    )
    public: PublicData
    sensitive: SensitiveData
    store: Literal["auto", "beton", "npy"] = Field(
        "auto",
        description=(
            "format of the prepared public set: beton has JPEGs from 128 pixels a side on; npy needs no FFCV "
            "and is always raw; auto: beton if FFCV is installed"
        ),
        json_schema_extra=on("prepare"),
    )
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = Field(
        "auto",
        description="processes per rank that decode images; 0: the rank itself; auto: one per core",
        json_schema_extra=on(),
    )
    scratch: Path | None = Field(
        None,
        description="folder on each node to copy the prepared set to, as ${oc.env:SLURM_TMPDIR}",
        json_schema_extra=on(),
    )

    @field_validator("window")
    @classmethod
    def _window_is_wide(cls, window: tuple[float, float] | str | None) -> tuple[float, float] | str | None:
        if isinstance(window, tuple) and not -math.inf < window[0] < window[1] < math.inf:
            raise ValueError("the first value must be smaller than the second, both finite")
        return window
