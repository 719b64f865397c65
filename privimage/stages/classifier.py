"""The private classifier of images: trained once on the sensitive set, then asked about synthetic images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.config import Config
from privimage.distributed import checkpoint
from privimage.distributed.blocks import BLOCK, blockwise
from privimage.distributed.microbatch import block_size
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.families.base import image_shape
from privimage.models.edm import to_unit
from privimage.models.label_features import TEMPERATURE, LabelFeatures, PublicFeatures
from privimage.privacy.identity import digest_of_tensors
from privimage.privacy.mechanisms import NoisyGradients
from privimage.privacy.mechanisms.classifier import (
    FEATURE,
    Alike,
    gradient_sum,
    images_behind,
    noisy_gradient,
    whole_features,
)
from privimage.privacy.mechanisms.vectors import shortened
from privimage.stages.features import label_features
from privimage.stages.noisy_statistic import (
    Drawn,
    Sensitive,
    blocks_of_rank,
    draw_once_by,
    kept,
    noise_key,
)
from privimage.storage.rundir import RunDir

MOMENTUM = 0.9
# A learning rate of 1 for every thousand of N over the noise, as far as steps of 30 bear it: by accuracy on
# 8x8 digits, 28x28 letters and photographs (docs/method-notes.md).
PER_RATE, LARGEST_RATE = 1000.0, 8.0


@dataclass(frozen=True)
class _Block:
    """Sensitive images of some groups as the classifier sees them."""

    features: Tensor  # int16 (B, d)
    labels: Tensor  # int64 (B,)
    alike: Alike


def private_classifier(config: Config, run_dir: RunDir, world: World, sensitive: Sensitive) -> Drawn:
    """The weights, float64 (classes, d), trained and charged once, kept in a file; see `draw_once_by`.

    Started again, a training that was killed comes to the same noise in the same steps. Raises Stopped.
    """
    plan = sensitive.account.plan.the(NoisyGradients)
    public = label_features(config, run_dir, world)
    features = LabelFeatures(image_shape(config), world.device, public, config.data.flip)
    if public is not None and world.is_main:
        checkpoint.save(_features_file(run_dir), public.to_dict())

    def draw(name: str) -> np.ndarray | None:
        # Before it is charged: what fails until then has cost nothing.
        blocks = list(_blocks(config, world, sensitive, features))
        sensitive.account.charge_once(plan, name, world, run_dir.path)
        weights = _descended(config, world, sensitive, plan, blocks, name)
        return weights if world.is_main else None

    inputs = [] if public is None else [digest_of_tensors(public.tensors())]
    return draw_once_by(config, run_dir, world, sensitive, plan, _file(run_dir), draw, inputs)


@dataclass(frozen=True)
class Trained:
    """A classifier, and the name of the charge that it cost."""

    state: dict[str, Any]  # of a `LabelClassifier`, on the CPU
    charge: str


def trained_classifier(config: Config, run_dir: RunDir, world: World) -> Trained:
    """What `private_classifier` has kept.

    Raises UserError while the stage is not finished, and for a damaged file.
    """
    run_dir.require("classify")
    drawn, public = kept(_file(run_dir), world), None
    if config.label_network is not None:
        public = PublicFeatures(**checkpoint.required(_features_file(run_dir), "classify", world)).to_dict()
    weights = torch.from_numpy(drawn.values)
    state = {"weights": weights, "public": public, "mirrored": config.data.flip}
    return Trained(state, drawn.charge)


def _file(run_dir: RunDir) -> Path:
    return run_dir.stage("classify") / "weights.npz"


def _features_file(run_dir: RunDir) -> Path:
    return run_dir.stage("classify") / "features.pt"


def _blocks(config: Config, world: World, sensitive: Sensitive, features: LabelFeatures) -> Iterator[_Block]:
    """This rank's blocks of the sensitive set, in turn with the other ranks."""
    images, size = sensitive.images, block_size(image_shape(config), BLOCK)

    @torch.no_grad()
    def seen(block: Tensor) -> Tensor:
        return whole_features(features(to_unit(block)))

    for block, labels, groups in blocks_of_rank(world, images, images.labels, size):
        found = torch.cat([part for _, part in blockwise(seen, block, size=size)])
        yield _Block(found, labels, Alike(found, groups))


def _descended(
    config: Config, world: World, sensitive: Sensitive, plan: NoisyGradients, blocks: list[_Block], name: str
) -> np.ndarray:
    """Weights float64 (classes, d) after T noisy steps: the mean over the second half of them."""
    weights = np.zeros((sensitive.rows, plan.features))
    velocity, mean = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(plan.steps):
        if stop.agreed(world):
            raise Stopped("classify: it begins again")
        total = _gradient(config, world, blocks, weights, plan.weight)
        if world.is_main:
            key = noise_key(sensitive.account, plan, name, total, step)
            noisy = noisy_gradient(total, plan, config.privacy.noise_source, key)
            images = images_behind(noisy, plan)
            velocity = MOMENTUM * velocity + noisy[:-1].reshape(weights.shape) / images
            weights = weights - (config.classify.learning_rate or learning_rate(plan, images)) * velocity
        weights = world.broadcast_object(weights)
        if step >= plan.steps // 2:
            mean += weights / (plan.steps - plan.steps // 2)
    return mean


def learning_rate(plan: NoisyGradients, images: float) -> float:
    """The more images there are to see through the noise, the longer steps may be; see `PER_RATE`."""
    if not plan.standard_deviation:
        return LARGEST_RATE
    return min(images / plan.standard_deviation / PER_RATE, LARGEST_RATE)


def _gradient(
    config: Config, world: World, blocks: list[_Block], weights: np.ndarray, weight: float
) -> np.ndarray:
    """See `gradient_sum`: that of all images on all ranks, int64."""
    of = TEMPERATURE * FEATURE * torch.from_numpy(weights).to(world.device)
    size = block_size(image_shape(config), BLOCK)
    total = torch.zeros(of.numel() + 1, dtype=torch.int64, device=world.device)

    def residual(features: Tensor, labels: Tensor) -> Tensor:
        # The derivative of the cross-entropy by the logits; the other factor are the features.
        chances = (features.double() @ of.T).softmax(1)
        return shortened(chances - F.one_hot(labels, len(of)))

    for block in blocks:
        parts = blockwise(residual, block.features, block.labels, size=size)
        residuals = torch.cat([found for _, found in parts])
        total += gradient_sum(block.features, residuals, block.alike, weight)
    return world.all_reduce_(total).cpu().numpy()
