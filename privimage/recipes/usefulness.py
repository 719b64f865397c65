"""Whether a run can be of use, told before hours are spent."""

import os
from collections.abc import Iterator, Sequence

import torch

from privimage.config import Config
from privimage.families.work import Work
from privimage.privacy.mechanisms.embedding import embedding_length
from privimage.privacy.plan import default_delta
from privimage.recipes.choose import private_parameters
from privimage.recipes.signal import gaussian_mu, noise_over_signal, reach

HOPELESS = 10  # times the hours that a run may take
# Public images that a denoiser sees for each value of an image, below which it has hardly learned more than
# a linear filter knows (docs/results.md): 61,000 of 32x32 pixels in colour. Small images are soon learned.
SHOWN, SMALL = 20, 16


def too_little_signal(config: Config, count: int, classes: int) -> Iterator[str]:
    """A line where noise must be larger than anything that `count` images can teach the network.

    `config` has no `auto`; `classes` is 0 for an unlabelled set.
    """
    if not config.spec.private or config.spec.training not in ("finetune", "match"):
        return
    epsilon, delta = config.privacy.epsilon, config.privacy.delta or default_delta(count)
    if config.spec.training == "match":
        # A row of the embedding has norm 1 / classes at most, and noise of sigma / N in each of F numbers.
        parameters = embedding_length(config)
        ratio = max(classes, 1) * noise_over_signal(parameters, count, epsilon, delta)
        what = f"{parameters:,} features of {max(classes, 1)} classes"
    else:
        parameters = private_parameters(config, classes)
        ratio = noise_over_signal(parameters, count, epsilon, delta)
        what = f"{parameters:,} parameters"
    if ratio > 1:
        yield (
            f"privacy.epsilon: at epsilon {epsilon:g} the noise on {what} is {ratio:.2g} times the largest "
            f"signal that {count:,} images can give, with any number of steps: private training will teach "
            f"nothing. From about epsilon {_enough(ratio, count, epsilon, delta):.2g} on it can; or use more "
            "images, or a smaller model.width"
        )


def _enough(ratio: float, count: int, epsilon: float, delta: float) -> float:
    """About the epsilon at which noise and signal are equal, among a few round numbers."""
    wanted = ratio * reach(count, epsilon, delta) / count
    steps = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 3, 5)]
    return next((step for step in steps if gaussian_mu(step, delta) >= wanted), steps[-1])


def too_little_pretraining(config: Config) -> Iterator[str]:
    """A line where a denoiser sees too few public images to learn what an image is.

    `config` has no `auto`.
    """
    data, settings = config.data, config.pretrain
    if config.spec.generator != "diffusion" or "pretrain" not in config.stages or settings.start_from:
        return
    shown, needed = settings.steps * settings.batch_size, SHOWN * data.channels * data.resolution**2
    if data.resolution > SMALL and shown < needed:
        yield (
            f"pretrain.steps: {settings.steps:,} of {settings.batch_size} show the network {shown:,} public "
            f"images; it takes {needed:,} at least to learn what an image of {data.resolution} pixels a side "
            "is, and more for details: expect coloured noise. Give it more time (run.hours, --hours), a "
            "smaller data.resolution, or starter weights (pretrain.start_from)"
        )


def busy(config: Config, device: str) -> Iterator[str]:
    """A line where other work has all cores, and threads of this run would spin while they wait.

    `python benchmarks/busy.py` measures what that costs.
    """
    cores = len(os.sched_getaffinity(0))
    load, threads = os.getloadavg()[0], config.runtime.threads or torch.get_num_threads()
    if device == "cpu" and load > cores + 0.5 and threads > 1 and "OMP_WAIT_POLICY" not in os.environ:
        yield (
            f"runtime.threads: other work keeps this machine busy (a load of {load:.1f} on {cores} cores), "
            "where threads that wait for each other make a run many times slower: set runtime.threads=1, or "
            "OMP_WAIT_POLICY=passive in the environment"
        )


def too_long(config: Config, work: Sequence[Work], ranks: int = 1) -> Iterator[str]:
    """A line where the estimated time is far more than the run may take, with what to change."""
    hours = sum(one.seconds for one in work) / 3600 / ranks
    if hours > HOPELESS * config.run.hours:
        longest = max(work, key=lambda one: one.seconds)
        most = longest.seconds / 3600 / ranks
        yield (
            f"run.hours: about {hours:,.0f} hours on this machine, and the run may take "
            f"{config.run.hours:g}; most of it is {longest.stage} ({most:,.0f} hours): leave the settings of "
            f"{longest.stage} at auto, use GPUs or more ranks, or raise run.hours"
        )
