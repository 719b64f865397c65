"""Kill runs at random moments, do to their files what owners and administrators do, and hold every release
against the truth.

    python tests/end_to_end/mutations.py --kills 1000

Between two starts one thing happens: nothing, the directory moves, is copied, is replaced by an older copy, a
label changes, the order of the images changes, a private file is deleted, another number of ranks starts, or
one of two ranks has another copy of the set. A spy keeps a log of every noise draw, of the weights before and
after it and of what it hides. In the end, and after each release:

- the stated epsilon is at least that of the draws from which the released weights came, walked back through
  the log;
- the ledger holds at least as many charges of each mechanism as different noises were drawn, on the whole
  set;
- no noise has hidden two different things.

Prints what was done, how the starts ended, and what is wrong; exits with 1 if anything is.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import spy
import torch
from data_sets import read as read_images

from privimage.config import Config, load
from privimage.data.readers import open_source
from privimage.distributed import checkpoint
from privimage.distributed.launch import free_port
from privimage.privacy import identity
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.ledger import read
from privimage.privacy.plan import make_plan
from privimage.runs import pipeline
from privimage.stages import finetune, match, pretrain, query, select, synthesize  # noqa: F401  imported before the first fork
from privimage.storage.files import read_json

TINY = Path(__file__).resolve().parent.parent / "tiny.yaml"
COUNT = 120
METHODS = ("dpdm", "dpdm", "dp-merf", "privimage+d")
# What a start may say when it refuses to go on: nothing was lost by it but the run.
REFUSALS = {
    "drawn before": "was drawn before",
    "used up": "all private steps of this run were made before",
    "ranks differ": "not the same on all ranks",
    "not in the ledger": "not in the ledger",
    "damaged": "damaged",
    "stage not finished": "is not finished",
    "unknown uses": "that made these weights are known",
}
MUTATIONS = (
    "nothing",
    "move",
    "copy",
    "snapshot",
    "restore",
    "label",
    "order",
    "delete",
    "ranks",
    "order on one rank",
    "label on one rank",
)
PRIVATE = (
    "private/account.json",
    "private/root.key",
    "private",
    "finetune/checkpoint.pt",
    "finetune/kernels.json",
    "select",
    "match",
)


@dataclass
class Run:
    """A run directory, and older copies of it."""

    path: Path
    method: str
    snapshots: list[Path] = field(default_factory=list)


class Trial:
    """One sensitive set with its ledger, the runs on it, and the log of all noise."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.numbers = folder, random.Random(seed), iter(range(1_000_000))
        self.done: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []
        digits = read_images(open_source("digits", None, "train"), 8, 1, 0)
        keep = np.sort(np.random.default_rng(0).permutation(len(digits.images))[:COUNT])
        self.images, self.labels = digits.images[keep, 0], digits.labels[keep]
        self.write_set(folder / "set.npz", self.images, self.labels)
        self.runs = [self.new_run(method) for method in dict.fromkeys(METHODS)]
        identity._software()  # once, as the plans, whose noise is searched for: all children inherit it
        for run in self.runs:
            make_plan(self.config(run), COUNT)

    def write_set(self, path: Path, images: np.ndarray, labels: np.ndarray) -> None:
        """Write a set that all ranks, or one of them, read."""
        np.savez(path, images=images, labels=labels, classes=np.array([str(c) for c in range(10)]))

    def new_run(self, method: str | None = None) -> Run:
        """A run that has not begun."""
        return Run(self.folder / f"run-{next(self.numbers)}", method or self.random.choice(METHODS))

    def config(self, run: Run, images: str = "set.npz") -> Config:
        """The smallest settings."""
        small = (
            "finetune.steps=8",
            "finetune.checkpoint_every=2",
            "finetune.logical_batch_size=30",
            "finetune.ema_decay=0",  # the released weights are then those after the last draw
            "match.steps=4",
            "match.checkpoint_every=2",
        )
        public = (
            "query.steps=2",
            "pretrain.steps=4",
            "pretrain.checkpoint_every=2",
            "data.public.images_per_class=4",
            "synthesize.samples=10",
        )
        places = (
            f"run.dir={run.path}",
            f"privacy.ledger={self.folder / 'ledgers'}",
            f"data.sensitive.path={self.folder / images}",
        )
        return load(TINY, [f"method={run.method}", "data.sensitive.kind=npz", *small, *public, *places])

    # What happens between two starts.

    def mutate(self, run: Run) -> tuple[int, str]:
        """Do one thing; returns the number of ranks of the next start and the set of its second rank."""
        what = self.random.choice(MUTATIONS)
        self.done[what] += 1
        other, second = self.folder / f"run-{next(self.numbers)}", "set.npz"
        if what == "move" and run.path.exists():
            run.path.rename(other)
            run.path = other
        elif what == "copy" and run.path.exists():
            shutil.copytree(run.path, other)
            self.runs.append(Run(other, run.method))
        elif what == "snapshot" and run.path.exists():
            run.snapshots.append(Path(shutil.copytree(run.path, other.with_name(f"snapshot-{other.name}"))))
        elif what == "restore" and run.snapshots:
            shutil.rmtree(run.path, ignore_errors=True)
            shutil.copytree(self.random.choice(run.snapshots), run.path)
        elif what == "label":
            self.labels = self.relabelled()
            self.write_set(self.folder / "set.npz", self.images, self.labels)
        elif what == "order":
            order = np.random.default_rng(self.random.randrange(1 << 30)).permutation(COUNT)
            self.images, self.labels = self.images[order], self.labels[order]
            self.write_set(self.folder / "set.npz", self.images, self.labels)
        elif what == "delete":
            path = run.path / self.random.choice(PRIVATE)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif what == "order on one rank":
            second = "second.npz"
            self.write_set(self.folder / second, self.images[::-1], self.labels[::-1])
        elif what == "label on one rank":
            second = "second.npz"
            self.write_set(self.folder / second, self.images, self.relabelled())
        return 2 if what == "ranks" or second != "set.npz" else 1, second

    def relabelled(self) -> np.ndarray:
        """The labels with one of them changed."""
        labels = self.labels.copy()
        labels[self.random.randrange(COUNT)] = self.random.randrange(10)
        return labels

    # Starts.

    def start(self, run: Run, ranks: int, second: str) -> list[int]:
        """Fork the ranks of a start and return their process ids."""
        port, children = str(free_port()), []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                self.be_a_rank(run, rank, ranks, port, "set.npz" if rank == 0 else second)
            children.append(child)
        return children

    def be_a_rank(self, run: Run, rank: int, ranks: int, port: str, images: str) -> None:
        """Run all stages but the evaluation, and do not return."""
        said = os.open(self.folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if ranks > 1:
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in place.items()})
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        spy.install(
            lambda draw: os.write(log, (json.dumps(vars(draw) | {"rank": rank}) + "\n").encode()) and None
        )
        torch.set_num_threads(1)
        config = self.config(run, images)
        os._exit(pipeline.run(config, config.stages[:-1]))

    def killed(self, run: Run, longest: float) -> bool:
        """Start once, kill at a random moment; false if it ended by itself before."""
        ranks, second = self.mutate(run)
        children = self.start(run, ranks, second)
        deadline = time.monotonic() + self.random.uniform(0.2, longest * ranks)
        statuses: dict[int, int] = {}
        while len(statuses) < len(children) and time.monotonic() < deadline:
            for child in children:
                if child not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    statuses[child] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.005)
        killed = len(statuses) < len(children)
        for child in children:
            if child not in statuses:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if not killed:
            self.ended(run, list(statuses.values()))
        return killed

    def ended(self, run: Run, statuses: list[int]) -> None:
        """Judge a start that ended by itself."""
        if statuses == [0] * len(statuses):
            self.ends["released"] += 1
            try:
                self.problems += self.wrong_with(run)
            except Exception as error:  # the trial goes on
                self.problems.append(f"{run.path.name} ({run.method}) cannot be judged: {error!r}")
            self.retire(run)
            return
        said = "".join(
            path.read_text() for path in self.folder.glob("said-*") if int(path.name[-1]) < len(statuses)
        )
        reason = next((name for name, text in REFUSALS.items() if text in said), None)
        if reason is None or not set(statuses) <= {2}:
            self.problems.append(f"{run.path.name} ({run.method}) ended with {statuses}: {said[-600:]}")
            self.retire(run)
        else:
            self.ends[f"refused: {reason}"] += 1
            if reason != "ranks differ":
                self.retire(run)

    def retire(self, run: Run) -> None:
        """Put a new run in place of one that has ended.

        A directory that is there may still be one of which others are copies.
        """
        self.runs.remove(run)
        if len({other.method for other in self.runs}) < len(set(METHODS)) or not self.runs:
            self.runs.append(self.new_run(run.method))

    # The truth.

    def draws(self) -> list[dict]:
        """The log of all noise draws; a line that a kill has torn was written before the draw was used."""
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wrong_with(self, run: Run) -> list[str]:
        """What is wrong with a release."""
        said, draws = read_json(run.path / "release" / "PRIVACY.json"), self.draws()
        plan = make_plan(self.config(run), COUNT)
        behind = {
            "finetune": self.steps_behind(run, draws),
            "match": int(run.method == "dp-merf"),
            "select": int(run.method == "privimage+d"),
        }
        spent = [
            SampledGaussian(p.noise_multiplier, p.composition.sample_rate, behind[p.stage])
            for p in plan.mechanisms
        ]
        found = []
        if not spent or said["epsilon"] < epsilon(spent, plan.delta, plan.accountant) - 1e-6:
            found.append(f"{run.path.name}: states {said['epsilon']}, {behind} were drawn for it")
        if run.method != "dp-merf" and behind["finetune"] < 1:
            found.append(f"{run.path.name}: no draw of its weights is in the log")
        return found

    def steps_behind(self, run: Run, draws: list[dict]) -> int:
        """The private steps from which the released weights came, walked back through the weights before and
        after each draw.
        """
        if run.method == "dp-merf":
            return 0
        weights = checkpoint.load(run.path / "finetune" / "weights.pt")
        at, steps = spy.digest(*(value.numpy() for value in weights["ema"].values())), 0
        came_from = {
            draw["after"]: draw["before"]
            for draw in draws
            if draw["stage"] == "finetune" and draw["rank"] == 0
        }
        while at in came_from:
            at, steps = came_from[at], steps + 1
        return steps

    def wrong_with_all(self) -> list[str]:
        """What is wrong with the ledger and the noise of the whole set."""
        found, draws = [], self.draws()
        charges = Counter(
            charge.part
            for path in (self.folder / "ledgers").glob("*.jsonl")
            for charge in read(path).charges.values()
        )
        for stage in ("select", "match", "finetune"):
            noises = len({draw["key"] for draw in draws if draw["stage"] == stage and draw["rank"] == 0})
            if charges[stage] < noises:
                found.append(f"{noises} noises were drawn in {stage}, {charges[stage]} are in the ledger")
            self.ends[f"noises drawn in {stage}"] = noises
            self.ends[f"charges of {stage}"] = charges[stage]
        twice = spy.one_noise_for_two(spy.Draw(draw["stage"], draw["key"], draw["hidden"]) for draw in draws)
        if twice:
            found.append(f"{len(twice)} noises hid two different things")
        return found


