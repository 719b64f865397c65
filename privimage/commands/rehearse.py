"""`privimage rehearse`: try settings on a part of the public set, which costs no privacy."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.distributed.world import ALONE
from privimage.errors import Stopped, UserError
from privimage.evaluation.report import CLASSIFIERS
from privimage.experiments.execute import execute
from privimage.experiments.gather import Cell, gather
from privimage.experiments.settings import load
from privimage.experiments.table import write
from privimage.recipes.facts import public_size
from privimage.runs import pipeline
from privimage.stages.public_set import public_labels
from privimage.storage.files import write_arrays, write_whole
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

MOST = 200_000  # public images of a rehearsal
PREPARING = "pdp-diffusion"  # a method with a stage `prepare`
HELD_OUT = 0.2  # of the images of a stand-in's classes: for the evaluation


def run(config: Config, tries: Sequence[str], seeds: int) -> int:
    """Run the pipeline with each combination of `tries`, ``section.key=VALUE,VALUE...``, on a stand-in.

    The stand-in is a part of the public set with as many images and classes as the configuration states for
    the sensitive one, which is not opened. Networks begin at nothing, whatever `start_from` says. Everything
    is below RUN-rehearsal, where RUN is `run.dir`; what is finished there is not made again. Prints a table
    and the settings that did best; returns the exit status. Raises UserError.
    """
    count, classes = public_size(config)
    if not classes or not config.data.public.labelled:
        raise UserError("rehearse: accuracies are compared, so both sets need labels")
    axes = dict(_axis(text) for text in tries)
    folder = config.run.dir.with_name(f"{config.run.dir.name}-rehearsal")
    public = RunDir(folder / "public")
    # Prepared also for a method that needs no public images.
    place = config.run.model_copy(update={"dir": public.path})
    pipeline.execute(config.model_copy(update={"run": place, "method": PREPARING}), ["prepare"], ALONE)
    _stand_in(config, public, folder, count, classes)
    write_whole(folder / "base.yaml", _base(config, folder, count, classes).encode())
    file = folder / "rehearsal.yaml"
    write_whole(file, OmegaConf.to_yaml(_experiment(config, folder, axes, seeds)).encode())
    status = execute(file)
    if status != Stopped.status:
        print(write(file))
        _say_best(file)
    return status


def _axis(text: str) -> tuple[str, dict[str, list[str]]]:
    """`section.key=1,2` as the options of an axis; commas within brackets belong to a value."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--try {text}: write section.key=VALUE,VALUE...")
    options = re.split(r",(?![^\[]*\])", values)
    return key, {value: [f"{key}={value}"] for value in options}


def _stand_in(config: Config, public: RunDir, folder: Path, count: int, classes: int) -> None:
    """Write the parts of the prepared public set: a sensitive set, held-out images of it, and the rest."""
    names = ("train", "test", "rest")
    if all((folder / f"{name}.npz").exists() for name in names):
        return
    labels = public_labels(public).of_images
    rng = np.random.default_rng(public_seed(config, "rehearsal"))
    # Classes with the fewest images cannot be divided into a training and a held-out part.
    divisible = np.flatnonzero(np.bincount(labels) >= 10)
    if len(divisible) < classes + 2:
        raise UserError(
            f"data.public: a rehearsal needs {classes + 2} classes of at least 10 images, this set has "
            f"{len(divisible)}: {classes} in the place of the sensitive ones, and others to pretrain on"
        )
    chosen = rng.permutation(divisible)[:classes]
    of_class = [rng.permutation(np.flatnonzero(labels == label)) for label in chosen]
    cuts = [round(HELD_OUT * len(images)) for images in of_class]
    test = np.concatenate([images[:cut] for images, cut in zip(of_class, cuts, strict=True)])
    pool = np.concatenate([images[cut:] for images, cut in zip(of_class, cuts, strict=True)])
    # Where groups are the unit each is as large as a step can see.
    of_group = config.per_unit
    if len(pool) < count * of_group:
        say(f"rehearse: {len(pool)} images stand for {count * of_group}; some are drawn several times")
    train = rng.choice(pool, count * of_group, replace=len(pool) < count * of_group)
    rest = rng.permutation(np.flatnonzero(~np.isin(labels, chosen)))[:MOST]
    # Labels 0, 1, ... in each part, as a set of its own would have them.
    for name, indices in zip(names, (train, test, rest), strict=True):
        images = np.ascontiguousarray(store.read(public.public_store, indices).transpose(0, 2, 3, 1))
        _, own = np.unique(labels[indices], return_inverse=True)
        groups = np.array([f"{name} {number // of_group}" for number in range(len(indices))])
        write_arrays(
            folder / f"{name}.npz", {"images": images, "labels": own.astype(np.int64), "group": groups}
        )


def _base(config: Config, folder: Path, count: int, classes: int) -> str:
    """The configuration with the stand-in for the sensitive set, and a ledger of its own."""
    tree = config.model_dump(mode="json")
    # The columns that are named are those of the original.
    usual = {"image_column": None, "label_column": None}
    tree["data"]["public"] |= {"kind": "npz", "path": str((folder / "rest.npz").absolute()), **usual}
    tree["data"]["sensitive"] |= {
        **usual,
        "kind": "npz",
        "path": str((folder / "train.npz").absolute()),
        "test_path": str((folder / "test.npz").absolute()),
        "group": "group",
        "count": count,
        "classes": classes,
    }
    # A starter of the whole public set has seen the images that stand for the sensitive ones.
    for section in ("query", "pretrain"):
        tree[section]["start_from"] = None
    tree["privacy"] |= {"ledger": str((folder / "ledgers").absolute()), "budget": None}
    return OmegaConf.to_yaml(tree)


def _experiment(config: Config, folder: Path, axes: dict[str, dict[str, list[str]]], seeds: int) -> dict:
    return {
        "title": f"Rehearsal for {config.run.dir}",
        "notes": "A part of the public set stands for the sensitive set, which was not opened: "
        "accuracies that are marked below follow from public images alone.",
        "base": "base.yaml",
        "runs": str(folder / "runs"),
        "axes": axes or {"settings": {"as given": []}},
        "seeds": list(range(seeds)),
        "measures": {
            key.upper(): {"key": f"accuracy.{key}", "best": "highest", "unit": "%"}
            for key in CLASSIFIERS
            if key in config.evaluate.classifiers
        },
    }


def _say_best(file: Path) -> None:
    """Name the combination with the highest accuracy of the last classifier, and how sure that is."""
    gathered = gather(load(file))
    measure = list(gathered.file.experiment.measures)[-1]
    ranked: list[tuple[float, Cell, str]] = []
    for row in gathered.rows:
        cell = row.cells[measure]
        if cell.mean is not None:
            options = (gathered.file.experiment.axes[axis][name] for axis, name in row.choice.items())
            settings = " ".join(itertools.chain.from_iterable(option.settings for option in options))
            ranked.append((cell.mean, cell, settings or "as given"))
    if not ranked:
        return
    mean, cell, best = max(ranked, key=lambda entry: entry[0])
    spread = "" if cell.spread is None else f", standard deviation over seeds {cell.spread:.1f}"
    say(f"rehearse: best by {measure} ({mean:.1f} %{spread}): {best}")
