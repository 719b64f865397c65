"""`privimage init`: a complete configuration for a set of one's own, with a reason on every line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from privimage.commands.advised import CHARACTERS, advised
from privimage.config import Config, parse
from privimage.config.stages import STAGES
from privimage.data.folder import KINDS
from privimage.data.groups import units
from privimage.data.sources import sensitive_source
from privimage.distributed.precision import cpu_multiplies_in_bf16
from privimage.distributed.world import alone
from privimage.errors import UserError
from privimage.privacy.plan import default_delta
from privimage.recipes.choice import Choices, applied
from privimage.recipes.settle import chosen
from privimage.recipes.usefulness import busy, too_little_pretraining

SUFFIXES = KINDS | {".npy": "beton"}  # a store without FFCV
EMBEDDED = ("digits", "glyphs")
RESOLUTIONS = (8, 16, 28, 32, 64)


@dataclass(frozen=True)
class Wanted:
    """What the user asks for and states; None: to be looked up or chosen."""

    sensitive: str  # a path, or the name of an embedded set
    public: str | None = None
    test: Path | None = None
    hours: float = 2.0
    epsilon: float = 10.0
    delta: float | None = None
    group: str | None = None  # of `data.sensitive.group`; the promise is then for groups
    count: int | None = None  # of images, or of groups
    classes: str | None = None  # their number, or their names with commas between them
    resolution: int | None = None
    channels: int | None = None
    method: str = "privimage+d"
    run: Path = Path("runs/mine")


def write(wanted: Wanted) -> None:
    """Print the configuration to standard output, and to standard error what of the set becomes public and
    whether the time is too short.

    Raises UserError for a set that cannot be opened, and where no public set suits.
    """
    config, device = _settings(wanted), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sensitive = config.data.sensitive
    assert sensitive.count is not None
    classes = (sensitive.class_count or 2) if sensitive.labelled else 0
    config = advised(config, sensitive.count, classes)
    choices = chosen(config, sensitive.count, classes, alone(device))
    sys.stdout.write(rendered(config, choices, device))
    whole = applied(config, choices)
    for warning in [*busy(whole, device.type), *too_little_pretraining(whole)]:
        print(f"warning: {warning}", file=sys.stderr)


def kind_of(path: str) -> tuple[str, str | None]:
    """The kind of a set by the ending of its name or by what is in the folder, and its path."""
    if path in EMBEDDED:
        return path, None
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder")
    if place.is_dir():
        ends = {entry.suffix for entry in place.iterdir() if entry.is_file()}
        inside = {".parquet": "parquet", ".tar": "webdataset"}
        return next((kind for suffix, kind in inside.items() if suffix in ends), "folder"), path
    if place.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{path}: not a folder, and its ending is none of {known}")
    return SUFFIXES[place.suffix], path


def _settings(wanted: Wanted) -> Config:
    """The sections that say what is asked for; everything else is `auto`."""
    kind, path = kind_of(wanted.sensitive)
    stated: dict[str, Any] = {"kind": kind, "path": path, "count": wanted.count, "classes": _classes(wanted)}
    stated["test_path"] = str(wanted.test) if wanted.test else None
    if wanted.group is not None:
        stated["group"] = int(wanted.group) if wanted.group.isdecimal() else wanted.group
    precision = "auto" if torch.cuda.is_available() or not cpu_multiplies_in_bf16() else "bf16"
    tree: dict[str, Any] = {
        "method": wanted.method,
        "run": {"dir": str(wanted.run), "hours": wanted.hours},
        "data": {
            "resolution": wanted.resolution or 32,
            "channels": wanted.channels or 3,
            "sensitive": stated,
            "public": {"kind": "glyphs"},
        },
        "privacy": {
            "epsilon": wanted.epsilon,
            "delta": wanted.delta,
            "unit": "image" if wanted.group is None else "group",
        },
        "finetune": {"precision": precision},
        "runtime": {"precision": precision},
        # A short run has hardly enough time for the classifiers that learn from synthetic images.
        "evaluate": {"ceiling": wanted.hours >= 2},
    }
    if None in (wanted.count, wanted.classes, wanted.resolution, wanted.channels):
        _look(tree, wanted)
    data = tree["data"]
    data["public"] = _public(wanted, data["resolution"], data["channels"])
    tree["privacy"]["delta"] = wanted.delta or float(f"{default_delta(stated['count']):.1g}")
    if kind in CHARACTERS or data["public"]["kind"] in CHARACTERS:
        data["flip"] = False
    return parse(tree, "init")


def _classes(wanted: Wanted) -> int | list[str] | None:
    if wanted.classes is None:
        return None
    return int(wanted.classes) if wanted.classes.isdecimal() else wanted.classes.split(",")


def _look(tree: dict[str, Any], wanted: Wanted) -> None:
    """Fill in what was not stated, from the sensitive set, and say that it becomes public."""
    stated = tree["data"]["sensitive"]
    source = sensitive_source(parse(tree, "init"), "train")
    # How many images a group has stays private.
    stated["count"] = count = units(source)
    found = [f"{count:,} {'images' if wanted.group is None else 'groups'}"]
    if wanted.classes is None:
        stated["classes"] = len(source.classes)
        names = ", ".join(source.classes[:5]) + (", ..." if len(source.classes) > 5 else "")
        found.append(f"{len(source.classes)} classes ({names})")
    if None in (wanted.resolution, wanted.channels):
        side, channels = _shape(source.opener(source.items[0]))
        tree["data"]["resolution"] = wanted.resolution or _resolution(side)
        tree["data"]["channels"] = wanted.channels or channels
        colours = "grey" if channels == 1 else "in colours"
        found.append(f"the first one {side} pixels wide or high, {colours}")
    print(
        f"init: looked at {wanted.sensitive}: {'; '.join(found)}. The configuration states this, so it "
        "becomes public; --count, --classes, --resolution and --channels together state something else, and "
        "nothing is looked at",
        file=sys.stderr,
    )


def _shape(image: Any) -> tuple[int, int]:
    """Shorter side and channels, 1 or 3, of an image as its reader opens it."""
    if hasattr(image, "mode"):
        return min(image.size), 1 if image.mode in ("1", "L", "LA", "I;16", "I", "F") else 3
    shape = image.values.shape
    return min(shape[:2]), 3 if len(shape) == 3 and shape[2] >= 3 else 1


def _resolution(side: int) -> int:
    """The largest usual one that the images have; above 32 a CPU takes days."""
    most = 64 if torch.cuda.is_available() else 32
    return max((one for one in RESOLUTIONS if one <= min(side, most)), default=RESOLUTIONS[0])


def _public(wanted: Wanted, resolution: int, channels: int) -> dict[str, Any]:
    if wanted.public is not None:
        kind, path = kind_of(wanted.public)
        labelled = kind != "folder" or any(entry.is_dir() for entry in Path(wanted.public).iterdir())
        return {"kind": kind, "path": path, "labelled": labelled}
    if channels == 1 and resolution <= 32:
        return {"kind": "glyphs"}
    raise UserError(
        f"--public: {'colour' if channels == 3 else 'large'} images need a public set that resembles them, a "
        "folder with a sub-folder for each class (ImageNet, say); the embedded characters suit small grey "
        "images only"
    )


WHY = {
    "method": "`privimage methods` lists the others",
    "run.dir": "everything that the run writes",
    "run.hours": "what all else was chosen to fit into",
    "data.resolution": "images are cropped and resized to it",
    "data.channels": "1 grey, 3 colour",
    "data.flip": "whether a mirror image is of the same class; not of characters, nor of left hands",
    "data.public.kind": "how to read it",
    "data.public.path": "anyone may see these images",
    "data.public.labelled": "without class folders images are grouped into clusters",
    "data.sensitive.kind": "how to read it",
    "data.sensitive.path": "the images that stay private",
    "data.sensitive.test_path": "held-out images to measure accuracy on; not covered by the promise",
    "data.sensitive.group": "whom an image belongs to",
    "data.sensitive.per_group": "images of a group that a private step looks at",
    "data.sensitive.count": "N, public from now on",
    "data.sensitive.classes": "public from now on",
    "privacy.unit": "neighbouring sets differ by all images of a group",
    "privacy.epsilon": "of the whole run, query and training together",
    "privacy.delta": "below 1 / N",
    "query.start_from": "weights from public images, which come with PrivImage",
    "query.semantics": "no labels to choose by",
    "pretrain.start_from": "weights from public images, which come with PrivImage",
    "warm.starts": "classes and coarse shapes from a few noisy numbers, before the private steps",
    "classify.use": "a private classifier labels the synthetic images",
    "finetune.precision": "auto: bf16 on GPUs; bf16 on CPUs that multiply in it",
    "evaluate.ceiling": "whether classifiers learn from as many real images too, to compare with; takes time",
    "runtime.precision": "auto: bf16 on GPUs; bf16 on CPUs that multiply in it",
}


def rendered(config: Config, choices: Choices, device: torch.device) -> str:
    """The YAML text: what was asked for and what was chosen, a reason beside each line."""
    lines = {key: (value, WHY[key]) for key, value in _given(config).items()}
    lines |= {key: (choice.value, choice.why) for key, choice in choices.items()}
    text = [_head(config, device)]
    section = ""
    for key, (value, why) in sorted(lines.items(), key=lambda one: _place(one[0])):
        parts = key.split(".")
        if parts[0] in STAGES and parts[0] not in config.stages:
            continue
        for depth in range(1, len(parts)):
            head = ".".join(parts[:depth])
            if not f"{section}.".startswith(f"{head}."):
                text.append(f"{'  ' * (depth - 1)}{parts[depth - 1]}:")
        section = ".".join(parts[:-1])
        line = f"{'  ' * (len(parts) - 1)}{parts[-1]}: {_scalar(value)}"
        text.append(f"{line:<44} # {why}")
    return "\n".join(text) + "\n"


def _given(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    found = {}
    for key in WHY:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        found[key] = value
    of_groups = config.privacy.unit == "group"
    hidden = {
        "data.sensitive.per_group": of_groups,
        "privacy.unit": of_groups,
        "warm.starts": bool(config.warm.starts),
        "classify.use": config.classify.use,
        "query.semantics": not config.data.public.labelled,
    }
    hidden["data.public.labelled"] = not config.data.public.labelled
    return {key: value for key, value in found.items() if value is not None and hidden.get(key, True)}


def _place(key: str) -> tuple[int, ...]:
    """Sections in the order of the settings; the lines of one stay in the order in which they were given."""
    order = list(Config.model_fields)
    first, *rest = key.split(".")
    nested = ("resolution", "channels", "flip", "public", "sensitive")
    return order.index(first), nested.index(rest[0]) if rest and rest[0] in nested else 0


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _head(config: Config, device: torch.device) -> str:
    cores = f"{torch.get_num_threads()} CPU cores"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    return (
        f"# Written by `privimage init` for {machine} and {config.run.hours:g} hours.\n"
        "# `privimage plan` shows what it promises and costs, `privimage run` does it."
    )
