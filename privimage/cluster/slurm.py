"""The pipeline as SLURM jobs.

``python -m privimage.cluster.slurm pipeline|sweep|summary``, behind slurm/*.sh.

The jobs all run slurm/stage.sbatch, which starts one rank a task and queues itself again where it was
stopped.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from privimage.config import Config, load
from privimage.config.slurm import Job
from privimage.errors import UserError, tell
from privimage.experiments.settings import is_experiment
from privimage.experiments.settings import load as load_experiment
from privimage.runs import sharing
from privimage.storage.rundir import RunDir

HOME = Path(__file__).resolve().parent.parent.parent
SCRIPT = HOME / "slurm" / "stage.sbatch"
WARNING_SECONDS = (
    180  # before the limit of time: SLURM may send the signal a minute early, and looks every half minute
)
USAGE = """usage: slurm/pipeline.sh CONFIG [section.key=value ...]
       slurm/sweep.sh CONFIG [CONFIG ...] [section.key=value,value,... ...]
       slurm/sweep.sh EXPERIMENT [section.key=value ...]"""


def job_request(config: Config, stage: str, environ: Mapping[str, str]) -> Job:
    """What the job of a stage asks for.

    STAGE_NODES and the like in the environment, then NODES, then the configuration.

    Raises UserError that names a variable whose value cannot be.
    """
    fields: dict[str, object] = {}
    for name in Job.model_fields:
        single = config.slurm.stages.get(stage)  # type: ignore[call-overload]
        wanted = [
            environ.get(f"{stage}_{name}".upper()),
            environ.get(name.upper()),
            getattr(single, name, None),
            getattr(config.slurm, name),
        ]
        fields[name] = next((value for value in wanted if value not in (None, "")), None)
    try:
        return Job.model_validate(fields)
    except ValueError:
        raise UserError(
            f"{stage}: what is asked for cannot be: "
            f"{', '.join(f'{k}={v}' for k, v in fields.items() if v is not None)}"
        ) from None


def sbatch_options(config: Config, stage: str, environ: Mapping[str, str]) -> list[str]:
    """The options of sbatch for one stage."""
    job = job_request(config, stage, environ)
    ranks = job.ranks or job.gpus or 1
    options = [
        f"--nodes={job.nodes or 1}",
        f"--ntasks-per-node={ranks}",
        "--requeue",
        "--open-mode=append",
        f"--signal=USR2@{WARNING_SECONDS}",
    ]
    for option, value in (
        ("gpus-per-node", job.gpus),
        ("cpus-per-task", job.cpus),
        ("mem", job.memory),
        ("time", job.time),
    ):
        options += [f"--{option}={value}"] if value else []
    return [*options, *config.slurm.options]


def submit(
    config: Config,
    name: str,
    log: Path,
    options: Sequence[str],
    arguments: Sequence[str],
    script: Path = SCRIPT,
) -> str:
    """Submit a job and return its id. Raises UserError with what sbatch says."""
    settings = {
        "PRIVIMAGE_HOME": HOME,
        "SETUP": config.slurm.setup,
        "CONTAINER": config.slurm.container,
        "STATUS_FOLDER": log.parent.resolve(),
    }
    environ = os.environ | {key: str(value) for key, value in settings.items()}
    command = [
        "sbatch",
        "--parsable",
        f"--job-name=privimage-{name}",
        f"--output={log}",
        *options,
        str(script),
        *arguments,
    ]
    try:
        answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("sbatch: no such command; run this on a machine that submits to SLURM") from None
    if answer.returncode:
        raise UserError(
            f"{name}: {answer.stderr.strip().splitlines()[-1] if answer.stderr else 'sbatch failed'} "
            f"({shlex.join(command)})"
        )
    return answer.stdout.strip().split(";")[0]


def pipeline(path: Path, overrides: Sequence[str]) -> None:
    """Submit the stages that are not finished as a chain of jobs, print their ids, and a last one that sums
    up.
    """
    config = load(path, tuple(overrides))
    run = RunDir(config.run.dir)
    jobs: list[str] = []
    logs = _logs(run)
    for stage in config.spec.stages:
        if run.record(stage) is not None:
            print(f"{stage:12} done before")
            continue
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        log = logs / f"{stage}-%j.out"
        jobs.append(
            submit(
                config,
                stage,
                log,
                [*sbatch_options(config, stage, os.environ), *after],
                [stage, str(path), *overrides],
            )
        )
        print(f"{stage:12} job {jobs[-1]}  {str(log).replace('%j', jobs[-1])}", flush=True)
    _submit_summary(config, jobs, logs, [run])


def sweep(words: Sequence[str]) -> None:
    """Submit an array of whole pipelines.

    All runs of an experiment, or each configuration with each combination of comma-separated values.

    Runs whose public stages others of the sweep do as well wait for those, to share them.
    """
    variants = expand(words)
    configs = [load(path, overrides) for path, overrides in variants]
    runs = [RunDir(config.run.dir) for config in configs]
    if len({run.path for run in runs}) < len(runs):
        raise UserError(
            "run.dir: several runs of the sweep would share a directory; give configurations of different "
            "run.dir"
        )
    logs = _logs(RunDir(runs[0].path.parent))
    jobs: list[str] = []
    for part in waves(configs):
        tasks = logs / f"sweep-{os.getpid()}-{len(jobs)}.tasks"
        tasks.write_text("".join(shlex.join([str(variants[at][0]), *variants[at][1]]) + "\n" for at in part))
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        options = [*sbatch_options(configs[0], "run", os.environ), *after, f"--array=0-{len(part) - 1}"]
        jobs.append(submit(configs[0], "sweep", logs / "sweep-%A-%a.out", options, ["--tasks", str(tasks)]))
        for number, at in enumerate(part):
            print(f"job {jobs[-1]}_{number}  {runs[at].path}  {variants[at][0]} {' '.join(variants[at][1])}")
    _submit_summary(configs[0], jobs, logs, runs)


def waves(configs: Sequence[Config]) -> list[list[int]]:
    """The places of the runs that may begin at once, and of those that then find all their public stages done
    by others.
    """
    known: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for at, config in enumerate(configs):
        needed = {sharing.name_of(stage, config) for stage in config.spec.public_stages if config.run.shared}
        (second if needed and needed <= known else first).append(at)
        known |= needed
    return [part for part in (first, second) if part]


def expand(words: Sequence[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """Configurations and their overrides from the words of sweep.sh.

    Those of its runs for the file of an experiment.

    ``a.yaml privacy.epsilon=1,5`` gives a.yaml twice, with a run.dir of its own for each: ``runs/a-epsilon1``
    and so on. Commas inside brackets separate nothing. Raises UserError where there is no configuration.
    """
    paths = [Path(word) for word in words if "=" not in word]
    if not paths:
        raise UserError(USAGE.splitlines()[1].strip())
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
    """Print how far each run came and what to do about those that did not come to their end.

    Runs as the last job.
    """
    unfinished = []
    for path in map(Path, paths):
        config = load(path / "config.yaml") if (path / "config.yaml").exists() else None
        run = RunDir(path)
        left = (
            [stage for stage in config.spec.stages if run.record(stage) is None]
            if config
            else ["the first stage"]
        )
        print(f"{path}: {'finished' if not left else f'ended before {left[0]} was finished'}")
        unfinished += [path] if left else []
    if unfinished:
        print(
            "The last lines of the jobs' logs say why (nothing there: the job was killed, for time or "
            "memory; see `scontrol show job`)."
        )
        print(
            "When it is mended, submit again: finished stages are skipped, and a stage that was stopped "
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
    log = logs / "summary-%j.out"
    options = [*config.slurm.options, f"--dependency=afterany:{':'.join(jobs)}", "--ntasks=1"]
    job = submit(
        config, "summary", log, options, [str(run.path) for run in runs], SCRIPT.with_name("summary.sbatch")
    )
    print(f"{'summary':12} job {job}  {str(log).replace('%j', job)}")


def main(words: Sequence[str]) -> None:
    """Entry of slurm/*.sh; exit status 2 and one line for a mistake."""
    if not words[1:]:
        print(f"privimage: error: {USAGE}", file=sys.stderr)
        sys.exit(UserError.status)
    try:
        match words[0]:
            case "pipeline":
                pipeline(Path(words[1]), words[2:])
            case "sweep":
                sweep(words[1:])
            case "summary":
                summary(words[1:])
    except UserError as error:
        tell(str(error), error.status)
        sys.exit(error.status)


if __name__ == "__main__":
    main(sys.argv[1:])