def trial(folder: Path, kills: int, seed: int = 0, longest: float = 4.0) -> Trial:
    """Kill until `kills` kills have fallen, let what is left go on to its end, and judge."""
    found, fallen, told = Trial(folder, seed), 0, 0
    while fallen < kills:
        fallen += found.killed(found.random.choice(found.runs), longest)
        for problem in found.problems[told:]:
            print(problem, file=sys.stderr, flush=True)
        told = len(found.problems)
        if sum(found.done.values()) % 100 == 0:
            print(
                f"{fallen} kills, {len(found.draws())} draws, {len(found.problems)} problems",
                file=sys.stderr,
                flush=True,
            )
    for run in list(found.runs):
        while run in found.runs:
            found.killed(run, 1000.0)
    found.problems += found.wrong_with_all()
    return found


def main() -> None:
    """Run the trial and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = trial(Path(folder), arguments.kills, arguments.seed)
    for title, counts in (("between two starts", found.done), ("ends", found.ends)):
        print(f"| {title} | |\n|---|---|")
        for name, count in sorted(counts.items()):
            print(f"| {name} | {count} |")
        print()
    print(
        "\n".join(found.problems)
        or f"{arguments.kills} kills: every release states what was drawn for it, no noise hides two things"
    )
    sys.exit(bool(found.problems))


if __name__ == "__main__":
    main()
