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
from privimage.models.semantic import SemanticQuery
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import CentralImages, MeanEmbedding
from privimage.privacy.mechanisms.embedding import QUANTUM
from privimage.privacy.mechanisms.histogram import ONE, vote_counts
from privimage.models.resnet import classifier as network
from privimage.privacy.mechanisms.classifier import FEATURE, RESIDUAL
from privimage.stages import central, classifier, embedding, evolve, select
from privimage.stages.noisy_statistic import Sensitive

config = load(sys.argv[1], ["method=dpdm", "privacy.unit=group", "data.sensitive.group=person"])
world, rows = connect(config.runtime), 3
rng = np.random.default_rng(2)
groups = np.concatenate([rng.integers(0, 60, 500), np.full(200, 60)])
labels = rng.integers(0, rows, 700)
images = rng.integers(0, 256, (700, 1, 8, 8), dtype=np.uint8)
# The group that is left out: half of it is of one image that points where no other does, all of one label.
images[500:600], labels[500:600] = 255, 1
order = rng.permutation(700)
images, labels, groups = images[order], labels[order], groups[order]
torch.manual_seed(3)
query = SemanticQuery(network("resnet-small", 1, 12)).eval()
# What is before the noise: the charge and the noise have tests of their own.
for stage in (embedding, central):
    stage.draw_once = lambda *arguments: arguments[6]("name of the charge")
evolve.load_query = lambda *arguments: query
pictures = torch.from_numpy(rng.integers(0, 256, (rows, 9, 1, 8, 8), dtype=np.uint8))
candidates = SimpleNamespace(images=pictures, public=torch.zeros(rows, 9))
account = SimpleNamespace(root=insecure_fixed(5))
here = SimpleNamespace(require=lambda stage: None)
middle = CentralImages.draft(config, 61)
weights = rng.normal(size=(rows, 17 * 64))  # of a classifier that has learnt something

def statistics(kept):
    found = ImageSet(images[kept], labels[kept], groups[kept], ("a", "b", "c"), "", b"", 61, "x")
    sensitive = Sensitive(found, account, rows)
    votes = select.top_votes(query, found.images, 2, world)
    nearest = evolve.Voters(config, here, world, found).vote(candidates)[0]
    nothing = (config, None, world, sensitive)
    return {
        "votes": vote_counts(votes, found.labels, found.groups, (rows, 12), 2),
        "nearest": vote_counts(nearest, found.labels, found.groups, (rows, 9), 1),
        "embedding": embedding.mean_embedding(*nothing, MeanEmbedding.draft(config, 61), None),
        "central": central.central_means(*nothing, middle, None),
        "gradients": classifier._gradient(world, list(classifier._blocks(config, world, sensitive)), weights),
    }

whole, rest = statistics(np.full(700, True)), statistics(groups != 60)
bounds = {
    "votes": (2 * ONE**2), "nearest": ONE**2, "embedding": int(1 / QUANTUM) ** 2,
    "central": middle.one**2 * middle.values, "gradients": int(1 / (FEATURE * RESIDUAL)) ** 2,
}
shares = {}
for name, value in whole.items():
    moved = [int(one) for one in (value - rest[name]).ravel()]
    shares[name] = [sum(one**2 for one in moved) <= bounds[name], sum(one**2 for one in moved) / bounds[name]]
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
        for name, (bounded, share) in rank["shares"].items():
            # In whole numbers; and it does move them: hundreds of images that count as a good part of one.
            assert bounded and share > 0.02, (name, share)
