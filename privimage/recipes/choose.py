"""The rules: one value, with its reason, for every setting that is `auto`.

They come from the closed form of `signal`, from tables of runs (docs/results.md) and from the papers named
beside them; `benchmarks/recipes.py` has the sweep that would try them on public sets. A value that the
configuration gives is kept, and the others are chosen to suit it.
"""

import math
from collections.abc import Callable

from privimage.config import Config
from privimage.families import family
from privimage.recipes.choice import Choice, Choices, applied, automatic, is_auto, still_open
from privimage.recipes.constants import constants, networks
from privimage.recipes.facts import Facts
from privimage.recipes.signal import needed, reach, share

Speeds = dict[str, float]  # seconds per image of a step, by stage; of finetune per noised copy
BATCH = "finetune.logical_batch_size"
FROM_STEPS = {"finetune.learning_rate", "evaluate.fidelity_samples"}  # see `rates`

# Of the time that a run may take: the rest is kept for slower moments of the machine, and for the start.
OF_TIME, START_SECONDS = 0.75, 30.0
# Shares of that time; those of stages that a method does not have go to the others.
SHARES = {
    "query": 0.08,
    "pretrain": 0.27,
    "warm": 0.15,
    "finetune": 0.3,
    "match": 0.4,
    "synthesize": 0.18,  # images are cheap, and classifiers learn from many
    "evaluate": 0.17,
}
# Where the signal is rich, private steps are worth more than all else.
RICH_SHARES = SHARES | {
    "query": 0.04,
    "pretrain": 0.08,
    "finetune": 0.52,
    "synthesize": 0.22,
    "evaluate": 0.14,
}
# With starter weights the public stages have little left to do.
BEGUN_SHARES = {"query": 0.04, "pretrain": 0.12}
RICH = 0.01  # noise over signal below which less noise brings nothing any more (MNIST at epsilon 10)
NEAR = 1.1  # noise over the least noise, where that is more: nine tenths of the signal
FEWEST, MOST, COPIES = 60, 1600, 8  # private steps; noised copies of an image
# Private steps at least where there is no time for copies: 240 of 250 images taught more than 60 of 1,000.
WITHOUT_COPIES = 240
LARGEST = 0.6  # of the set in a batch: more buys hardly any signal
# Epochs of the CNN of the evaluation: what is measured with, and how few there may be for the sake of more
# images, which teach more than more looks (docs/results.md, "How many images"); images that it sees in all,
# beyond which looks bring nothing; and images for a small set, where more than it has teach more too.
EPOCHS, FEW_EPOCHS, SEEN, OF_SMALL = 20.0, 5.0, 150_000, 16_000


def choose(config: Config, facts: Facts, measure: Callable[[Config], Speeds]) -> Choices:
    """A choice for every `auto` of `config`, by ``section.key``.

    `measure` returns the speeds of a configuration without `auto`, which has the chosen networks and any
    number of steps.
    """
    begun = config.pretrain.start_from is not None
    chosen = still_open(config, {**networks(facts), **constants(facts, begun)})
    config = applied(config, chosen)
    # Only steps and samples depend on the speed of the machine.
    if not FROM_STEPS.issuperset(automatic(config)):
        trial = applied(config, still_open(config, TRIAL | {BATCH: Choice(min(64, facts.count), "")}))
        speeds = {stage: seconds / facts.speed for stage, seconds in measure(trial).items()}
        size = private_parameters(config, facts.classes)
        steps = still_open(config, schedule(config, facts, speeds, size))
        chosen, config = chosen | steps, applied(config, steps)
    return chosen | still_open(config, rates(config, facts))


def private_parameters(config: Config, classes: int) -> int:
    """Parameters of the network that takes private steps; 0 where none does."""
    if config.spec.training != "finetune" or config.spec.generator == "none":
        return 0
    sizes = family(config).sizes(config, classes)
    return sizes.get("discriminator", sizes["generator"])


# What is measured with: one gradient of four copies, batches as they will be.
TRIAL: Choices = {
    key: Choice(value, "")
    for key, value in {
        "query.steps": 1,
        "pretrain.steps": 1,
        "warm.steps": 1,
        "finetune.steps": 1,
        "finetune.noise_copies": 4,
        "finetune.learning_rate": 1e-3,
        "synthesize.samples": 1000,
        "evaluate.cnn_epochs": int(EPOCHS),
        "evaluate.fidelity_samples": 1000,
        "evaluate.before": True,
    }.items()
}


def schedule(config: Config, facts: Facts, speeds: Speeds, parameters: int) -> Choices:
    """Steps, batches and samples that fill the time; `parameters` are those of the private network."""
    least = math.sqrt(max(parameters, 1)) / reach(facts.count, facts.epsilon, facts.delta)
    shares = RICH_SHARES if least < RICH / 2 else SHARES
    if config.pretrain.start_from is not None:
        shares = shares | {stage: min(share, shares[stage]) for stage, share in BEGUN_SHARES.items()}
    # Weights that know all public classes are not made better in the time that there is (docs/results.md).
    known: Choices = {}
    if facts.known and "query" in config.stages:
        shares = shares | {"query": 0.0}
        known["query.steps"] = Choice(1, "the weights that it begins with know all of its classes")
    stages = [stage for stage in shares if shares[stage] and stage in config.stages and speeds.get(stage)]
    whole = sum(shares[stage] for stage in stages)
    total = max(OF_TIME * 3600 * facts.hours - START_SECONDS, 30.0)
    seconds = {stage: total * shares[stage] / whole for stage in stages}
    private: Choices = {}
    if "finetune" in stages:
        # Seconds of a noised copy of each image that a step looks at, of one unit.
        copy = speeds["finetune"] * config.per_unit
        private = private_steps(config, facts, seconds["finetune"] / copy, parameters)
        spent = math.prod(choice.value for key, choice in private.items()) * copy
        # What the private steps do not need makes pretraining longer.
        if "pretrain" in stages:
            seconds["pretrain"] += max(0.0, seconds["finetune"] - spent)
    return known | private | _public_steps(config, seconds, speeds) | _samples(config, facts, seconds, speeds)


