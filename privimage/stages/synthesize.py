"""Sample the synthetic set, and put the release together, as the last output of a run."""

import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from privimage import __version__
from privimage.config import Config
from privimage.data.sensitive import ImageDraws
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.families import family, restored, sampled
from privimage.models.label_features import LabelClassifier
from privimage.privacy import keys
from privimage.privacy.account import open_account
from privimage.privacy.records import key_path
from privimage.privacy.statement import statement
from privimage.releases.assemble import assemble, whole
from privimage.releases.synthetic import SyntheticSet
from privimage.stages.classifier import Trained, trained_classifier
from privimage.stages.guidance import with_guidance
from privimage.stages.label_counts import label_counts, labels_by, labels_in_turn
from privimage.stages.noisy_statistic import Sensitive
from privimage.storage.files import write_array, write_arrays
from privimage.storage.rundir import RunDir
from privimage.telemetry.curves import Curves
from privimage.telemetry.progress import Progress


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Draw `synthesize.samples` images from what the method made of the sensitive set and write release/.

    The images are the same whatever the number of ranks: each has its own random numbers, and goes through
    the network in a block that does not depend on the ranks. Labels are asked for in turn, or by a noisy
    count: the frequencies of the sensitive labels are private. Where there is a private classifier, an image
    gets the label that this sees in it.
    """
    settings = config.synthesize
    run_dir.require(config.spec.training)
    weights = checkpoint.load(run_dir.stage(config.spec.training) / "weights.pt", world)
    assert weights is not None  # the stage is finished
    trained = trained_classifier(config, run_dir, world) if "classify" in config.stages else None
    # The statement comes first: what cannot be released is not sampled.
    asked, said = _stated(config, run_dir, world, weights, trained)
    if trained is not None:
        # Part of the released model: what is drawn from it later is led and labelled by it too.
        weights["classifier"] = trained.state
        config = with_guidance(config, run_dir, world, weights)
    generator, classifier = restored(config, weights, world.device)
    _sample_blocks(config, run_dir, world, generator, weights["n_classes"], asked, "after")
    if (pretrained := _pretrained(config, run_dir, world)) is not None:
        _sample_before(config, run_dir, world, pretrained)
    world.barrier()
    labels, changed = asked, {}
    if classifier is not None:
        labels = _relabelled(config, run_dir, world, classifier, len(asked))
        changed = {"relabelled": float((labels != asked).mean())}
    if said is not None:
        _release(config, run_dir, weights, labels, said)
    # Writing a large release takes longer than ranks wait for each other in a collective operation.
    world.barrier()
    return {"images": settings.samples} | changed


def _stated(
    config: Config, run_dir: RunDir, world: World, weights: dict, trained: Trained | None
) -> tuple[np.ndarray, dict | None]:
    """The labels that the generator is asked for, int64 (samples,), and on the main rank what PRIVACY.json
    will say.

    Raises UserError if the ledger does not hold what made the weights and the labels.
    """
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    account = open_account(config, run_dir, sensitive, world)
    charges, samples = dict(weights["charges"]), config.synthesize.samples
    labels = labels_in_turn(samples, weights["n_classes"])
    if config.synthesize.labels == "noisy":
        drawn = label_counts(config, run_dir, world, Sensitive(sensitive, account, weights["n_classes"]))
        labels, charges["synthesize"] = labels_by(drawn.values, samples), [drawn.charge]
    if trained is not None:
        charges["classify"] = [trained.charge]
    if not world.is_main:
        return labels, None
    versions = {"privimage": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return labels, statement(config, account, charges, weights["steps"], versions)


def _pretrained(config: Config, run_dir: RunDir, world: World) -> dict | None:
    """The weights before private fine-tuning, if there are any and they are evaluated."""
    if not config.evaluate.before or config.spec.pretraining == "none" or not family(config).releases_model:
        return None
    return checkpoint.load(run_dir.stage("pretrain") / "weights.pt", world)


def _sample_before(config: Config, run_dir: RunDir, world: World, pretrained: dict) -> None:
    """Write synthesize/before.npz, images from the pretrained generator.

    Their labels are -1 where it knows public classes only.
    """
    # No more than fidelity is measured on.
    count, n_classes = (
        min(config.synthesize.samples, config.evaluate.fidelity_samples),
        pretrained["n_classes"],
    )
    labels = labels_in_turn(count, n_classes)
    generator, _ = restored(config, pretrained, world.device)
    _sample_blocks(config, run_dir, world, generator, n_classes, labels, "before")
    world.barrier()
    if world.is_main:
        images = _gathered(config, run_dir, count, "before")
        labels = np.full(count, -1) if config.spec.pretraining == "all" else labels
        write_arrays(run_dir.stage("synthesize") / "before.npz", {"images": images, "labels": labels})


def _sample_blocks(
    config: Config,
    run_dir: RunDir,
    world: World,
    generator: nn.Module,
    n_classes: int,
    labels: np.ndarray,
    name: str,
) -> None:
    """Sample this rank's blocks of images of `labels` (N,); blocks that are there already are kept."""
    settings, count = config.synthesize, len(labels)
    _block(run_dir, name, 0).parent.mkdir(exist_ok=True)
    draws, blocks = ImageDraws(world.device), range(0, count, settings.batch_size)
    curves = Curves(run_dir.tensorboard, f"synthesize-{name}", 0, world.is_main)
    with Progress(f"synthesize ({name})", len(blocks), shown=world.is_main) as bar:
        # The ranks take blocks in turn. A block is a file, so that a stopped run goes on with the next one.
        for number, start in enumerate(blocks):
            bar.advance()
            path = _block(run_dir, name, start)
            if number % world.size != world.rank or path.exists():
                continue
            indices = torch.arange(start, min(start + settings.batch_size, count), device=world.device)
            of_block = torch.from_numpy(labels[start : start + len(indices)]).to(world.device)
            images = sampled(config, generator, of_block if n_classes else None, indices, draws)
            write_array(path, images)
            if start == 0:
                curves.images(0, "samples", torch.from_numpy(images[:100]).permute(0, 3, 1, 2))
            if stop.requested:
                break
    curves.close()
    if stop.agreed(world):
        raise Stopped("synthesize: finished blocks are kept")


