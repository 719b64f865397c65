"""Batches and learning rates of pretraining at equal CPU time, on a public set.

    python benchmarks/pretraining.py [CONFIG] [section.key=value ...] [--seconds 60]

The public set of CONFIG (default: configs/cifar10-cpu.yaml) is prepared once and all of it is trained on, but
for `HELD_OUT` images. Each row is a network of CONFIG from scratch: after a quarter, a half and all of
`--seconds` of CPU time, the loss of its averaged weights on the held-out images, whose noise and noise levels
are the same for all rows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config, load
from privimage.data import store
from privimage.distributed.precision import resolved
from privimage.distributed.world import ALONE
from privimage.families import pretrained_family
from privimage.models import edm
from privimage.runs import pipeline
from privimage.stages.public_set import public_labels, public_stream
from privimage.storage.rundir import RunDir

TRIED = ((64, 2e-3), (64, 8e-3), (32, 2e-3), (32, 5e-3), (32, 8e-3), (16, 4e-3))  # batch, learning rate
HELD_OUT = 1000


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/cifar10-cpu.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(
        "| batch | rate | images/s | a quarter | a half | all of the time |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        # All of the public set with its own labels, as for a starter.
        fixed = ["method=pdp-diffusion", f"run.dir={folder}/run", "runtime.precision=auto"]
        config = load(args.config, [*args.overrides, *fixed])
        assert pipeline.run(config, ["prepare"]) == 0
        for batch, rate in TRIED:
            words = [f"pretrain.batch_size={batch}", f"pretrain.learning_rate={rate}"]
            row(resolved(load(args.config, [*args.overrides, *fixed, *words]), ALONE), folder, args.seconds)


def row(config: Config, folder: str, seconds: float) -> None:
    """Train one network, and print its losses."""
    run, world = RunDir(Path(folder) / "run"), ALONE
    public = public_labels(run)
    order = np.random.default_rng(0).permutation(len(public.of_images))
    held, seen = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    classes, settings = len(public.names), config.pretrain
    kind = pretrained_family(config)
    training = kind.public_training(config, classes, world)
    labels = public.of_images[seen]
    stream = public_stream(config, run, world, seen, labels, settings.batch_size, "pretraining stream")
    images = torch.from_numpy(store.read(run.public_store, held))
    of_held, losses, spent, step = torch.from_numpy(public.of_images[held]), [], 0.0, 0
    for batch in stream.batches(0):
        start = time.process_time()
        training.step(*batch, step)
        spent, step = spent + time.process_time() - start, step + 1
        if spent > seconds * (0.25, 0.5, 1)[len(losses)]:
            network = kind.restored(config, training.weights() | {"n_classes": classes})
            losses.append(f"{held_out_loss(network, images, of_held):.4f}")
            if len(losses) == 3:
                break
    speed = f"{step * settings.batch_size / spent:.0f}"
    print(
        "|",
        " | ".join([str(settings.batch_size), f"{settings.learning_rate:g}", speed, *losses]),
        "|",
        flush=True,
    )


@torch.no_grad()
def held_out_loss(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The mean EDM loss of images uint8 (n, C, H, W), with fixed noise."""
    random = torch.Generator().manual_seed(0)
    sigma = edm.draw_sigma(torch.randn(len(images), generator=random))
    unit = edm.to_unit(images)
    noise = torch.randn(unit.shape, generator=random)
    parts = zip(*(part.split(250) for part in (unit, labels, sigma, noise)), strict=True)
    return float(torch.cat([edm.loss(network, *part) for part in parts]).mean())


if __name__ == "__main__":
    main()
