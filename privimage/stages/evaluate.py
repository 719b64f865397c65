"""Measure the synthetic set against the sensitive one and write the report for the data's owner."""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from privimage.config import Config
from privimage.config.effects import settings_of
from privimage.config.seeds import public_seed
from privimage.data.sources import ImageSet, has_test_split, open_sensitive
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.evaluation import fidelity, memorization, report, semantics, utility
from privimage.evaluation.utility import Labelled
from privimage.families import family
from privimage.privacy.accounting import SampledGaussian, best_guess
from privimage.stages.public_set import public_labels, public_semantics
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry import memory
from privimage.telemetry.curves import points
from privimage.telemetry.progress import say

EMBEDDED = 1000  # images of each kind in the t-SNE figure
COMPARED = 2000  # synthetic images in the memorisation check


class Finished:
    """What this evaluation has measured so far, kept in `private/` so that a restart does not measure it
    again.

    Kept results count only for the same images and settings, and while the figures drawn with them are there;
    all ranks see the same ones.
    """

    def __init__(self, path: Path, figures: Path, key: str, world: World):
        self.path, self.world = path, world
        kept = read_json(path) if world.is_main and path.exists() and figures.exists() else {}
        self.results: dict = world.broadcast_object(kept if kept.get("key") == key else {"key": key})

    def get(self, name: str, compute: Callable[[], object]):
        """`compute()`, called on all ranks unless its result is known; the main rank's result counts.

        Raises Stopped.
        """
        if name not in self.results:
            if stop.agreed(self.world):
                raise Stopped("evaluate: finished measures are kept")
            self.results[name] = self.world.broadcast_object(compute())
            if self.world.is_main:
                write_json(self.path, self.results)
        return self.results[name]


def run(config: Config, run: RunDir, world: World) -> dict:
    """Train the classifiers, compare with the sensitive training set, look for copies, draw, report.

    Writes evaluate/report.json, report.html and figures/; features and partial results stay in private/.
    Raises UserError for a damaged synthetic set, or one that does not fit the sensitive set.
    """
    started, settings = time.monotonic(), config.evaluate
    # what may be wrong with the settings is found before the long work
    extractor = fidelity.choose(settings.features, settings.inception_weights, run.private)
    vectors = semantics.load_vectors(settings.word_vectors) if settings.word_vectors else None
    train = open_sensitive(config, "train", world)
    test = open_sensitive(config, "test", world) if has_test_split(config) else None
    n_classes = len(train.classes) if config.data.sensitive.labelled else 1
    after = before = None
    if config.spec.generator != "none":
        run.require("synthesize")
        after = _read(run.release / "synthetic.npz", train, n_classes)
        path = run.stage("synthesize") / "before.npz"
        before = _read(path, train, n_classes, lowest=-1) if settings.before and path.exists() else None
    figures = run.stage("evaluate") / "figures"
    finished = Finished(
        run.private / "evaluate_partial.json", figures, _key(config, train, after, before), world
    )
    if world.is_main:
        figures.mkdir(exist_ok=True)

    source = after or Labelled(train.images, train.labels)
    taught = (
        before if before and before.labels.min() >= 0 else None
    )  # labels of public classes teach nothing about the sensitive ones
    results = _utility(config, source, taught, test, train.classes, n_classes, finished, figures, world)
    results |= _fidelity(config, run, extractor, train, after, before, finished, world)
    results["memorization"] = None
    if after and test:
        results["memorization"] = finished.get(
            "memorization",
            lambda: _memorization(after, train, test, figures, world) if world.is_main else None,
        )
    if world.is_main:
        results |= _facts(config, run, train, test, after, n_classes, figures) | _selection(
            config, run, train, vectors, figures
        )
        seconds = time.monotonic() - started
        results["evaluate"] = {
            "seconds": seconds,
            "peak_memory_bytes": memory.peak(world.device),
            "images_per_second": len(source) / seconds,
        }
        report.write(run, config, results)
        say(f"evaluate: {run.path / 'evaluate' / 'report.html'}")
    world.barrier()
    return {"images": len(source)}