def _relabelled(
    config: Config, run_dir: RunDir, world: World, classifier: LabelClassifier, count: int
) -> np.ndarray:
    """What the private classifier says of the sampled images, int64 (count,); the ranks share the work."""
    size = config.synthesize.batch_size
    found = torch.zeros(count, dtype=torch.int64, device=world.device)
    for number, start in enumerate(range(0, count, size)):
        if number % world.size == world.rank:
            images = np.load(_block(run_dir, "after", start))
            of_block = classifier.labels(images)
            found[start : start + len(of_block)] = torch.from_numpy(of_block).to(world.device)
    return world.all_reduce_(found).cpu().numpy()


def _block(run_dir: RunDir, name: str, start: int) -> Path:
    """The file of the images from number `start` on."""
    return run_dir.stage("synthesize") / f"blocks-{name}" / f"{start:09d}.npy"


def _gathered(config: Config, run_dir: RunDir, count: int, name: str) -> np.ndarray:
    starts = range(0, count, config.synthesize.batch_size)
    return np.concatenate([np.load(_block(run_dir, name, start)) for start in starts])


def _release(config: Config, run_dir: RunDir, weights: dict, labels: np.ndarray, said: dict) -> None:
    """Put release/ together, whole or not at all, and destroy the key: nobody can subtract the noise."""
    # Blocks of all ranks, from the disk that they share.
    images = _gathered(config, run_dir, len(labels), "after")
    by_classifier = "classifier" in weights
    synthetic = SyntheticSet(images, labels, tuple(weights["classes"]), by_classifier)
    with whole(run_dir.release) as aside:
        assemble(aside, config, synthetic, said, labelled=weights["n_classes"] > 0, weights=weights)
    # The release is written; nothing has to be repeated any more.
    keys.destroy(key_path(run_dir))
    for name in ("after", "before"):
        shutil.rmtree(run_dir.stage("synthesize") / f"blocks-{name}", ignore_errors=True)
