"""What a network computes for an image is a function of that image alone.

To the bit, whatever is beside it, and wherever it is.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from privimage.config import load
from privimage.distributed.blocks import BLOCK, blockwise, filled, in_blocks
from privimage.distributed.world import World
from privimage.families.denoising import DiffusionPrivate
from privimage.families.gan import GanPrivate
from privimage.models import vit
from privimage.models.biggan import Generator
from privimage.models.edm import to_unit
from privimage.models.network_moments import NetworkMoments, Scales, pooled
from privimage.models.random_features import RandomFeatures
from privimage.models.resnet import classifier
from privimage.models.semantic import SemanticQuery
from privimage.privacy.batching import CPU_UNIT
from privimage.privacy.gradients import FoldedGradients
from privimage.stages.nearest import nearest
from privimage.stages.select import top_votes

TINY = Path(__file__).parent.parent / "tiny.yaml"
CPU = torch.device("cpu")
ALONE = World(0, 0, 1, 1, CPU)
EIGHT = (1, 8, 8)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def query(clusters: int) -> SemanticQuery:
    torch.manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(clusters, 192)) if clusters else None
    return SemanticQuery(classifier("resnet-small", 1, 50), centroids).eval()


def moments() -> NetworkMoments:
    network = query(0).network
    public = torch.randn(50, *EIGHT, generator=torch.Generator().manual_seed(3))
    return NetworkMoments(network, Scales.of(pooled(network, public)), CPU, torch.float64)


def fakes() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    generator = Generator(8, 1, 10, 16).eval()
    return lambda latents: generator(latents, torch.zeros(len(latents), dtype=torch.int64))


def transformer() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    return vit.VisionTransformer(vit.Size(64, 2, 56, 4, 0, clip=False)).eval()


# Name: network, shape of an input, images in a block.
NETWORKS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...], int]] = {
    "logits": (lambda: query(0), EIGHT, BLOCK),
    "10 clusters": (lambda: query(10), EIGHT, BLOCK),
    "50 clusters": (lambda: query(50), EIGHT, BLOCK),
    "features": (lambda: query(0).network.features, EIGHT, BLOCK),
    "network moments": (moments, EIGHT, BLOCK),
    "random features": (lambda: RandomFeatures(64, 60, 0.5, 0, CPU, torch.float64), EIGHT, BLOCK),
    "wide random features": (
        lambda: RandomFeatures(784, 1000, 0.5, 0, CPU, torch.float64),
        (1, 28, 28),
        BLOCK,
    ),
    "vision transformer": (transformer, (3, 8, 8), 16),
    "generator": (fakes, (80,), 32),
}


@torch.no_grad()
def computed(network: Callable[[Tensor], Tensor], inputs: Tensor, size: int, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return torch.cat([block for _, block in blockwise(network, inputs, size=size)])


@pytest.mark.parametrize(
    ("name", "bf16"),
    [(name, bf16) for name in NETWORKS for bf16 in (False, True) if "random" not in name or not bf16],
)
def test_results_are_those_of_the_image_alone_to_the_bit(name: str, bf16: bool, threads: int) -> None:
    """More images than a block, one place on, in another order, and few of them.

    The last block is never a whole one.
    """
    make, shape, size = NETWORKS[name]
    network, inputs = make(), torch.randn(size + 5, *shape, generator=torch.Generator().manual_seed(1))
    expected = computed(network, inputs, size, bf16)
    assert torch.isfinite(expected).all()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(2))
    for some in (
        order,
        torch.arange(1, len(inputs)),
        torch.tensor([3]),
        torch.arange(size - 3, size + 4),
        order[:11],
    ):
        assert torch.equal(computed(network, inputs[some], size, bf16), expected[some])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, BLOCK + 40),
    st.integers(0, BLOCK + 40),
    st.booleans(),
    st.sampled_from(["logits", "10 clusters"]),
    st.sampled_from([1, 2]),
)
def test_one_image_more_turns_no_other_vote(
    count: int, place: int, spoilt: bool, name: str, number: int
) -> None:
    """Scores whole, not votes alone: a tie within rounding would need a search."""
    torch.set_num_threads(number)
    network, place = NETWORKS[name][0](), place % (count + 1)
    images = torch.randn(count + 1, *EIGHT, generator=torch.Generator().manual_seed(count))
    if spoilt:
        images[place] = float("nan")
    keep = torch.arange(count + 1) != place
    with_it, without = (computed(network, chosen, BLOCK, False) for chosen in (images, images[keep]))
    torch.set_num_threads(1)
    assert torch.equal(with_it[keep], without)


def test_a_large_query_network_too(threads: int) -> None:
    torch.manual_seed(0)
    network, images = classifier("resnet50", 3, 10).eval(), torch.randn(19, 3, 8, 8)
    expected = computed(network, images, 16, False)
    assert torch.equal(computed(network, images.flip(0)[:5], 16, False), expected.flip(0)[:5])


def test_votes_see_whole_blocks_only() -> None:
    seen, images = [], np.random.default_rng(0).integers(0, 256, (BLOCK + 1, *EIGHT), dtype=np.uint8)
    network = query(0)
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    votes = top_votes(network, images, 2, ALONE)
    assert seen == [BLOCK, BLOCK]
    with torch.no_grad():
        assert (
            torch.from_numpy(votes) == network(to_unit(torch.from_numpy(images))).topk(2, dim=1).indices
        ).all()


def test_a_block_is_filled_up_and_the_fill_is_dropped() -> None:
    assert filled(torch.tensor([4, 7]), 4).tolist() == [4, 7, 7, 7]
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} images do not fill a block of 4"):
            filled(torch.zeros(count), 4)
    found = in_blocks(
        BLOCK + 3, EIGHT, 1, torch.int64, torch.arange, lambda block: block[:, None], ALONE, "stopped"
    )
    assert found.flatten().tolist() == list(range(BLOCK + 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.integers(1, 60),
    st.sampled_from([3, 192, 500]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**31),
)
def test_the_nearest_candidate_does_not_depend_on_other_images(
    count: int, members: int, width: int, number: int, seed: int
) -> None:
    """Distances equal to the bit, among candidates within rounding of each other."""
    torch.set_num_threads(number)
    generator = torch.Generator().manual_seed(seed)
    features, labels = (
        torch.randn(count, width, generator=generator),
        torch.randint(0, 2, (count,), generator=generator),
    )
    candidates = torch.randn(2, 1, width, generator=generator) + 1e-6 * torch.randn(
        2, members, width, generator=generator
    )
    votes, distances = nearest(features, labels, candidates)
    order = torch.randperm(count, generator=generator)
    for some in (order, order[: count // 2 + 1], order[:1]):
        again, apart = nearest(features[some], labels[some], candidates)
        assert torch.equal(again, votes[some]) and torch.equal(apart, distances[some])
    torch.set_num_threads(1)


SCALED = {  # the networks of the configurations, with few channels where the tests have little time
    "tiny": [],
    "discriminator": ["method=dpgan"],
    "quickstart": ["finetune.noise_copies=8"],
    "mnist": [
        "data.resolution=28",
        "model.multipliers=[1,2,2]",
        "model.attention=[7]",
        "finetune.noise_copies=1",
    ],
    "cifar10": [
        "data.resolution=32",
        "data.channels=3",
        "model.multipliers=[1,1,1]",
        "model.attention=[16]",
        "finetune.noise_copies=1",
    ],
    "wide discriminator": ["method=dpgan", "data.resolution=32", "data.channels=3", "model.gan_width=8"],
}
LARGE = ("quickstart", "mnist", "cifar10", "wide discriminator")


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SCALED)
def test_filled_up_gradients_are_those_of_the_image_alone_to_the_bit(
    name: str, bf16: bool, threads: int
) -> None:
    """From drawing noise or fakes to gradients, for every size of a batch (of the larger networks for a few),
    at other places.
    """
    precision = f"finetune.precision={'bf16' if bf16 else 'fp32'}"
    config, size = load(TINY, ["run.dir=unused", *SCALED[name], precision]), CPU_UNIT
    training = (GanPrivate if config.method == "dpgan" else DiffusionPrivate)(config, 10, ALONE, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in training.module.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    shape = (size, config.data.channels, config.data.resolution, config.data.resolution)
    images, labels = (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.arange(size) % 10,
    )

    def gradients(some: Tensor) -> Tensor:
        module = copy.deepcopy(training.module)
        FoldedGradients(module, filled_to=size).backward(
            training.losses, *training.losses.draw(images[some], labels[some], some, 77)
        )
        return torch.cat([p.grad_sample.flatten(1) for p in module.parameters()], dim=1)

    everyone = torch.arange(size)
    expected = gradients(everyone)
    assert torch.isfinite(expected).all() and (expected.norm(dim=1) > 0).sum() > size / 2
    for some in [
        everyone[:count].flip(0) for count in ((1, 7, size) if name in LARGE else range(1, size + 1))
    ]:
        assert torch.equal(gradients(some), expected[some]), len(some)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_last_image_that_is_not_finite_does_not_leak_from_the_fill(value: float) -> None:
    config = load(TINY, ["run.dir=unused"])
    training, drawn = DiffusionPrivate(config, 10, ALONE, None), []
    for last in (0.5, value):
        inputs = [
            t.clone()
            for t in training.losses.draw(
                torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5), torch.arange(5), 77
            )
        ]
        inputs[0][-1], inputs[3][-1] = last, last
        module = copy.deepcopy(training.module)
        FoldedGradients(module, filled_to=CPU_UNIT).backward(training.losses, *inputs)
        drawn.append(torch.cat([p.grad_sample.flatten(1) for p in module.parameters()], dim=1))
    assert torch.equal(drawn[0][:4], drawn[1][:4]) and not drawn[1][4].isfinite().all()
