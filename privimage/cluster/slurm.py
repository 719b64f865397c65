"""Jobs of SLURM: slurm/stage.sbatch, which starts one rank per task and queues itself again when stopped."""

import os
import shlex
import subprocess
from pathlib import Path

from privimage.cluster.scheduler import Scheduler, Submission
from privimage.config import Config
from privimage.errors import UserError

HOME = Path(__file__).resolve().parent.parent.parent
STAGE, SUMMARY = HOME / "slurm" / "stage.sbatch", HOME / "slurm" / "summary.sbatch"
# Before the limit of time: SLURM may send the signal a minute early, and looks every half minute.
WARNING_SECONDS = 180


class SlurmScheduler(Scheduler):
    """Submits with sbatch."""

    def submit(self, config: Config, job: Submission) -> str:
        """See `Scheduler.submit`."""
        settings = {
            "PRIVIMAGE_HOME": HOME,
            "SETUP": config.slurm.setup,
            "CONTAINER": config.slurm.container,
            "SRUN_OPTIONS": shlex.join(config.slurm.srun),
            "STATUS_FOLDER": job.log.parent.resolve(),
        }
        command = [
            "sbatch",
            "--parsable",
            f"--job-name=privimage-{job.name}",
            f"--output={self._pattern(job)}",
            *sbatch_options(config, job),
            str(STAGE if job.request else SUMMARY),
            *job.arguments,
        ]
        environ = os.environ | {key: str(value) for key, value in settings.items()}
        try:
            answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError("sbatch: no such command; run this on a machine that submits to SLURM") from None
        if answer.returncode:
            reason = answer.stderr.strip().splitlines()[-1] if answer.stderr else "sbatch failed"
            raise UserError(f"{job.name}: {reason} ({shlex.join(command)})")
        return answer.stdout.strip().split(";")[0]

    def log_of(self, job: Submission, number: str) -> str:
        """See `Scheduler.log_of`."""
        return self._pattern(job).replace("%j", number).replace("%A", number)

    def _pattern(self, job: Submission) -> str:
        return f"{job.log}-%A-%a.out" if job.tasks else f"{job.log}-%j.out"


def sbatch_options(config: Config, job: Submission) -> list[str]:
    """The options of sbatch for what a job asks for and waits for."""
    options, request = [], job.request
    if request is None:
        options.append("--ntasks=1")
    else:
        options += [
            f"--nodes={request.nodes or 1}",
            f"--ntasks-per-node={request.ranks or request.gpus or 1}",
            "--requeue",
            "--open-mode=append",
            f"--signal=USR2@{WARNING_SECONDS}",
        ]
        # Only what is asked for: a site's defaults fill in the rest.
        for option, value in (
            ("gpus-per-node", request.gpus),
            ("cpus-per-task", request.cpus),
            ("mem", request.memory),
            ("time", request.time),
        ):
            options += [f"--{option}={value}"] if value else []
    # The owner's own options come last, so that they win.
    options += config.slurm.options
    if job.after:
        kind = "aftercorr" if job.task_by_task else "afterany" if job.even_if_failed else "afterok"
        options.append(f"--dependency={kind}:{':'.join(job.after)}")
        options += [] if job.even_if_failed else ["--kill-on-invalid-dep=yes"]
    if job.tasks:
        options.append(f"--array=0-{job.tasks - 1}")
    return options
