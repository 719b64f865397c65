"""Starter weights on a GPU: as many steps as fit in some minutes, with a card, a grid and a table.

    python benchmarks/gpu/starter.py FOLDER PUBLIC.npz [--minutes 6] [--licence L] [--data TEXT]

PUBLIC.npz holds images uint8 (N, 32, 32, 3) and labels of all classes, with their names in `classes`. The
speed of both trainings is measured by a few steps as runs have them; then `privimage starter` trains the
query network (resnet-small) for a sixth of the time that is left, and the class-conditional 1.75M diffusion
model for the rest, in bf16. Leaves FOLDER/starter (both below 10 MB) and table.txt. With `--device cpu` the
same in miniature.
"""

import argparse
import time
from pathlib import Path

from privimage.commands import starter
from privimage.config import Config, parse
from privimage.config.settings import Runtime
from privimage.distributed.world import World, connect
from privimage.runs import pipeline
from privimage.storage.files import read_json

# (width, images of a step of query and pretraining, steps that are timed, samples of the distance)
WHOLE, MINIATURE = (32, 512, 1024, (20, 60), 5000), (8, 32, 16, (2, 6), 60)
LAST_SECONDS = {"cuda": 75.0, "cpu": 30.0}  # kept for starts, samples, distance and card
OF_QUERY = 1 / 6


def settings(folder: Path, public: Path, device: str, steps: dict[str, int], name: str = "run") -> Config:
    """A run for CIFAR-10, whose images it never opens, with `steps` by stage."""
    width, query, pretrain, _, samples = WHOLE if device == "cuda" else MINIATURE
    return parse(
        {
            "run": {"dir": str(folder / name), "shared": str(folder / "shared")},
            "data": {
                "resolution": 32,
                "public": {"kind": "npz", "path": str(public)},
                "sensitive": {
                    "kind": "cifar10",
                    "path": str(folder / "none"),
                    "count": 50_000,
                    "classes": 10,
                },
            },
            "model": {"width": width, "multipliers": [1, 2, 2], "attention": [16]},
            "query": {"network": "resnet-small", "batch_size": query, "learning_rate": 0.1}
            | {"steps": steps["query"], "checkpoint_every": 500},
            "pretrain": {"batch_size": pretrain, "learning_rate": 1e-3, "steps": steps["pretrain"]},
            "evaluate": {"fidelity_samples": samples},
            "runtime": {"device": device, "precision": "bf16"},
        }
    )


def seconds_of_a_step(folder: Path, public: Path, device: str, world: World) -> dict[str, float]:
    """Seconds of a step of both trainings: the difference of a few steps and some more, without the start.

    At least a quarter of what the larger number took, the start included: other work may disturb the first.
    """
    timed = (WHOLE if device == "cuda" else MINIATURE)[3]
    taken = []
    for count in timed:
        steps = dict.fromkeys(("query", "pretrain"), count)
        config = settings(folder, public, device, steps, f"timed-{count}")
        run = pipeline.execute(config.model_copy(update={"method": starter.METHOD}), starter.STAGES, world)
        taken.append({stage: read_json(run.path / stage / "done.json")["seconds"] for stage in steps})
    few, more = taken
    return {
        stage: max((more[stage] - few[stage]) / (timed[1] - timed[0]), 0.25 * more[stage] / timed[1])
        for stage in few
    }


def main() -> None:
    """Measure, plan, train, and print the table."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("public", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0, help="in all, the measurement included")
    parser.add_argument("--licence", default="unknown")
    parser.add_argument("--data", default="")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    given = parser.parse_args()
    folder, device = given.folder, given.device
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def tell(line: str) -> None:
        # Kept at once: what is cut off leaves what was measured before.
        print(line, flush=True)
        lines.append(line)
        (folder / "table.txt").write_text("\n".join(lines) + "\n")

    world = connect(Runtime(device=device))
    step = seconds_of_a_step(folder, given.public, device, world)
    left = 60 * given.minutes - LAST_SECONDS[device] - (time.monotonic() - started)
    if left < 5:
        raise SystemExit(f"--minutes {given.minutes:g}: nothing is left after the measurement")
    steps = {
        "query": max(1, int(OF_QUERY * left / step["query"])),
        "pretrain": max(1, int((1 - OF_QUERY) * left / step["pretrain"])),
    }
    config = settings(folder, given.public, device, steps)
    images = {"query": config.query.batch_size, "pretrain": config.pretrain.batch_size}
    for stage, count in steps.items():
        rate = images[stage] / step[stage]
        tell(f"{stage}: {count:,} steps of {images[stage]}, {step[stage]:.4f} s each, {rate:,.0f} images/s")
    status = starter.run(config, folder / "starter", given.licence, given.data)
    if status:
        raise SystemExit(status)
    for file in sorted((folder / "starter").iterdir()):
        tell(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    page = (folder / "starter" / "README.md").read_text().splitlines()
    for line in page:
        if line.startswith(("| accuracy", "| distance", "| training")):
            tell(line.strip("| "))
    tell(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
