"""The protocol of DPImageBench (Gong et al. 2025) for its three classifiers, without its choice of an epoch.

The benchmark trains on 55,000 of 60,000 synthetic images and takes the epoch that does best on the others;
older tables take the one that does best on the sensitive *test* images, which is selection on the test set.
Here all images are trained on, and the network of the last epoch counts: nothing is chosen.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from privimage.distributed.world import World
from privimage.evaluation.utility import Labelled, Training, fitted
from privimage.models.benchmark import SIZES, benchmark_classifier
from privimage.models.ema import EMA

DECAY = 0.9999  # of the averaged weights that are judged


@dataclass(frozen=True)
class Recipe:
    """Epochs, images of a step, and after how many epochs the learning rate falls to a fifth."""

    epochs: int
    batch_size: int
    falls_after: int


RECIPES = {"small": Recipe(50, 256, 20), "large": Recipe(200, 126, 60)}


def train(
    name: str,
    size: str,
    images: Labelled,
    n_classes: int,
    *,
    epochs: int | None,
    seed: int,
    world: World,
    label: str,
) -> nn.Module:
    """Train "resnet", "wrn" or "resnext" of `size` "small" or "large"; `epochs` None: those of the benchmark.

    Adam at 0.01 (small) or SGD at 0.1 with momentum 0.9 and weight decay 5e-4 (large), no augmentation.
    Returns the averaged weights after the last epoch, in eval mode. All ranks call it together. Raises
    Stopped when a stop was requested.
    """
    recipe = RECIPES[size]
    epochs = epochs or recipe.epochs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = images.images.shape[1]
        network = benchmark_classifier(name, SIZES[size][name], channels, n_classes).to(world.device)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    if size == "large":
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    # Fewer epochs keep the shape of the schedule.
    falls_after = max(1, round(recipe.falls_after * epochs / recipe.epochs))
    steps_of_epoch = math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, falls_after * steps_of_epoch, gamma=0.2)
    average = EMA(network, DECAY)
    how = Training(epochs, recipe.batch_size, False, seed, world, label)
    fitted(network, images, how, optimizer, schedule, average.update)
    average.copy_to(network)
    return network