def private_steps(config: Config, facts: Facts, budget: float, parameters: int) -> Choices:
    """B, T and K for `budget` noised copies in all; see `privimage.recipes.signal`.

    Where the signal is rich (large sets), many small steps with one copy; where noise is the limit, copies of
    each image first, which cost no privacy, and as many steps as leave nine tenths of the signal.
    """
    given = config.finetune
    signal = reach(facts.count, facts.epsilon, facts.delta)
    least = math.sqrt(parameters) / signal
    x = needed(least / max(NEAR * least, RICH))
    rich = least < RICH / 2
    # Images of a group average out as much as copies do, and more.
    most = max(1, COPIES // config.per_unit)
    copies = 1 if rich or config.noise_copies == 1 else _within(budget / (x * signal * FEWEST**0.5), 1, most)
    copies = copies if is_auto(given.noise_copies) else given.noise_copies
    fewest = FEWEST if copies > 1 else WITHOUT_COPIES
    steps = _within((budget / (copies * x * signal)) ** 2, fewest, MOST)
    steps = steps if is_auto(given.steps) else given.steps
    batch = tidy(_within(budget / (steps * copies), min(16, facts.count), max(1, LARGEST * facts.count)))
    batch = batch if is_auto(given.logical_batch_size) else given.logical_batch_size
    bought = 100 * share(batch * steps**0.5 / signal)
    return {
        "finetune.logical_batch_size": Choice(
            batch, f"{bought:.0f} % of the signal that this budget can buy from {facts.count:,} images"
        ),
        "finetune.steps": Choice(
            steps, "many small steps: the signal is rich" if rich else "as many as the time allows"
        ),
        "finetune.noise_copies": Choice(
            copies,
            "more steps are worth more than copies here"
            if copies == 1
            else "quieter gradients, at no cost in privacy",
        ),
    }


def _public_steps(config: Config, seconds: Speeds, speeds: Speeds) -> Choices:
    chosen: Choices = {}
    for stage, batch, most in (
        ("query", config.query.batch_size, 9400),
        ("pretrain", config.pretrain.batch_size, 128_000),
        ("warm", config.warm.batch_size, 8000),
    ):
        if stage in seconds:
            steps = tidy(_within(seconds[stage] / (batch * speeds[stage]), 50, most))
            chosen[f"{stage}.steps"] = Choice(
                steps, f"about {batch * steps * speeds[stage] / 60:.1f} minutes"
            )
    return chosen


def _samples(config: Config, facts: Facts, seconds: Speeds, speeds: Speeds) -> Choices:
    # As many images as the set has, if there is time to draw them and to train classifiers on them.
    most = float(min(max(OF_SMALL, facts.count), 50_000))
    if "synthesize" in seconds:
        most = min(most, seconds["synthesize"] / speeds["synthesize"])
    judged = seconds["evaluate"] / speeds["evaluate"] if "evaluate" in seconds else math.inf
    looked_at = judged * EPOCHS / FEW_EPOCHS  # with few looks at each: more images teach more than more looks
    # For each image a real one, and half an image of the pretrained generator (see `rates`), which must not
    # cost any others.
    factor = 1.0 + config.evaluate.ceiling
    with_before = factor + 0.5
    before = looked_at > with_before * most if is_auto(config.evaluate.before) else config.evaluate.before
    factor = with_before if before else factor
    samples = tidy(max(min(most, looked_at / factor), 500.0))
    epochs = min(EPOCHS * judged / (samples * factor), SEEN / samples)
    return {
        "synthesize.samples": Choice(samples, "as many as there is time to draw and to judge"),
        "evaluate.cnn_epochs": Choice(
            _within(epochs, 4, EPOCHS), "of the CNN that judges; more images need fewer looks at each"
        ),
        "evaluate.before": Choice(
            before,
            "the pretrained generator is judged too" if before else "no time to judge another generator",
        ),
    }


def rates(config: Config, facts: Facts) -> Choices:
    """What follows from the steps and samples."""
    samples = config.synthesize.samples
    found: Choices = {
        "evaluate.fidelity_samples": Choice(
            max(10, min(5000, samples // 2)), "enough for a distance, quickly computed"
        ),
    }
    if "finetune" in config.stages:
        # 5e-3 for 60 steps (digits) and 1e-3 for 1,600 (MNIST) of width 8.
        rate = 5e-3 * math.sqrt(FEWEST / max(config.finetune.steps, FEWEST)) * 8 / max(config.model.width, 8)
        found["finetune.learning_rate"] = Choice(
            float(f"{rate:.1g}"), "Adam; falls with the root of the steps"
        )
    return found


def _within(value: float, low: float, high: float) -> int:
    return int(max(low, min(value, high)))


def tidy(number: int | float) -> int:
    """Rounded down to two digits, for people; numbers below 100 stay."""
    scale = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return int(number // scale * scale)
