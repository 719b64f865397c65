"""The pipeline and sweeps as jobs of a cluster: behind `privimage submit` and the last job of each."""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from privimage.cluster import SCHEDULER
from privimage.cluster.scheduler import Submission
from privimage.config import Config, load
from privimage.config.stages import STAGES
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.experiments.settings import is_experiment
from privimage.experiments.settings import load as load_experiment
from privimage.runs import sharing
from privimage.runs.doctor import diagnose
from privimage.storage.rundir import RunDir

Variant = tuple[Path, tuple[str, ...]]  # a configuration and its overrides


def submit(words: Sequence[str], sweeps: bool = False, checked: bool = True) -> None:
    """Submit what the words of a command name: an experiment, a sweep, or one pipeline.

    `checked`: only if `privimage doctor` finds no mistake. Raises UserError where they name no configuration.
    """
    paths = [Path(word) for word in words if "=" not in word]
    if not paths:
        raise UserError("usage: privimage submit CONFIG [section.key=value ...]")
    if sweeps or len(paths) > 1 or is_experiment(paths[0]):
        sweep(words, checked)
    else:
        pipeline(paths[0], [word for word in words if "=" in word], checked)


def require_health(config: Config) -> None:
    """Raise UserError, with the table of what is amiss printed, before anything is queued."""
    found = diagnose(config, ALONE)
    if found.mistakes:
        found.show()
        raise UserError(f"{config.run.dir}: nothing was submitted; see above, or submit with --unchecked")


def pipeline(path: Path, overrides: Sequence[str], checked: bool = True) -> None:
    """Submit the stages that are not finished as a chain of jobs and print their ids, and a last job that
    prints a summary.
    """
    config = load(path, tuple(overrides))
    if checked:
        require_health(config)
    run = RunDir(config.run.dir)
    logs, jobs = _logs(run), list[str]()
    # Each job waits for the one before it, and is cancelled if that fails.
    for stage in config.stages:
        if run.record(stage) is not None:
            print(f"{stage:12} done before")
            continue
        job = Submission(
            stage,
            logs / stage,
            (stage, str(path), *overrides),
            config.slurm.of(stage, os.environ),
            after=tuple(jobs[-1:]),
        )
        jobs.append(SCHEDULER.submit(config, job))
        print(f"{stage:12} job {jobs[-1]}  {SCHEDULER.log_of(job, jobs[-1])}", flush=True)
    _submit_summary(config, jobs, logs, [run])


def sweep(words: Sequence[str], checked: bool = True) -> None:
    """Submit runs as arrays: of whole pipelines, or of stages where these ask for different resources.

    All runs of an experiment, or each configuration with each combination of comma-separated values. Runs
    whose public stages others of the sweep do as well wait for those, to share them.
    """
    variants = expand(words)
    configs = [load(path, overrides) for path, overrides in variants]
    runs = [RunDir(config.run.dir) for config in configs]
    if len({run.path for run in runs}) < len(runs):
        raise UserError(
            "run.dir: several runs of the sweep would share a directory; give configurations of different "
            "run.dir"
        )
    if checked:
        require_health(configs[0])
    logs = _logs(RunDir(runs[0].path.parent))
    jobs: list[str] = []
    # The first wave makes the public stages that the second one shares.
    for part in waves(configs):
        jobs.append(_array(part, variants, configs, logs, jobs[-1:]))
        for number, at in enumerate(part):
            print(f"job {jobs[-1]}_{number}  {runs[at].path}  {variants[at][0]} {' '.join(variants[at][1])}")
    _submit_summary(configs[0], jobs, logs, runs)


