"""Submission of runs to a cluster. Another scheduler is one file with a `Scheduler`, named here."""

from privimage.cluster.scheduler import Scheduler
from privimage.cluster.slurm import SlurmScheduler

SCHEDULER: Scheduler = SlurmScheduler()
