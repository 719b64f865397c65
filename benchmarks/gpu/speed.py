"""Training of the 1.75M DDPM++ as runs have it: images a second of pretraining, seconds of a private step.

    python benchmarks/gpu/speed.py FOLDER [--device cpu]

In fp32 and bf16: pretraining with batches of 2,048, in bf16 with torch.compile too, and logical private steps
of 16,384 images at K = 1 and 8, with Poisson sample, noise and update, after the pieces of both were fitted
to the memory as in a run. Leaves table.txt, and a trace of pretraining for TensorBoard, in FOLDER. On a CPU
the same in miniature.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from privimage.config import Config, parse
from privimage.data.sensitive import SensitiveSet
from privimage.distributed.world import World
from privimage.families.denoising import DiffusionPrivate, DiffusionPublic
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import GRADIENTS
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD
from privimage.telemetry.profile import Window

# (pretraining batch, logical batch, images of the set, model width, rounds)
WHOLE, MINIATURE = (2048, 16_384, 50_000, 32, 5), (8, 4, 16, 8, 2)
FEW = 32  # images of a step that shows what launching costs


def settings(
    precision: str,
    copies: int,
    batch: int,
    logical: int,
    width: int,
    way: str = "folded",
    compiled: bool = False,
) -> Config:
    """A run as docs/results.md has it for CIFAR-10."""
    return parse(
        {
            "run": {"dir": "none"},
            "data": {"resolution": 32, "public": {"kind": "glyphs"}, "sensitive": {"kind": "cifar10"}},
            "model": {"width": width, "multipliers": [1, 2, 2], "attention": [16]},
            "pretrain": {"batch_size": batch, "learning_rate": 5e-4, "steps": 1, "compile": compiled},
            "finetune": {
                "logical_batch_size": logical,
                "noise_copies": copies,
                "precision": precision,
                "gradients": way,
                "learning_rate": 1e-3,
                "max_grad_norm": 1e-3,
                "steps": 1,
            },
            "runtime": {"precision": precision},
        }
    )


def pretraining(config: Config, world: World) -> Callable[[int], None]:
    """A function that takes one step."""
    training, count = DiffusionPublic(config, 10, world), config.pretrain.batch_size
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=world.device)
    labels = torch.arange(count, device=world.device) % 10
    return lambda step: training.step(images, labels, step)


def private_steps(config: Config, world: World, images: int) -> tuple[Iterator, int]:
    """Private steps on random images, and the size of their physical batches."""
    training, tuned = DiffusionPrivate(config, 10, world, None), config.finetune
    losses, rng = training.losses, np.random.default_rng(0)
    physical = physical_batch_size(tuned, training.module, losses, losses.probe, world.device, 1)
    pixels = rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    plan = DPSGD(
        count=images,
        logical_batch_size=tuned.logical_batch_size,
        steps=1000,
        noise_multiplier=2.0,
        max_grad_norm=1e-3,
        noise_copies=tuned.noise_copies,
    )
    steps = PrivateSteps(
        plan,
        GRADIENTS[tuned.gradients](training.module, filled_to=physical),
        losses,
        training.optimizer,
        SensitiveSet(pixels, np.arange(images) % 10, world.device, "device"),
        world,
        Randomness(insecure_fixed(1), "aes-ctr", b"benchmark"),
        physical=physical,
        charge=lambda name: True,
        state=training.seen,
    )
    return iter(steps), physical


def seconds(step: Callable[[int], object], rounds: int, device: torch.device) -> float:
    """The median of some steps, after one that is not counted."""
    taken = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    given = parser.parse_args()
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    world = World(0, 0, 1, 1, device, cores=torch.get_num_threads())
    batch, logical, images, width, rounds = WHOLE if given.device == "cuda" else MINIATURE
    name = torch.cuda.get_device_name(device) if given.device == "cuda" else "CPU"
    lines = [f"{name}, width {width}, medians of {rounds} steps"]
    given.folder.mkdir(parents=True, exist_ok=True)

    def tell(line: str) -> None:
        # Kept at once: what is cut off leaves what was measured before.
        print(line, flush=True)
        lines.append(line)
        (given.folder / "table.txt").write_text("\n".join(lines) + "\n")

    print(lines[0])
    for precision in ("bf16", "fp32"):
        step = pretraining(settings(precision, 1, batch, logical, width), world)
        taken = seconds(step, rounds, device)
        tell(f"pretrain {precision}: {taken:.4f} s for {batch} images, {batch / taken:,.0f} images/s")
        if precision == "bf16":
            window = Window(given.folder / "profile", (1, 3))
            for number in range(1, 5):
                window.before(number)
                step(number)
                window.after(number)
            window.close()
    for precision in ("bf16", "fp32"):
        for copies in (1, 8):
            config = settings(precision, copies, batch, logical, width)
            made, physical = private_steps(config, world, images)
            taken = seconds(lambda _, made=made: next(made), rounds if copies == 1 else 2, device)
            sizes = f"{logical} images in batches of {physical}"
            tell(f"private {precision} K = {copies}: {taken:.3f} s for {sizes}")
    # A rank of many has few images: it waits for the launch of kernels.
    for way in ("folded", "recorded"):
        few = min(FEW, logical)
        config = settings("bf16", 1, batch, few, width, way)
        made, physical = private_steps(config, world, images)
        taken = seconds(lambda _, made=made: next(made), rounds, device)
        tell(f"private bf16 K = 1, {way}: {taken:.4f} s for {few} images in batches of {physical}")
    # Last, since it may take long: what was measured before is kept.
    step = pretraining(settings("bf16", 1, batch, logical, width, compiled=True), world)
    taken = seconds(step, rounds, device)
    tell(f"pretrain bf16 compiled: {taken:.4f} s, {batch / taken:,.0f} images/s")


if __name__ == "__main__":
    main()
