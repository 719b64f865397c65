"""Submission of runs to a cluster. A new scheduler is one file with a `Scheduler`, and one line here."""

from privimage.cluster.scheduler import Scheduler
from privimage.cluster.slurm import SlurmScheduler

SCHEDULERS: dict[str, Scheduler] = {"slurm": SlurmScheduler()}
