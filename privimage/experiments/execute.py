"""All runs of an experiment on this machine, one after the other, each in a separate process."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from privimage.distributed.preemption import stop
from privimage.errors import Stopped
from privimage.experiments.gather import state_of
from privimage.experiments.settings import PlannedRun, load
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

LOOK_SECONDS = 0.2


def execute(path: Path, overrides: Sequence[str] = ()) -> int:
    """Run what is not finished.

    A run that fails does not end the others; its reason is printed at the end.

    Returns the exit status: 0 if all runs are finished, 1 if some failed, 75 if a stop was requested. Raises
    UserError, before the first run, for anything that is wrong with the file or with the settings of any run.
    """
    runs = load(path).all_runs(overrides)
    stop.install()
    started, failed = time.monotonic(), []
    for number, run in enumerate(runs, 1):
        head = f"[{number}/{len(runs)}] {run.name}"
        if state_of(run).kind == "finished":
            say(f"{head}: done before")
            continue
        say(f"{head} ({run.path} {' '.join(run.overrides)})")
        status = _run(run)
        if stop.requested or status == Stopped.status:
            say(f"{head}: stopped; run again to go on")
            return Stopped.status
        if status:
            failed.append((run.name, state_of(run).description))
    say(
        f"{path}: {len(runs) - len(failed)} of {len(runs)} runs are finished, "
        f"{(time.monotonic() - started) / 60:.1f} minutes"
    )
    for name, reason in failed:
        say(f"  {name}: {reason}")
    return 1 if failed else 0


def _run(run: PlannedRun) -> int:
    """The exit status of ``privimage run``. Signals that this process gets reach it.

    Ctrl-C by itself, others passed on.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "privimage", "run", str(run.path), *run.overrides]
    ) as process:
        passed_on = False
        while True:
            try:
                status = process.wait(LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if stop.requested and not passed_on:
                    process.terminate()
                    passed_on = True
    if status < 0 and not passed_on:
        by = signal.Signals(-status)
        RunDir(run.config.run.dir).note_failure(
            f"killed by {by.name}" + ("; out of memory?" if by == signal.SIGKILL else "")
        )
    return status