def _array(
    part: list[int], variants: list[Variant], configs: list[Config], logs: Path, after: Sequence[str]
) -> str:
    """Queue the runs `part` of a sweep, and return the id of the last array of theirs.

    One array of whole runs; or, where the stages ask for different resources, an array for each stage, of
    which every task waits for the task of its run in the array before.
    """
    config, number = configs[part[0]], "-".join(after) or "0"
    wanted = [stage for stage in STAGES if any(stage in configs[at].stages for at in part)]
    if all(config.slurm.of(stage) == config.slurm.of("run") for stage in wanted):
        wanted = ["run"]
    job = ""
    for stage in wanted:
        tasks = logs / f"sweep-{os.getpid()}-{number}-{stage}.tasks"
        tasks.write_text("".join(_task(stage, *variants[at], configs[at]) + "\n" for at in part))
        request = config.slurm.of(stage, os.environ)
        waits = (job,) if job else tuple(after)
        name = "sweep" if stage == "run" else f"sweep-{stage}"
        submission = Submission(
            name,
            logs / name,
            ("--tasks", str(tasks)),
            request,
            after=waits,
            even_if_failed=not job,
            task_by_task=bool(job),
            tasks=len(part),
        )
        job = SCHEDULER.submit(config, submission)
    return job


def _task(stage: str, path: Path, overrides: Sequence[str], config: Config) -> str:
    """What one task runs, as words of a shell; empty where a method has no such stage."""
    if stage != "run" and stage not in config.stages:
        return ""
    return shlex.join([stage, str(path), *overrides])


def waves(configs: Sequence[Config]) -> list[list[int]]:
    """Indices of the runs that can start at once, and of those that then find all their public stages done by
    others.
    """
    # A run waits if all its public stages are made by runs before it.
    known: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for at, config in enumerate(configs):
        needed = {sharing.name_of(stage, config) for stage in config.public_stages if config.run.shared}
        (second if needed and needed <= known else first).append(at)
        known |= needed
    return [part for part in (first, second) if part]


def expand(words: Sequence[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """Configurations and their overrides from the words of a sweep, or of the runs of an experiment.

    ``a.yaml privacy.epsilon=1,5`` gives a.yaml twice, with a run.dir of its own for each: ``runs/a-epsilon1``
    and so on. Commas inside brackets separate nothing. Raises UserError for an experiment beside others.
    """
    paths = [Path(word) for word in words if "=" not in word]
    if is_experiment(paths[0]):
        if len(paths) > 1:
            raise UserError(f"{paths[1]}: an experiment is submitted alone")
        runs = load_experiment(paths[0]).all_runs([word for word in words if "=" in word])
        return [(run.path, run.overrides) for run in runs]
    choices = [
        [(key, value) for value in re.split(r",(?![^\[]*\])", values)]
        for key, values in (word.split("=", 1) for word in words if "=" in word)
    ]
    variants = []
    for path, combination in itertools.product(paths, itertools.product(*choices)):
        overrides = tuple(f"{key}={value}" for key, value in combination)
        varied = [
            f"{key.split('.')[-1]}{value}"
            for (key, value), options in zip(combination, choices, strict=True)
            if len(options) > 1
        ]
        if varied:
            directory = load(path, overrides).run.dir
            overrides += (f"run.dir={directory.with_name('-'.join([directory.name, *varied]))}",)
        variants.append((path, overrides))
    return variants


def summary(paths: Sequence[str]) -> None:
    """Print how far each run came and what to do about those that did not finish.

    Runs as the last job.
    """
    unfinished = []
    for path in map(Path, paths):
        config = load(path / "config.yaml") if (path / "config.yaml").exists() else None
        run = RunDir(path)
        left = (
            [stage for stage in config.stages if run.record(stage) is None] if config else ["the first stage"]
        )
        print(f"{path}: {'finished' if not left else f'ended before {left[0]} was finished'}")
        unfinished += [path] if left else []
    if unfinished:
        print(
            "The last lines of the jobs' logs say why (nothing there: the job was killed, for time or "
            "memory; see `scontrol show job`)."
        )
        print(
            "When that is fixed, submit again: finished stages are skipped, and a stage that was stopped "
            "goes on from its last checkpoint."
        )
        sys.exit(1)


def _logs(run: RunDir) -> Path:
    folder = run.path / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _submit_summary(config: Config, jobs: Sequence[str], logs: Path, runs: Sequence[RunDir]) -> None:
    if not jobs:
        return
    paths = tuple(str(run.path) for run in runs)
    job = Submission("summary", logs / "summary", paths, None, after=tuple(jobs), even_if_failed=True)
    number = SCHEDULER.submit(config, job)
    print(f"{'summary':12} job {number}  {SCHEDULER.log_of(job, number)}")


if __name__ == "__main__":  # slurm/summary.sbatch
    summary(sys.argv[1:])
