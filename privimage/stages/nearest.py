"""Votes of Private Evolution: each sensitive image for the nearest synthetic image of its own class."""

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.data.sensitive import ImageDraws
from privimage.distributed.agreement import all_the_same
from privimage.distributed.blocks import BLOCK, blockwise, made_in_turn
from privimage.distributed.microbatch import block_size
from privimage.distributed.world import World
from privimage.evaluation import extractor
from privimage.families.base import image_shape
from privimage.families.evolution import Population, by_class, places
from privimage.models.edm import to_unit
from privimage.privacy.identity import digest_of, digest_of_tensors
from privimage.stages.noisy_statistic import blocks_of_rank
from privimage.stages.public_set import load_query
from privimage.storage.rundir import RunDir


class Features:
    """Features by which images are compared, those of the query network or of `evolve.features`.

    Each is a function of its image alone. All ranks make it together. Raises UserError for weights that are
    not there, of another kind, or not the same on all ranks.
    """

    def __init__(self, config: Config, run_dir: RunDir, world: World):
        self.device = world.device
        if config.evolve.features == "query":
            run_dir.require("query")
            query = load_query(config, run_dir, world).network
            self.network: nn.Module = query
            self.compute = lambda images: query.features(to_unit(images))
            name = "query"
        else:
            given = extractor.given(config.evolve.features, "evolve.features")
            self.network, name = given.network.to(world.device).eval(), given.features
            # Inception and vision transformers take three channels.
            self.compute = lambda images: self.network(images.expand(-1, 3, -1, -1)).float()
        grey = torch.zeros(1, *image_shape(config), dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            self.width = self.compute(grey).shape[1]
        self.digest = digest_of(name.encode(), digest_of_tensors(self.network.state_dict().values()))
        all_the_same(world, self.digest, "evolve.features: the weights", "give all nodes one file")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, F) of images uint8 (n, C, H, W), n >= 1, in blocks of one size."""
        size = block_size(images.shape, BLOCK)
        found = blockwise(self.compute, images.to(self.device), size=size)
        return torch.cat([features for _, features in found])


class Voters:
    """Features of the sensitive images, for this rank's blocks, and their votes."""

    def __init__(self, features: Features, world: World, sensitive: ImageSet):
        self.features, self.world, self.count = features, world, len(sensitive.images)
        self.rows, self.groups = sensitive.labels, sensitive.groups
        size = block_size(sensitive.images.shape, BLOCK)
        blocks = blocks_of_rank(world, sensitive, np.arange(self.count), size)
        self.own = [(numbers, features(block)) for block, numbers, _ in blocks]

    def vote(self, candidates: Tensor) -> tuple[np.ndarray, float]:
        """Every image's vote, int64 (N, 1): a member of its own class, by features (R, P, F) of all members.

        And the mean distance, for `private/` only.
        """
        # Each rank finds the votes of the sensitive images that it holds; they leave it only as a sum over
        # ranks.
        votes = torch.zeros(self.count, dtype=torch.int64, device=self.world.device)
        total = torch.zeros((), device=self.world.device)
        labels = torch.from_numpy(self.rows).to(self.world.device)
        for numbers, features in self.own:
            votes[numbers], distances = nearest(features, labels[numbers], candidates)
            total += distances.sum()
        return self.world.all_reduce_(votes)[:, None].cpu().numpy(), self.world.all_reduce_(
            total
        ).item() / self.count


def candidates(
    config: Config, features: Features, population: Population, generation: int, world: World
) -> Tensor:
    """What stands for each image of `generation` when images vote: features (R, P, F), equal on all ranks.

    Its own, or with a look-ahead of k the mean of those of k variations, which have the degree of its
    children (Lin et al. 2024).

    Raises Stopped between two blocks: what is lost saw no sensitive image, and is made again.
    """
    rows, members = population.chances.shape
    draws, lookahead = ImageDraws(world.device), config.evolve.lookahead
    total = torch.zeros(rows * members, features.width, device=world.device)
    for number in range(max(lookahead, 1)):

        def of_block(block: Tensor, number: int = number) -> tuple[Tensor]:
            if lookahead:
                return (features(population.ahead(block, draws, generation, number)),)
            return (features(population.images[places(block, rows)]),)

        one = torch.zeros_like(total)
        stopped = f"evolve: saved at iteration {generation}"
        made_in_turn((one,), of_block, config.evolve.batch_size, world, stopped)
        total += one
    return by_class(total / max(lookahead, 1), rows)


def nearest(features: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate of its own class that each image is closest to, int64 (B,) in [0, P), and its distance
    (B,).

    features (B, F), labels int64 (B,) in [0, R), candidates (R, P, F). Each distance is computed on its own,
    not by a product of matrices: rounding there depends on what else is multiplied, and one image could turn
    the vote of another.
    """
    votes = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    distances = torch.zeros(len(features), device=features.device)
    # Images vote within their own class, so that one image changes one bin of one row.
    for label in labels.unique().tolist():
        of_class = labels == label
        distances[of_class], votes[of_class] = torch.cdist(
            features[of_class], candidates[label], compute_mode="donot_use_mm_for_euclid_dist"
        ).min(1)
    return votes, distances
