"""How threads wait for each other: spinning, as GNU's OpenMP does for some time, for less of it, or asleep.

    python benchmarks/busy.py [--seconds 4] [--rounds 3]

Training steps of the denoisers of two configurations, with as many threads as there are cores; alone, and
beside a process that does the same. Rows are medians of interleaved rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WAITS: dict[str, dict[str, str]] = {
    "default": {},
    "30,000": {"GOMP_SPINCOUNT": "30000"},
    "10,000": {"GOMP_SPINCOUNT": "10000"},
    "3,000": {"GOMP_SPINCOUNT": "3000"},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
}
CONFIGS = {"8x8, batch 64": ("quickstart", 64), "32x32, batch 32": ("cifar10-cpu", 32)}


def steps_a_second(name: str, batch: int, seconds: float) -> float:
    """Of the denoiser of a configuration on images of zeros, in this process."""
    import torch

    from privimage.config import load
    from privimage.families.base import image_shape
    from privimage.families.denoising import losses_of_nothing
    from privimage.models import build_diffusion

    config = load(f"configs/{name}.yaml")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    losses = losses_of_nothing(build_diffusion(config, 10), image_shape(config), torch.device("cpu"))
    losses(batch).sum().backward()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        losses(batch).sum().backward()
        steps += 1
    return steps / (time.perf_counter() - started)


def measured(wait: dict[str, str], name: str, batch: int, seconds: float, processes: int) -> float:
    """Steps a second of one of `processes` processes that do the same."""
    command = [sys.executable, __file__, "--one", name, str(batch), str(seconds)]
    kept = {
        key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment = kept | wait
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return min(float(one.communicate()[0]) for one in started)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(steps_a_second(args.one[0], int(args.one[1]), float(args.one[2])))
        return
    print("| steps a second | " + " | ".join(WAITS) + " |\n|---" + "|---" * len(WAITS) + "|")
    for shown, (name, batch) in CONFIGS.items():
        for processes, where in ((1, "alone"), (2, "beside its twin")):
            rates: dict[str, list[float]] = {wait: [] for wait in WAITS}
            for _ in range(args.rounds):
                for wait, found in rates.items():
                    found.append(measured(WAITS[wait], name, batch, args.seconds, processes))
            medians = " | ".join(f"{statistics.median(found):.2f}" for found in rates.values())
            print(f"| {shown}, {where} | {medians} |", flush=True)


if __name__ == "__main__":
    main()
