"""Kill a run with SIGKILL at random moments, start it again each time, and look at what is left in the end.

    python tests/end_to_end/kills.py --kills 200 [--method dpgan-p]

A parent with everything imported forks each try, so that a restart takes no time and the kills fall into the
work. Prints a table of the stages in which the kills fell, and whether the end is that of an undisturbed run:
the same selection and the same weights to the bit, every step in the ledger exactly once, and no torn or
temporary file. Exits with 1 if not.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from privimage.config import Config, load
from privimage.config.methods import METHODS
from privimage.distributed import checkpoint
from privimage.privacy.ledger import read
from privimage.runs import pipeline
from privimage.stages import finetune, pretrain, query, select, synthesize  # noqa: F401  imported before the first fork
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

TINY = Path(__file__).resolve().parent.parent / "tiny.yaml"


def configuration(folder: Path, method: str) -> Config:
    """The tiny pipeline with a fixed key, so that two runs can be compared."""
    return load(
        TINY,
        [
            f"method={method}",
            f"run.dir={folder / 'run'}",
            "privacy.insecure_fixed_key=1",
            "finetune.steps=12",
            "query.checkpoint_every=3",
        ],
    )


def stages(config: Config) -> tuple[str, ...]:
    """All stages of the method but the evaluation."""
    return config.stages[:-1]


def start(config: Config) -> int:
    """Fork a process that runs the stages, and return its id."""
    child = os.fork()
    if child:
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)
    os._exit(pipeline.run(config, stages(config)))


def fingerprints(config: Config) -> dict[str, str]:
    """Digests of what a run ends with: selection, pretrained and fine-tuned weights, the released images."""
    run = RunDir(config.run.dir)
    digests = {}
    for stage in {"pretrain", "finetune"} & set(stages(config)):
        name = f"{stage}/weights.pt"
        state = checkpoint.load(run.path / name)
        assert state is not None
        weights = b"".join(value.numpy().tobytes() for value in state["ema"].values())
        digests[name] = hashlib.sha256(weights).hexdigest()
    import numpy as np

    if "select" in stages(config):
        digests["selection"] = hashlib.sha256(
            np.load(run.path / "select" / "selection.npz")["counts"].tobytes()
        ).hexdigest()
    digests["images"] = hashlib.sha256(
        np.load(run.path / "release" / "synthetic.npz")["images"].tobytes()
    ).hexdigest()
    return digests


def killed_run(config: Config, kills: int, longest: float, seed: int) -> Counter:
    """Run to the end with up to `kills` kills at random moments; returns in which stage each fell."""
    moments, fallen, stuck = random.Random(seed), Counter(), 1.0
    while True:
        before, child = _stage(config), start(config)
        deadline = (
            time.monotonic() + moments.uniform(0, longest * stuck) if fallen.total() < kills else float("inf")
        )
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if os.waitstatus_to_exitcode(status) != 0:
                    raise SystemExit(
                        f"a restart ended with status {os.waitstatus_to_exitcode(status)} after "
                        f"{dict(fallen)}"
                    )
                return fallen
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        fallen[_stage(config)] += 1
        stuck = 1.5 * stuck if _stage(config) == before else 1.0  # no stage may take all the kills


def _stage(config: Config) -> str:
    run = RunDir(config.run.dir)
    return next((stage for stage in stages(config) if run.record(stage) is None), "end")


def problems(config: Config, undisturbed: dict[str, str]) -> list[str]:
    """What is wrong with the end of a killed run; empty if all is as it should be."""
    found = [
        f"{name} differs" for name, digest in fingerprints(config).items() if digest != undisturbed[name]
    ]
    account = read_json(config.run.dir / "private" / "account.json")
    spent = read(Path(account["ledger"]["path"]))
    counts = sorted(m.count for m in spent.mechanisms(account["run"]))
    planned = [1] * ("select" in stages(config)) + [config.finetune.steps]
    if counts != planned:
        found.append(f"the ledger holds {counts} uses, not {planned}")
    if spent.torn:
        found.append(f"{spent.torn} torn lines")
    if (config.run.dir / "private" / "root.key").exists():
        found.append("the key was not destroyed")
    released = sorted(path.name for path in (config.run.dir / "release").iterdir())
    model = ["config.json", "model.pt", "model.safetensors"]
    if released != ["PRIVACY.json", "PRIVACY.md", "README.md", *model, "samples.png", "synthetic.npz"]:
        found.append(f"release holds {released}")
    return found


def trial(
    folder: Path, kills: int, method: str, longest: float = 2.0, seed: int = 0
) -> tuple[Counter, list[str]]:
    """One undisturbed run and killed ones until `kills` kills have fallen."""
    reference = configuration(folder / "undisturbed", method)
    killed_run(reference, 0, longest, seed)
    undisturbed, fallen, found, number = fingerprints(reference), Counter(), [], 0
    while fallen.total() < kills:
        config = configuration(folder / f"killed-{number}", method)
        fallen += killed_run(config, min(kills - fallen.total(), 25), longest, seed + number)
        found += problems(config, undisturbed)
        number += 1
    return fallen, found


def main() -> None:
    """Run the trial and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--method", default="privimage+d")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fallen, found = trial(Path(folder), arguments.kills, arguments.method)
    print("| stage | kills |\n|---|---|")
    for stage in METHODS[arguments.method].stages[:-1]:
        print(f"| {stage} | {fallen[stage]} |")
    print(
        f"| all | {fallen.total()} |\n\n" + ("; ".join(found) or "every end was that of the undisturbed run")
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
