"""The rules of `privimage.recipes` against other choices, and against configurations written by hand.

    python benchmarks/recipes.py sweep [--dir runs/sweep]
    python benchmarks/recipes.py compare CONFIG [--hours H] [--dir runs/compare]

`sweep`: the UCI digits, which are public, at the same number of noised copies in all, divided into batch,
steps and copies in different ways, and at two widths; beside each the closed form of
`privimage.recipes.signal`: the share of the signal that the budget can buy, and noise over signal. Query and
pretraining are shared.

`compare`: CONFIG as it is, then the same data as `privimage init` would do it in as many hours as that took,
or H; times and accuracies side by side. Runs that are finished are not repeated.
"""

import argparse
import math
import time
from pathlib import Path

from privimage.commands.advised import advised
from privimage.config import Config, load, parse
from privimage.distributed.world import ALONE
from privimage.families import family
from privimage.privacy.plan import default_delta
from privimage.recipes import automatic, settled
from privimage.recipes.settle import size_of
from privimage.recipes.signal import noise_over_signal, reach, share
from privimage.runs import pipeline
from privimage.storage.files import read_json

QUICKSTART = "configs/quickstart.yaml"
COPIES = 862 * 60 * 8  # noised copies in all, those of the quickstart
# Steps, copies, width; the batch follows.
TRIED = ((60, 8, 8), (120, 8, 8), (480, 8, 8), (480, 1, 8), (1600, 1, 8), (120, 8, 16))


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep")
    sweep.add_argument("--dir", type=Path, default=Path("runs/sweep"))
    sweep.add_argument("--only", type=int, nargs="*", help="numbers of the rows to run")
    comparison = commands.add_parser("compare")
    comparison.add_argument("config", type=Path)
    comparison.add_argument("--hours", type=float)
    comparison.add_argument("--dir", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    if args.command == "sweep":
        print("| steps | batch | copies | width | share of the signal | noise over signal | LR | MLP | CNN |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for number, (steps, copies, width) in enumerate(TRIED):
            if not args.only or number in args.only:
                one(args.dir, steps, copies, width)
    else:
        compare(args.config, args.hours, args.dir)


def one(folder: Path, steps: int, copies: int, width: int) -> None:
    """One row of the sweep."""
    batch = min(COPIES // steps // copies, 1437)
    rate = 5e-3 * math.sqrt(60 / steps)
    config = load(
        QUICKSTART,
        [
            f"run.dir={folder / f'{steps}-{copies}-{width}'}",
            f"run.shared={folder / 'shared'}",
            f"model.width={width}",
            f"finetune.logical_batch_size={batch}",
            f"finetune.steps={steps}",
            f"finetune.noise_copies={copies}",
            f"finetune.learning_rate={rate:.2g}",
            "classify.use=false",  # what the private steps do is measured
        ],
    )
    pipeline.execute(config, (), ALONE)
    count, delta = 1437, config.privacy.delta or default_delta(1437)
    most = reach(count, config.privacy.epsilon, delta)
    bought = share(batch * steps**0.5 / most)
    size = family(config).sizes(config, 10)["generator"]
    noise = noise_over_signal(size, count, config.privacy.epsilon, delta) / bought
    cells = [steps, batch, copies, width, f"{100 * bought:.0f} %", f"{noise:.3f}", *accuracies(config)]
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def compare(path: Path, hours: float | None, folder: Path) -> None:
    """The configuration of a file, and the recipe for its data."""
    print("| | minutes | LR | MLP | CNN |\n|---|---|---|---|---|", flush=True)
    # Classifiers that learn from the real images take long, and compare nothing.
    hand = load(path, [f"run.dir={folder / path.stem}", "evaluate.ceiling=false"])
    taken = timed("by hand", hand)
    count, classes = size_of(hand)
    tree = hand.model_dump(mode="json")
    bare = {
        "method": hand.method,
        "run": {"dir": str(folder / f"{path.stem}-recipe"), "hours": hours or taken / 3600},
        "data": tree["data"],
        "privacy": tree["privacy"],
        "finetune": {"precision": "auto"},
        "runtime": {"precision": "auto"},
        "evaluate": {"ceiling": False},
    }
    bare["data"]["sensitive"] |= {"count": count, "classes": classes or None}
    timed("recipe", advised(parse(bare), count, classes))


def timed(name: str, config: Config) -> float:
    """Seconds of a run; prints its row."""
    started = time.monotonic()
    run = pipeline.execute(config, (), ALONE)
    seconds = time.monotonic() - started
    done = [run.record(stage) for stage in config.stages]
    seconds = max(seconds, sum(record["seconds"] for record in done if record))
    print("|", " | ".join([name, f"{seconds / 60:.1f}", *accuracies(config)]), "|", flush=True)
    if automatic(config):
        print(settled(config, ALONE, run).to_yaml(), flush=True)
    return seconds


def accuracies(config: Config) -> list[str]:
    """LR, MLP and CNN of a finished run, in percent."""
    scores = read_json(config.run.dir / "evaluate" / "report.json")["accuracy"]
    return [f"{scores[key]:.1f}" for key in ("lr", "mlp", "cnn")]


if __name__ == "__main__":
    main()
