"""What submission asks of a scheduler of batch jobs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from privimage.config import Config
from privimage.config.slurm import Job
from privimage.errors import UserError


@dataclass(frozen=True)
class Submission:
    """One job, or an array of jobs, that is to be queued."""

    name: str
    log: Path  # of the job, without the number of the job and the suffix, which the scheduler adds
    arguments: tuple[str, ...]
    request: Job | None  # what it asks for; None: one core of any node, to print a summary
    after: tuple[str, ...] = ()  # ids of jobs that must have ended before it starts
    even_if_failed: bool = False  # whether it starts when one of those has failed
    task_by_task: bool = False  # of an array after an array: each task waits for the task of its number
    tasks: int = 0  # of an array; 0: a single job


class Scheduler(ABC):
    """Queues jobs."""

    @abstractmethod
    def submit(self, config: Config, job: Submission) -> str:
        """Queue a job and return its id. Raises UserError with what the scheduler says."""

    @abstractmethod
    def log_of(self, job: Submission, number: str) -> str:
        """Where a queued job writes its output."""


def job_request(config: Config, stage: str, environ: Mapping[str, str]) -> Job:
    """What the job of a stage asks for.

    STAGE_NODES and the like in the environment, then what the configuration says of the stage, then NODES,
    then what it says of all stages: what is said of one stage goes before what is said of all.

    Raises UserError that names a variable whose value cannot be.
    """
    fields: dict[str, object] = {}
    single = config.slurm.stages.get(stage)
    for name in Job.model_fields:
        wanted = [
            environ.get(f"{stage}_{name}".upper()),
            getattr(single, name, None),
            environ.get(name.upper()),
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
