"""How many images a private step should take through the network at once on a CPU.

    python benchmarks/physical_batches.py CONFIG [section.key=value ...] [--sizes 16 32 64 128] [--rounds 5]

CPU time per image of gradients, clipping and sum of one physical batch, for the network, copies and precision
of CONFIG, one thread; medians of interleaved rounds. Beside them what `finetune.physical_batch_size: auto`
takes for a large logical batch. No data is read.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from privimage.config import load
from privimage.distributed.world import alone
from privimage.families import family
from privimage.families.base import step_on_grey
from privimage.models import parameters
from privimage.privacy.batching import bytes_of_an_image, physical_batch_size
from privimage.telemetry import memory

IMAGES = 128  # in each measurement, at least


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    memory.keep_freed()
    device = torch.device("cpu")
    # These may be `auto`, and have no influence on the time.
    stated = ["finetune.learning_rate=1e-3", "finetune.max_grad_norm=1"]
    config = load(args.config, [*stated, *args.overrides])
    training = family(config).private_training(config, 10, alone(device), None)
    losses, step = training.losses, step_on_grey(config, training)

    def seconds(images: int) -> float:
        times, started = max(1, IMAGES // images), time.process_time()
        for _ in range(times):
            step(images)
        return (time.process_time() - started) / times / images

    for images in args.sizes:
        seconds(images)  # the first call sets things up
    # Interleaved, so that a slower moment of the machine meets all sizes.
    rounds = [{images: seconds(images) for images in args.sizes} for _ in range(args.rounds)]
    settings = config.finetune.model_copy(update={"physical_batch_size": "auto", "logical_batch_size": 16384})
    chosen = physical_batch_size(settings, training.module, losses, losses.probe, device, 1)
    held = bytes_of_an_image(training.module, losses, losses.probe, device)
    print(
        f"{parameters(training.module):,} parameters, {held / 1e6:.1f} MB of each image; auto takes {chosen}"
    )
    for images in args.sizes:
        print(f"{images:4} images at once: {1e3 * statistics.median(r[images] for r in rounds):.2f} ms each")


if __name__ == "__main__":
    main()
