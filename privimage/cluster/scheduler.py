"""What submission asks of a scheduler of batch jobs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from privimage.config import Config
from privimage.config.slurm import Job


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
