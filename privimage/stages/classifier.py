"""The private classifier of images: trained once on the sensitive set, then asked about synthetic images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.distributed.blocks import BLOCK, blockwise
from privimage.distributed.microbatch import block_size
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.families.base import image_shape
from privimage.models.local_frequencies import LocalFrequencies
from privimage.privacy.mechanisms import NoisyGradients
from privimage.privacy.mechanisms.classifier import FEATURE, RESIDUAL, gradient_sum, whole_features
from privimage.privacy.noise import gaussian
from privimage.stages.noisy_statistic import (
    Drawn,
    Sensitive,
    blocks_of_rank,
    draw_once_by,
    kept,
    noise_key,
)
from privimage.storage.rundir import RunDir

# Logits are TEMPERATURE times the product of weights and features of length 1.
TEMPERATURE, MOMENTUM = 10.0, 0.9
# A learning rate of 1 for every thousand of N over the noise, as far as steps of 30 bear it: by accuracy on
# 8x8 digits, 28x28 letters and photographs (docs/method-notes.md).
PER_RATE, LARGEST_RATE = 1000.0, 8.0


@dataclass(frozen=True)
class _Block:
    """Sensitive images as the classifier sees them, always as many: `_blocks` fills the last one up."""

    features: Tensor  # int16 (B, d); zero for what only fills
    labels: Tensor  # int64 (B,)
    sizes: Tensor  # int64 (B,), of their groups


def private_classifier(config: Config, run_dir: RunDir, world: World, sensitive: Sensitive) -> Drawn:
    """The weights, float64 (classes, d), trained and charged once, kept in a file; see `draw_once_by`.

    Started again, a training that was killed comes to the same noise in the same steps. Raises Stopped.
    """
    plan = sensitive.account.plan.the(NoisyGradients)

    def draw(name: str) -> np.ndarray | None:
        # Before it is charged: what fails until then has cost nothing.
        blocks = list(_blocks(config, world, sensitive))
        sensitive.account.charge_once(plan, name, world, run_dir.path)
        weights = _descended(config, world, sensitive, plan, blocks, name)
        return weights if world.is_main else None

    return draw_once_by(config, run_dir, world, sensitive, plan, _file(run_dir), draw)


def trained_classifier(run_dir: RunDir, world: World) -> Drawn:
    """What `private_classifier` has kept. Raises UserError while the stage is not finished, and for a damaged
    file.
    """
    run_dir.require("classify")
    return kept(_file(run_dir), world)


def _file(run_dir: RunDir) -> Path:
    return run_dir.stage("classify") / "weights.npz"


def _blocks(config: Config, world: World, sensitive: Sensitive) -> Iterator[_Block]:
    """This rank's blocks of the sensitive set, in turn with the other ranks."""
    images, shape = sensitive.images, image_shape(config)
    features, size = LocalFrequencies(shape, world.device), block_size(shape, BLOCK)
    for block, labels, sizes in blocks_of_rank(world, images, images.labels, size):
        ((_, found),) = blockwise(features, block, size=size)
        more = size - len(labels)
        yield _Block(
            torch.nn.functional.pad(whole_features(found), (0, 0, 0, more)),
            torch.nn.functional.pad(labels, (0, more)),
            torch.nn.functional.pad(sizes, (0, more), value=1),
        )


def _descended(
    config: Config, world: World, sensitive: Sensitive, plan: NoisyGradients, blocks: list[_Block], name: str
) -> np.ndarray:
    """Weights float64 (classes, d) after T noisy steps: the mean over the second half of them."""
    rate = config.classify.learning_rate or learning_rate(plan)
    weights = np.zeros((sensitive.rows, plan.features))
    velocity, mean = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(plan.steps):
        if stop.agreed(world):
            raise Stopped("classify: it begins again")
        total = _gradient(world, blocks, weights)
        if world.is_main:
            key = noise_key(sensitive.account, plan, name, total, step)
            noise = gaussian(config.privacy.noise_source, key, total.size, plan.step_deviation)
            noisy = total * (FEATURE * RESIDUAL) + noise.reshape(total.shape)
            velocity = MOMENTUM * velocity + noisy / plan.count
            weights = weights - rate * velocity
        weights = world.broadcast_object(weights)
        if step >= plan.steps // 2:
            mean += weights / (plan.steps - plan.steps // 2)
    return mean


def learning_rate(plan: NoisyGradients) -> float:
    """The more there is to see through the noise, the longer steps may be; see `PER_RATE`."""
    if not plan.standard_deviation:
        return LARGEST_RATE
    return min(plan.count / plan.standard_deviation / PER_RATE, LARGEST_RATE)


def _gradient(world: World, blocks: list[_Block], weights: np.ndarray) -> np.ndarray:
    """The sum of the clipped gradients of all images on all ranks, int64 (classes, d)."""
    of = TEMPERATURE * FEATURE * torch.from_numpy(weights).to(world.device)
    total = torch.zeros(of.shape, dtype=torch.int64, device=world.device)
    for block in blocks:
        # The derivative of the cross-entropy by the logits; the other factor are the features.
        residuals = (block.features.double() @ of.T).softmax(1)
        residuals[torch.arange(len(residuals), device=world.device), block.labels] -= 1
        total += gradient_sum(block.features, residuals, block.sizes)
    return world.all_reduce_(total).cpu().numpy()
