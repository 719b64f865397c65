"""What the whole set adds up to, by groups, on 1 to 4 real gloo processes: votes, embedding, central images,
gradients of the classifier.

The sums before noise are those of one rank to the bit, and one group of many images, which are spread over
all ranks, moves them by no more than one image may.
"""

import json

import pytest
from ranks import TINY, run_ranks

SCRIPT = """
import hashlib, json, sys
from types import SimpleNamespace
import numpy as np, torch
from privimage.config import load
from privimage.data.private_store import ImageSet
from privimage.distributed.world import connect
from privimage.models.label_features import LabelFeatures, PublicFeatures, field_means
from privimage.models.network_moments import NetworkMoments, Scales, pooled
from privimage.models.semantic import SemanticQuery
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import CentralImages, MeanEmbedding
from privimage.privacy.mechanisms.embedding import QUANTUM
from privimage.privacy.mechanisms.histogram import ONE, vote_counts
from privimage.models.resnet import classifier as network
from privimage.privacy.mechanisms.classifier import FEATURE, RESIDUAL
from privimage.stages import central, classifier, embedding, nearest, select
from privimage.stages.features import feature_map
from privimage.stages.noisy_statistic import Sensitive

settings = ["method=dpdm", "privacy.unit=group", "data.sensitive.group=person", "evolve.lookahead=2"]
config = load(sys.argv[1], settings)
world, rows = connect(config.runtime), 3
rng = np.random.default_rng(2)
groups = np.concatenate([rng.integers(0, 60, 500), np.full(200, 60), np.full(90, 61)])
labels = rng.integers(0, rows, 790)
images = rng.integers(0, 256, (790, 1, 8, 8), dtype=np.uint8)
# A group that is left out: half of it is of one image that points where no other does, all of one label.
# Another, of images of all labels.
images[500:600], labels[500:600] = 255, 1
order = rng.permutation(790)
images, labels, groups = images[order], labels[order], groups[order]
torch.manual_seed(3)
query = SemanticQuery(network("resnet-small", 1, 12)).eval()
# What is before the noise: the charge and the noise have tests of their own.
for stage in (embedding, central):
    stage.draw_once = lambda *arguments: SimpleNamespace(values=arguments[6]("name of the charge"))
nearest.load_query = lambda *arguments: query
features = nearest.Features(config, SimpleNamespace(require=lambda stage: None), world)
by_network = load(sys.argv[1], ["method=dpdm", "warm.starts=[embedding]", "match.embedding=network"])
public = torch.rand(99, 1, 8, 8, generator=torch.Generator().manual_seed(4))
random = feature_map(config, None, world)
moments = NetworkMoments(query.network, Scales.of(pooled(query.network, public)), world.device, torch.float64)
pictures = torch.from_numpy(rng.integers(0, 256, (rows, 9, 1, 8, 8), dtype=np.uint8))
ahead = lambda block, draws, generation, number: pictures[block % rows, block // rows] // (1 + number)
population = SimpleNamespace(ahead=ahead, chances=torch.zeros(rows, 9))
candidates = nearest.candidates(config, features, population, 0, world)
account = SimpleNamespace(root=insecure_fixed(5))
middle = CentralImages.draft(config, 61)
body = query.network.body()
seen = PublicFeatures.of("resnet-small", body, field_means(body, 2 * public - 1))
of_labels = LabelFeatures((1, 8, 8), world.device, seen)
# Of a classifier that has learnt something.
weights = rng.normal(size=(rows, LabelFeatures.count((1, 8, 8), "resnet-small")))

def statistics(kept):
    found = ImageSet(images[kept], labels[kept], groups[kept], ("a", "b", "c"), "", b"", 61, "x")
    sensitive = Sensitive(found, account, rows)
    votes = select.top_votes(query, found.images, 2, world)
    closest = nearest.Voters(features, world, found).vote(candidates)[0]
    nothing = (config, None, world, sensitive)
    plans = [MeanEmbedding.draft(one, 61) for one in (config, by_network)]
    return {
        "votes": vote_counts(votes, found.labels, found.groups, (rows, 12), 2),
        "nearest": vote_counts(closest, found.labels, found.groups, (rows, 9), 1),
        "embedding": embedding.embedding_sums(*nothing, plans[0], None, random).values,
        "moments": embedding.embedding_sums(*nothing, plans[1], None, moments).values,
        "central": central.central_means(*nothing, middle, None).values,
        "gradients": classifier._gradient(
            config, world, list(classifier._blocks(config, world, sensitive, of_labels)), weights, 0.05
        ),
    }

whole, rests = statistics(np.full(790, True)), [statistics(groups != one) for one in (60, 61)]
bounds = {
    "votes": (2 * ONE**2), "nearest": ONE**2, "embedding": int(1 / QUANTUM) ** 2,
    "moments": int(1 / QUANTUM) ** 2,
    "central": middle.one**2 * middle.values, "gradients": int(1 / (FEATURE * RESIDUAL)) ** 2,
}
shares = {}
for name, value in whole.items():
    moved = [sum(int(one) ** 2 for one in (value - rest[name]).ravel()) for rest in rests]
    shares[name] = [max(moved) <= bounds[name], *(one / bounds[name] for one in moved)]
digests = {name: hashlib.sha256(np.ascontiguousarray(value)).hexdigest() for name, value in whole.items()}
print(json.dumps({"digests": digests, "shares": shares}))
world.close()
"""


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict]]:
    """What each rank of 1 to 4 says."""
    said = {}
    for size in (1, 2, 3, 4):
        ended = run_ranks(SCRIPT, size, str(TINY))
        assert [rank.status for rank in ended] == [0] * size, ended[0].err[-2000:]
        said[size] = [json.loads(rank.out.splitlines()[-1]) for rank in ended]
    return said


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_over_groups_are_those_of_one_rank_to_the_bit(found: dict[int, list[dict]], size: int) -> None:
    for rank in found[size]:
        assert rank["digests"] == found[1][0]["digests"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_group_that_is_spread_over_the_ranks_moves_them_by_no_more_than_an_image(
    found: dict[int, list[dict]], size: int
) -> None:
    for rank in found[size]:
        for name, (bounded, *shares) in rank["shares"].items():
            # In whole numbers; and it does move them: hundreds of images that count as a good part of one.
            assert bounded and shares[0] > 0.02, (name, shares)
            # Vectors of a group are added up and shortened, not averaged: it counts as one.
            if name in ("embedding", "gradients"):
                assert shares[1] > 0.9, (name, shares)