def _read(path: Path, train: ImageSet, n_classes: int, lowest: int = 0) -> Labelled:
    """A synthetic set as uint8 N,C,H,W, its labels from `lowest` to n_classes - 1.

    Raises UserError that names a missing, damaged or misfitting file.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
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


def _key(config: Config, train: ImageSet, *sets: Labelled | None) -> str:
    digest = hashlib.sha256(train.fingerprint.encode())
    for images in sets:
        digest.update(images.images.tobytes() + images.labels.tobytes() if images else b"none")
    digest.update(json.dumps(settings_of(config, ["evaluate"]), sort_keys=True).encode())
    return digest.hexdigest()


def _utility(
    config: Config,
    source: Labelled,
    before: Labelled | None,
    test: ImageSet | None,
    classes: tuple[str, ...],
    n_classes: int,
    finished: Finished,
    figures: Path,
    world: World,
) -> dict:
    """Accuracies of the classifiers trained on `source` and on what the pretrained generator gave, tested on
    real images.
    """
    empty = dict.fromkeys(report.CLASSIFIERS)
    if test is None or n_classes < 2:
        why = (
            "data.sensitive.test_path names no held-out images to test on"
            if test is None
            else "the sensitive set has no classes to tell apart"
        )
        return {"accuracy": empty, "accuracy_before": None, "accuracy_note": f"Not measured: {why}."}
    held_out, seed = Labelled(test.images, test.labels), public_seed(config, "classifiers") % 2**32

    def cnn(training: Labelled, label: str, figures_wanted: bool) -> float:
        network = utility.train_cnn(
            training,
            n_classes,
            epochs=config.evaluate.cnn_epochs,
            batch_size=config.evaluate.cnn_batch_size,
            flip=config.pretrain.flip,
            seed=seed,
            world=world,
            label=label,
        )
        predictions = utility.predict(network, held_out.images, world.device)
        if figures_wanted and world.is_main:
            from privimage.evaluation import figures as draw

            counts = utility.confusion(predictions.labels, held_out.labels, n_classes)
            draw.confusion_matrix(figures / "sensitive-confusion.png", counts, classes)
            own = utility.predict(network, training.images[:EMBEDDED], world.device)
            real = (predictions.features[:EMBEDDED], held_out.labels[:EMBEDDED])
            draw.embedding(
                figures / "sensitive-tsne.png", own.features, training.labels[:EMBEDDED], *real, classes, seed
            )
        return utility.percent(predictions.labels, held_out.labels)

    def score(key: str, training: Labelled, name: str) -> float | None:
        if key == "cnn":
            return cnn(training, f"cnn ({name})", name == "after")
        return (
            utility.SHALLOW[key](training, held_out, seed) if world.is_main else None
        )  # scikit-learn's run on one rank

    def all_of(training: Labelled, name: str) -> dict[str, float | None]:
        scores: dict[str, float | None] = dict(empty)
        for key in config.evaluate.classifiers:
            scores[key] = finished.get(f"{key} ({name})", partial(score, key, training, name))
            if world.is_main:
                say(
                    f"evaluate: {key} trained on {len(training)} images ({name}): {scores[key]:.1f} % of "
                    f"{len(held_out)} real test images"
                )
        return scores

    after = all_of(source, "after")
    earlier = all_of(before, "before") if before else None
    if world.is_main:
        from privimage.evaluation import figures as draw

        known = [
            {key: value for key, value in (scores or {}).items() if value is not None}
            for scores in (after, earlier)
        ]
        draw.accuracies(figures / "sensitive-accuracy.png", known[0], known[1], 100 / n_classes)
    return {
        "accuracy": after,
        "accuracy_before": earlier,
        "accuracy_before_images": len(before) if before else 0,
    }


def _fidelity(
    config: Config,
    run: RunDir,
    extractor: fidelity.Extractor,
    train: ImageSet,
    after: Labelled | None,
    before: Labelled | None,
    finished: Finished,
    world: World,
) -> dict:
    """FID, KID, precision and recall of both synthetic sets against the sensitive training images."""
    if after is None:
        empty = dict.fromkeys(("name", "fid", "kid", "precision", "recall", "samples", "features"))
        return {"fidelity": empty, "fidelity_before": None}
    limit = config.evaluate.fidelity_samples
    reference = np.random.default_rng(public_seed(config, "reference images")).permutation(len(train.images))[
        : config.evaluate.reference_samples or limit
    ]
    cache = run.private / f"features-{train.fingerprint[:16]}-{extractor.identity}-{len(reference)}.npy"

    def measured(images: np.ndarray, label: str) -> dict:
        real = fidelity.cached(
            cache,
            lambda: fidelity.extract(
                extractor, train.images[reference], world, "features of sensitive images"
            ),
            world,
        )
        features = fidelity.extract(extractor, images, world, f"features of synthetic images ({label})")
        return fidelity.described(extractor, features, real) if world.is_main else {}

    found = {
        "fidelity": finished.get("fidelity", lambda: measured(after.images[:limit], "after")),
        "fidelity_before": None,
    }
    if before is not None:
        found["fidelity_before"] = finished.get(
            "fidelity (before)", lambda: measured(before.images[:limit], "before")
        )
    if world.is_main:
        say(
            f"evaluate: {found['fidelity']['name']} {found['fidelity']['distance']:.4g} of "
            f"{found['fidelity']['samples']} images"
        )
    return found


def _memorization(after: Labelled, train: ImageSet, test: ImageSet, figures: Path, world: World) -> dict:
    from privimage.evaluation import figures as draw

    synthetic = after.images[:COMPARED]
    measures, nearest = memorization.check(synthetic, train.images, test.images, world.device)
    draw.nearest_pairs(
        figures / "sensitive-nearest.png", synthetic, train.images[nearest.index], nearest.distance
    )
    return measures


def _facts(
    config: Config,
    run: RunDir,
    train: ImageSet,
    test: ImageSet | None,
    after: Labelled | None,
    n_classes: int,
    figures: Path,
) -> dict:
    """What the report tells beside the measures.

    The promise, the sets, the selection, curves that are not sensitive.
    """
    from privimage.evaluation import figures as draw

    labelled = config.data.sensitive.labelled
    facts: dict = {
        "privacy": _promise(run, after is not None),
        "grid_classes": [],
        "synthetic": None,
        "parameters": None,
    }
    facts["sensitive"] = {"images": len(train.images), "test_images": len(test.images) if test else 0}
    if after:
        facts["grid_classes"] = draw.sample_grid(
            figures / "samples.png", after.images, after.labels, n_classes
        )
        facts["synthetic"] = {
            "images": len(after),
            "resolution": config.data.resolution,
            "channels": config.data.channels,
        }
        facts["synthetic"]["classes"] = list(train.classes) if labelled else []
        facts["parameters"] = family(config).sizes(config, n_classes if labelled else 0)["generator"]
    steps, losses = points(run.tensorboard / "pretrain", "loss")
    if len(steps) > 1:
        draw.loss_curve(figures / "loss.png", steps, losses)
    steps, spent = points(run.tensorboard / config.spec.training, "epsilon")
    if len(steps) > 1 and facts["privacy"]["private"]:
        draw.budget(figures / "budget.png", steps, spent, facts["privacy"]["promised_epsilon"])
    return facts


def _promise(run: RunDir, generated: bool) -> dict:
    if not generated:
        reason = "the classifiers were trained on the sensitive images themselves"
        return {
            "private": False,
            "epsilon": None,
            "delta": None,
            "accountant": None,
            "reason": reason,
            "mechanisms": [],
        }
    said = read_json(run.release / "PRIVACY.json")
    used = [SampledGaussian(m["noise_multiplier"], m["sample_rate"], m["count"]) for m in said["mechanisms"]]
    kept = (
        "private",
        "epsilon",
        "delta",
        "accountant",
        "neighbours",
        "promised_epsilon",
        "reason",
        "mechanisms",
    )
    return {name: said[name] for name in kept if name in said} | (
        {"best_guess": best_guess(used)} if said["private"] else {}
    )


def _selection(
    config: Config, run: RunDir, train: ImageSet, vectors: dict[str, np.ndarray] | None, figures: Path
) -> dict:
    """The selection, and the similarity in meaning of the sensitive set to what was and to what could have
    been chosen.
    """
    nothing = {"sds": None, "sds_all_public": None, "covered": None}
    if config.spec.pretraining == "none":
        return {"selection": None, "semantics": nothing}
    from privimage.evaluation import figures as draw

    public = public_labels(run)
    used, chosen = np.ones(len(public.of_images), bool), None
    if config.spec.pretraining in ("selected", "random"):
        selection, columns = np.load(run.stage("select") / "selection.npz"), public_semantics(config, run)
        counts, assignment = selection["counts"], selection["assignment"]
        rows = list(train.classes) if config.data.sensitive.labelled else ["all images"]
        by_vote = config.spec.pretraining == "selected"
        if by_vote:
            draw.selection(figures / "selection.png", counts, assignment, rows, columns.names, columns.kind)
        used = assignment[columns.of_images] >= 0
        kept = [
            {"name": name, "public": [columns.names[i] for i in np.flatnonzero(assignment == row)]}
            for row, name in enumerate(rows)
        ]
        chosen = {
            "images": int(used.sum()),
            "public_images": len(used),
            "by_vote": by_vote,
            "semantics": columns.kind,
            "kept": kept,
        }
    if vectors is None or not config.data.sensitive.labelled or len(public.names) < 2:
        return {"selection": chosen, "semantics": nothing}
    own = (train.classes, np.bincount(train.labels, minlength=len(train.classes)))
    weights = (
        np.bincount(labels, minlength=len(public.names))
        for labels in (public.of_images[used], public.of_images)
    )
    similar, whole = (semantics.similarity(*own, public.names, weight, vectors) for weight in weights)
    return {"selection": chosen, "semantics": similar | {"sds_all_public": whole["sds"]}}
