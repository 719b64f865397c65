"""The features whose mean is matched: random ones, or moments of those of the query network."""

import math

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
from privimage.models.network_moments import NetworkMoments, Scales, moments_length, pooled
from privimage.models.random_features import RandomFeatures
from privimage.models.resnet import Classifier
from privimage.stages.public_set import load_query, public_labels
from privimage.storage.rundir import RunDir

SEEN = 1000  # public images by which moments are scaled, at most


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
    return NetworkMoments(network, _scales(config, run_dir, world, network), world.device, torch.float64)


@torch.no_grad()
def _scales(config: Config, run_dir: RunDir, world: World, network: Classifier) -> Scales:
    """Constants from some of the public images, the same on all ranks."""
    shape, count = image_shape(config), len(public_labels(run_dir).of_images)
    seen = np.random.default_rng(public_seed(config, "public features")).permutation(count)[:SEEN]
    seen.sort()

    def pixels(start: int, end: int) -> Tensor:
        return torch.from_numpy(store.read(run_dir.public_store, seen[start:end]))

    def embed(block: Tensor) -> Tensor:
        return pooled(network, to_unit(block))

    width = moments_length(config.query.network, *shape[:2]) // 2
    stopped = "features of public images are computed again"
    features = in_blocks(len(seen), shape, width, torch.float32, pixels, embed, world, stopped)
    # Computed once, since what is drawn later depends on every digit.
    return world.broadcast_object(Scales.of(features) if world.is_main else None)
