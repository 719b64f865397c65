"""Measure the synthetic set against the sensitive one and write the report for the data's owner."""

import hashlib
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from privimage.config import Config
from privimage.config.effects import settings_of
from privimage.data.private_store import ImageSet
from privimage.data.sources import has_test_split, open_sensitive
from privimage.distributed import told
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.evaluation import extractor, report, semantics
from privimage.evaluation.utility import Labelled
from privimage.stages.measures import MEASURES, Finished, Subject
from privimage.storage.rundir import RunDir
from privimage.telemetry import compute, memory
from privimage.telemetry.progress import say


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Take all measures, and write the report.

    Writes evaluate/report.json, report.html and figures/; features and partial results stay in private/.
    Raises UserError for a damaged synthetic set, or one that does not fit the sensitive set.
    """
    started, used = time.monotonic(), compute.cpu_seconds()
    # Every measure sees the same sets; finished ones are read back after a restart.
    subject = _subject(config, run_dir, world)
    results: dict[str, Any] = {}
    for measure in MEASURES:
        results |= measure.results(subject)

    images = len(subject.after or subject.train.images)
    if world.is_main:
        seconds = time.monotonic() - started
        results["evaluate"] = {
            "seconds": seconds,
            "cpu_seconds": compute.cpu_seconds() - used,
            "gpu_seconds": compute.gpu_seconds(seconds, world.device, world.size),
            "peak_memory_bytes": memory.peak(world.device),
            "images_per_second": images / seconds,
        }
        report.write(run_dir, config, results)
        say(f"evaluate: {run_dir.path / 'evaluate' / 'report.html'}")
    world.barrier()
    return {"images": images}


def _subject(config: Config, run_dir: RunDir, world: World) -> Subject:
    """Open all that is measured. A mistake in the settings is found here, before the long work."""
    settings = config.evaluate
    network = extractor.choose(settings.features, settings.inception_weights, run_dir.private)
    vision = extractor.vision(settings.vision_weights)
    vectors = semantics.load_vectors(settings.word_vectors) if settings.word_vectors else None
    # Read on all ranks, which compare their copies.
    train = open_sensitive(config, "train", world, run_dir.sensitive)
    test = open_sensitive(config, "test", world, run_dir.sensitive) if has_test_split(config) else None
    n_classes = len(train.classes) if config.data.sensitive.labelled else 1

    after = before = None
    if config.spec.generator != "none":
        run_dir.require("synthesize")
        after = _read(run_dir.release / "synthetic.npz", train, n_classes, world)
        path = run_dir.stage("synthesize") / "before.npz"
        before = None
        if settings.before and told.exists(path, world):
            before = _read(path, train, n_classes, world, lowest=-1)

    figures = run_dir.stage("evaluate") / "figures"
    partial = run_dir.private / "evaluate_partial.json"
    finished = Finished(partial, figures, _key(config, train, after, before), world)
    real = _real(config, train, test, len(after or ()))
    ceiling = Finished(run_dir.private / "ceiling.json", run_dir.private, real, world)
    if world.is_main:
        figures.mkdir(exist_ok=True)
    sets = (train, test, after, before)
    return Subject(
        config, run_dir, world, *sets, n_classes, network, vision, vectors, figures, finished, ceiling
    )


def _read(path: Path, train: ImageSet, n_classes: int, world: World, lowest: int = 0) -> Labelled:
    """A synthetic set as uint8 N,C,H,W, its labels from `lowest` to n_classes - 1.

    Raises UserError that names a missing, damaged or misfitting file.
    """
    try:
        data = told.arrays(path, world)
        images, labels = data["images"], data["labels"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `privimage synthesize` first") from None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged, or not a set of images and labels") from None
    shape = (*train.images.shape[2:], train.images.shape[1])
    if images.dtype != np.uint8 or images.shape[1:] != shape or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: expected uint8 images of {shape} with one label each, got {images.dtype} "
            f"{images.shape} and labels {labels.shape}"
        )
    if not len(images) or labels.min() < lowest or labels.max() >= n_classes:
        raise UserError(f"{path}: expected images with labels from {lowest} to {n_classes - 1}")
    return Labelled(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64))


def _real(config: Config, train: ImageSet, test: ImageSet | None, count: int) -> str:
    """What the accuracy of classifiers that are trained on `count` sensitive images depends on."""
    digest = hashlib.sha256(train.content + (test.content if test else b""))
    settings = config.evaluate
    chosen: list[Any] = [count, settings.cnn_epochs, settings.cnn_batch_size, config.data.flip]
    chosen += [config.runtime.seed, settings.benchmark, settings.benchmark_epochs]
    digest.update(json.dumps(chosen).encode())
    return digest.hexdigest()


def _key(config: Config, train: ImageSet, *sets: Labelled | None) -> str:
    # Cached measures hold for these images and settings only.
    digest = hashlib.sha256(train.fingerprint.encode())
    for images in sets:
        digest.update(images.images.tobytes() + images.labels.tobytes() if images else b"none")
    digest.update(json.dumps(settings_of(config, ["evaluate"]), sort_keys=True).encode())
    return digest.hexdigest()
