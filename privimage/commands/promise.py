"""What a run promises, found in a process of its own while `privimage plan` measures the machine."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from privimage.config import Config
from privimage.privacy.calibration import training_noise
from privimage.privacy.plan import PrivacyPlan, make_plan
from privimage.privacy.relation import Relation


@dataclass(frozen=True)
class Promise:
    """A privacy plan, and what it costs by other counts."""

    plan: PrivacyPlan
    spent: float  # epsilon, by the accountant of the plan
    others: dict[str, float]  # epsilon of the same noise by the accountants that have a bound beside it
    alone: float | None  # noise multiplier of the training if the mechanisms beside it, if any, were free


def promise(config: Config, count: int) -> Promise:
    """That of a run on `count` sensitive images. Raises UserError if it cannot be kept."""
    plan = make_plan(config, count)
    # The other accountant is shown beside the one that is used: a check, and the price of the choice.
    others = () if Relation.of(config).replacement else {"rdp", "pld"} - {plan.accountant}
    alone, training = None, plan.training.composition
    if len(plan.mechanisms) > 1:
        alone = training_noise(plan.epsilon, plan.delta, training, (), plan.accountant, stated=False)
    return Promise(plan, plan.spent(), {name: plan.spent(name) for name in others}, alone)


@contextmanager
def beginning(config: Config, count: int) -> Iterator[Callable[[], Promise]]:
    """Begin to find the promise; what this yields waits for it, and raises what `promise` does."""
    # Elsewhere a fork may meet libraries that do not bear it; on one core it takes from what is measured.
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1:
        yield lambda: promise(config, count)
        return
    # A fork has loaded torch already. An interrupt is for the process that it belongs to.
    with ProcessPoolExecutor(1, get_context("fork"), _begin) as process:
        yield process.submit(promise, config, count).result


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A fork would wait forever for the threads that its parent had.
    torch.set_num_threads(1)
