"""The rules for networks, and for what depends neither on time nor on speed."""

from privimage.recipes.choice import Choice, Choices
from privimage.recipes.facts import Facts
from privimage.recipes.labels import labels_rise
from privimage.recipes.signal import reach
from privimage.recipes.warm_start import warm_rise


def networks(facts: Facts) -> Choices:
    """The generator and the query network."""
    levels = 2 if facts.resolution <= 16 else 3 if facts.resolution <= 40 else 4
    while facts.resolution % 2 ** (levels - 1):
        levels -= 1
    multipliers = {1: [1], 2: [1, 2], 3: [1, 2, 2], 4: [1, 1, 2, 2]}[levels]
    lowest = facts.resolution // 2 ** (levels - 1)
    large = facts.device == "cuda"
    width = 32 if large else 8
    # The total noise grows with the square root of the parameters, that is with the width.
    signal = reach(facts.count, facts.epsilon, facts.delta)
    while width > 8 and 40 * width / signal > 0.11:
        width //= 2
    deep = large and facts.resolution >= 32
    return {
        "model.width": Choice(
            width,
            "the fewer parameters, the less noise on all of them together"
            + ("" if large else ", and the more steps in the same time"),
        ),
        "model.multipliers": Choice(multipliers, f"channels of each level, down to {lowest}x{lowest} pixels"),
        "model.attention": Choice([lowest], "attention where it costs least"),
        "query.network": Choice(
            "resnet50" if deep else "resnet-small",
            "the paper's" if deep else "one that a CPU, or a small image, can train",
        ),
    }


def constants(facts: Facts, begun: bool) -> Choices:
    """What depends neither on time nor on speed; `begun`: pretraining begins with starter weights."""
    large, small = facts.device == "cuda", facts.count <= 5000
    kept = max(1, round(0.05 * facts.public_classes / facts.rows))
    return {
        "query.batch_size": Choice(512 if large else 128, "small batches make many steps"),
        "query.learning_rate": Choice(0.1 if facts.resolution >= 32 else 0.05, "SGD with a cosine schedule"),
        "select.per_image": Choice(kept, "as many votes as classes that are kept, as in the paper"),
        "select.per_class": Choice(
            kept,
            f"about 5 % of the {facts.public_classes} public classes, at least one a class: fewer are better",
        ),
        "select.max_rise": Choice(
            0.05 if small else 0.005,
            "a small set: at 0.005 the query would be too loud"
            if small
            else "the query costs next to nothing",
        ),
        "pretrain.batch_size": Choice(256 if large else 32, "small batches make many steps"),
        "pretrain.learning_rate": Choice(
            5e-4 if large else 2e-3 if begun else 5e-3,
            "Adam; small enough for weights that know something"
            if begun
            else "Adam; narrow networks bear a larger one",
        ),
        "warm.max_rise": Choice(
            warm_rise(facts), "more noise in the private steps, for means of the classes that stand out"
        ),
        "classify.max_rise": Choice(
            labels_rise(facts), "more noise in the training, for a classifier that knows the classes"
        ),
        "finetune.max_grad_norm": Choice(
            0.01, "below the norm of nearly all gradients; Adam removes the scale"
        ),
        "evaluate.cnn_batch_size": Choice(512 if large else 64, "small sets need small batches"),
    }
