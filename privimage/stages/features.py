"""Public features of images: those whose mean is matched, and those that a private classifier sees."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.distributed.blocks import in_blocks
from privimage.distributed.world import World
from privimage.families.base import image_shape
from privimage.families.matching import FeatureMap
from privimage.models.edm import to_unit
from privimage.models.label_features import PublicFeatures, field_means
from privimage.models.network_moments import NetworkMoments, Scales, moments_length, pooled
from privimage.models.random_features import RandomFeatures
from privimage.stages.public_set import load_query, public_labels
from privimage.storage.rundir import RunDir

SEEN = 1000  # public images by which features are scaled, at most


def feature_map(config: Config, run_dir: RunDir, world: World) -> FeatureMap:
    """What `match.embedding` names, on the device of the rank, with results in float64.

    Public: it depends on settings, and on the public set where the network does. All ranks call it together.
    Raises UserError if `query` is needed and not finished.
    """
    if config.match.embedding == "random":
        pixels, seed = math.prod(image_shape(config)), public_seed(config, "random features")
        settings = config.match
        return RandomFeatures(
            pixels, settings.features, settings.bandwidth, seed, world.device, torch.float64
        )
    run_dir.require("query")
    network = load_query(config, run_dir, world).network

    def embed(block: Tensor) -> Tensor:
        return pooled(network, to_unit(block))

    width = moments_length(config.query.network, *image_shape(config)[:2]) // 2
    seen = _of_public_images(config, run_dir, world, width, embed)
    # Computed once, since what is drawn later depends on every digit.
    scales = world.broadcast_object(Scales.of(seen) if world.is_main else None)
    return NetworkMoments(network, scales, world.device, torch.float64)


def label_features(config: Config, run_dir: RunDir, world: World) -> PublicFeatures | None:
    """What the private classifier sees beside frequencies, on the CPU, the same on all ranks, which call it
    together; None where it sees no network. Public.

    Raises UserError if `query` is needed and not finished.
    """
    if config.label_network is None:
        return None
    run_dir.require("query")
    body = load_query(config, run_dir, world).network.body()
    shape = image_shape(config)
    with torch.no_grad():
        form = field_means(body, torch.zeros(1, *shape, device=world.device)).shape[1:]

    def embed(block: Tensor) -> Tensor:
        return field_means(body, to_unit(block)).flatten(1)

    seen = _of_public_images(config, run_dir, world, form.numel(), embed).unflatten(1, form)
    found = PublicFeatures.of(config.label_network, body, seen)
    state = world.broadcast_object(found.to_dict() if world.is_main else None)
    return PublicFeatures(**state)


@torch.no_grad()
def _of_public_images(
    config: Config, run_dir: RunDir, world: World, width: int, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `embed` gives, (n, width), for some of the public images uint8 (B, C, H, W)."""
    shape, count = image_shape(config), len(public_labels(run_dir).of_images)
    seen = np.random.default_rng(public_seed(config, "public features")).permutation(count)[:SEEN]
    seen.sort()

    def pixels(start: int, end: int) -> Tensor:
        return torch.from_numpy(store.read(run_dir.public_store, seen[start:end]))

    stopped = "features of public images are computed again"
    return in_blocks(len(seen), shape, width, torch.float32, pixels, embed, world, stopped)
