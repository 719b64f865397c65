"""The public facts that a recipe is chosen by."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from privimage.config import Config
from privimage.data.glyphs import character_classes
from privimage.errors import UserError
from privimage.families.starter import read
from privimage.privacy.plan import default_delta

# (images, classes) of the training splits that are read by kind: public facts.
KNOWN = {
    "cifar10": (50_000, 10),
    "mnist": (60_000, 10),
    "fashion-mnist": (60_000, 10),
    "celeba": (202_599, 1),
    "digits": (1437, 10),
}
GENERIC = 100  # public classes where the configuration does not show how many there are
# A large GPU over one core of a CPU in private steps (docs/results.md); for jobs that are planned elsewhere.
GPU_OVER_CORE = 200.0


@dataclass(frozen=True)
class Facts:
    """What a recipe is chosen by; all of it is public."""

    count: int  # N
    classes: int  # sensitive classes, 0 if unlabelled
    resolution: int
    channels: int
    public_classes: int
    epsilon: float
    delta: float
    hours: float  # that the run may take
    device: str  # "cpu" or "cuda"
    speed: float = 1.0  # of that device over the one that is measured
    known: bool = False  # whether the query network begins with weights that know all public classes

    @property
    def rows(self) -> int:
        """Sensitive classes, at least 1."""
        return max(self.classes, 1)


def stated_size(config: Config) -> tuple[int | None, int | None]:
    """N and the number of classes, as far as they are stated or the kind of the set is known."""
    sensitive = config.data.sensitive
    known = KNOWN.get(sensitive.kind, (None, None)) if config.privacy.unit == "image" else (None, None)
    return sensitive.count or known[0], sensitive.class_count or known[1]


def public_size(config: Config) -> tuple[int, int]:
    """N and the number of classes (0 if unlabelled), as stated by the configuration.

    Raises UserError if it does not.
    """
    sensitive, (count, classes) = config.data.sensitive, stated_size(config)
    if count is None:
        raise UserError(
            "data.sensitive.count: `plan` does not touch data; give the number of sensitive "
            f"{config.privacy.unit}s"
        )
    if not sensitive.labelled:
        return count, 0
    if classes is None:
        raise UserError(
            "data.sensitive.classes: `plan` does not touch data; give the number of sensitive classes, or "
            "labelled: false"
        )
    return count, classes


def facts_of(config: Config, count: int, classes: int) -> Facts:
    """The facts of a configuration for a set of `count` images of `classes` classes (0 if unlabelled)."""
    device = "cuda" if config.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    speed = 1.0
    # A job that asks for GPUs is chosen for them, wherever its first stage runs.
    gpus = config.slurm.of("finetune").gpus
    if gpus and device == "cpu" and config.runtime.device != "cpu":
        device, speed = "cuda", gpus * GPU_OVER_CORE / torch.get_num_threads()
    names = _public_names(config)
    return Facts(
        count,
        classes,
        config.data.resolution,
        config.data.channels,
        _public_classes(config, names),
        config.privacy.epsilon,
        config.privacy.delta or default_delta(count),
        config.run.hours,
        device,
        speed,
        _known(config, names),
    )


def _public_classes(config: Config, names: Sequence[str] | None) -> int:
    """How many classes images vote for."""
    public = config.data.public
    if config.query.semantics == "clusters":
        return config.query.clusters
    if public.kind in KNOWN:
        return KNOWN[public.kind][1]
    return GENERIC if names is None else max(len(names), 1)


def _known(config: Config, names: Sequence[str] | None) -> bool:
    """Whether `query.start_from` knows each of the public classes by its name. Raises UserError."""
    begun = config.query.start_from
    if begun is None or not names or not config.data.public.labelled:
        return False
    return set(names) <= set(read(begun, "query", "query.start_from").classes)


def _public_names(config: Config) -> Sequence[str] | None:
    """The names of the public classes, from those of folders at most; None where only images would tell."""
    public = config.data.public
    if public.kind == "glyphs":
        return character_classes()
    if public.kind != "folder" or public.path is None:
        return None
    inside = public.path / "train" if (public.path / "train").is_dir() else public.path
    try:
        with os.scandir(inside) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return None  # the checks before a run say what is wrong with it
