"""Groups of images as the unit of the promise.

Adding or removing one, whatever its images, moves what gets noise by no more than one image may.
"""

import copy
import math

import numpy as np
import pytest
import torch
from data_sets import numbered, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TINY
from scipy import stats
from torch import Tensor, nn

from privimage.config import Config, load
from privimage.config.data import SensitiveData
from privimage.data.sensitive import GroupedSet, SensitiveSet
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.families import finetuned_family
from privimage.privacy.gradients import FoldedGradients, clip_and_sum_
from privimage.privacy.groups import GroupLosses
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.mechanisms.embedding import embedding_sum
from privimage.privacy.mechanisms.histogram import ONE, vote_counts
from privimage.privacy.mechanisms.vectors import QUANTUM
from privimage.privacy.plan import make_plan

CPU = torch.device("cpu")
HOSTILE = (0.0, 1.0, -1.0, 1e-30, 1e30, 3e38, -3e38, float("nan"), float("inf"))


@settings(max_examples=5000, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(0, 40),
    st.integers(1, 30), st.sampled_from(["any", "alike", "one bin"]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_group_moves_the_histogram_by_at_most_sqrt_k1(
    k1: int, others: int, rows: int, columns: int, crowd: int, size: int, kind: str, seed: int
) -> None:
    """In whole numbers, to the last bit; whatever its size, its labels and its votes."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate([rng.integers(1, others + 1, crowd), np.zeros(size, np.int64)])
    votes, labels = rng.integers(0, columns, (len(groups), k1)), rng.integers(0, rows, len(groups))
    if kind != "any":
        votes[crowd:], labels[crowd:] = votes[crowd], labels[crowd]
    if kind == "one bin":
        votes[crowd:] = votes[crowd, 0]
    shuffled = rng.permutation(len(groups))
    votes, labels, groups = votes[shuffled], labels[shuffled], groups[shuffled]
    rest = groups != 0
    whole = vote_counts(votes, labels, groups, (rows, columns), k1)
    moved = whole - vote_counts(votes[rest], labels[rest], groups[rest], (rows, columns), k1)
    squares = sum(int(value) ** 2 for value in moved.ravel())
    assert moved.min() >= 0 and squares <= k1 * ONE**2
    # It is as long as that, but for rounding, where the images of the group have all their votes.
    if columns >= k1 and kind != "one bin" and len(set(votes[~rest][0])) == k1:
        assert squares >= k1 * ONE**2 * (1 - 1e-6)


def test_a_group_of_many_alike_has_one_vote_and_one_of_two_minds_shares_it() -> None:
    votes, groups = np.array([[0]] * 7 + [[1], [2], [3]]), np.array([0] * 7 + [1, 1, 2])
    found = vote_counts(votes, np.zeros(10, np.int64), groups, (1, 4), 1)[0] / ONE
    assert found == pytest.approx([1.0, 0.5**0.5, 0.5**0.5, 1.0], abs=1e-8)


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(
    st.integers(0, 12), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3),
    st.sampled_from([1e-3, 1.0, 1e200]), st.lists(st.sampled_from(HOSTILE), max_size=4), st.booleans(),
    st.sampled_from([0.0, 0.2]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_group_moves_the_embedding_by_at_most_1(
    crowd: int,
    size: int,
    width: int,
    rows: int,
    scale: float,
    hostile: list,
    alike: bool,
    weight: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(crowd + size, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, rows, (crowd + size,), generator=generator)
    for place, value in enumerate(hostile):
        features[crowd + place % size, place % width] = value
    if alike:
        features[crowd:], labels[crowd:] = features[crowd].clone(), labels[crowd].clone()
    # The others are groups too, some of several images.
    groups = torch.cat([torch.randint(0, crowd + 1, (crowd,), generator=generator), torch.full((size,), 99)])
    moved = embedding_sum(features, labels, groups, rows, weight) - embedding_sum(
        features[:crowd], labels[:crowd], groups[:crowd], rows, weight
    )
    assert sum(value**2 for value in moved.flatten().tolist()) <= QUANTUM**-2
    # Unit vectors that are alike, or in rows of their own, are one together, but for rounding.
    several = len(labels[crowd:].unique()) == size
    if (alike or several) and not hostile and bool((features[crowd:].norm(dim=1) >= 1).all()):
        assert math.sqrt(sum(v**2 for v in moved.flatten().tolist())) * QUANTUM > 1 - 1e-6


class Squares:
    """Losses of images with one copy each; a gradient that is opposite for other signs of the first pixel."""

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (images[:, None].float() - 127.5, labels[:, None].float())

    def probe(self, count: int) -> tuple[Tensor, ...]:
        return torch.zeros(count, 1, 1, 2, 2), torch.zeros(count, 1)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        # Labels scale an image's loss: up to overflow, and to nothing.
        return tensors[1] * module(tensors[0].flatten(1)).flatten()


def clipped_sum(
    images: np.ndarray, scales: np.ndarray, groups: np.ndarray, m: int, physical: int, bound: float
) -> Tensor:
    """The sum over all groups in physical batches, as the private loop takes them; numbers of groups stay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 1, bias=False))
    losses, gradients = GroupLosses(Squares(), m), FoldedGradients(module, filled_to=physical)
    total = torch.zeros(4, dtype=torch.float64)
    found = SensitiveSet(images, scales, CPU, "device")
    data = GroupedSet(found, groups, m)
    indices = [group for group in range(len(data)) if data.sizes[group]]
    data.begin(indices, physical, seed=7)
    for start in range(0, len(indices), physical):
        *batch, at = data.__getitems__(indices[start : start + physical])
        gradients.backward(losses, *losses.draw(*batch, at, seed=3))
        clip_and_sum_(total, list(module.parameters()), bound)
    return total


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    st.integers(0, 6), st.integers(1, 9), st.integers(1, 5), st.integers(1, 7),
    st.sampled_from([1e-3, 1.0, 50.0]), st.sampled_from(["any", "alike", "cancel", "broken", "empty"]),
    st.sampled_from([0, 1, 10**6, 10**18]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_group_moves_the_clipped_sum_by_at_most_c(
    crowd: int, size: int, m: int, physical: int, bound: float, kind: str, scale: int, seed: int
) -> None:
    """Groups whose images cancel or are all alike, that overflow, or hold black images only."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate([rng.integers(0, max(crowd // 2, 1), crowd), np.full(size, max(crowd // 2, 1))])
    _, groups = np.unique(groups, return_inverse=True)
    images = rng.integers(0, 256, (crowd + size, 1, 2, 2), dtype=np.uint8)
    scales = np.full(crowd + size, scale, np.int64)
    if kind in ("alike", "cancel"):
        images[crowd:] = images[crowd]
    if kind == "cancel":
        images[crowd + size // 2 :] = 255 - images[crowd]
    if kind == "broken":
        scales[crowd] = np.iinfo(np.int64).max
    if kind == "empty":
        scales[crowd:] = 0
    moved = clipped_sum(images, scales, groups, m, physical, bound) - (
        clipped_sum(images[:crowd], scales[:crowd], groups[:crowd], m, physical, bound) if crowd else 0
    )
    assert torch.isfinite(moved).all() and moved.norm() <= bound


@pytest.mark.parametrize("physical", [1, 2, 3, 5, 64])
def test_the_sum_is_the_same_for_any_physical_batches(physical: int) -> None:
    rng = np.random.default_rng(5)
    groups = np.sort(rng.integers(0, 9, 40))
    images, scales = rng.integers(0, 256, (40, 1, 2, 2), dtype=np.uint8), np.ones(40, np.int64)
    whole = clipped_sum(images, scales, groups, 3, 9, 100.0)
    assert torch.allclose(
        clipped_sum(images, scales, groups, 3, physical, 100.0), whole, rtol=1e-5, atol=1e-4
    )


def grouped(groups: list[int], m: int) -> tuple[GroupedSet, np.ndarray]:
    images = numbered(len(groups)).transpose(0, 3, 1, 2).copy()
    return GroupedSet(
        SensitiveSet(images, np.arange(len(groups)), CPU, "device"), np.array(groups), m
    ), images


def test_a_group_has_m_images_all_different_or_each_as_often_as_any_other() -> None:
    data, _ = grouped([1, 0, 1, 1, 2, 2, 1, 1], 3)
    assert len(data) == 3
    seen = set()
    for seed in range(60):
        large, single, pair = data.choose([1, 0, 2], seed).tolist()
        assert len(set(large)) == 3 and set(large) <= {0, 2, 3, 6, 7}
        assert single == [1, 1, 1]
        assert sorted(np.bincount(pair, minlength=6)[[4, 5]]) == [1, 2]
        seen.add(tuple(sorted(large)))
    assert len(seen) == 10  # all choices of 3 of 5: drawn anew in each step


def test_images_of_a_group_are_chosen_alike_often_and_those_of_two_groups_apart() -> None:
    """Chi-squared of all choices of 2 of 4 in order, of one group and of two together; fixed seeds."""
    data, _ = grouped([0, 1] * 4, 2)
    drawn = np.stack([data.choose([0, 1], seed) // 2 for seed in range(12_000)])  # places in the group
    first, second = (drawn[:, group, 0] * 4 + drawn[:, group, 1] for group in (0, 1))
    for found, kinds in ((first, 12), (second, 12), (first * 16 + second, 144)):
        counts = np.unique(found, return_counts=True)[1]
        assert len(counts) == kinds and stats.chisquare(counts).pvalue > 1e-3


def test_what_a_group_gives_depends_on_no_other_group() -> None:
    """The same number and images: the same choice, the same random numbers, the same losses."""
    few, many = grouped([0, 1, 1, 1], 2), grouped([0, 1, 1, 1, 2, 3, 3], 2)
    for seed in range(20):
        alone = few[0].choose([1], seed).tolist()
        assert many[0].choose([1], seed).tolist() == alone == many[0].choose([3, 0, 1], seed)[2:].tolist()
    many[0].begin([3, 1, 0], 2, seed=4)
    first = many[0].__getitems__([3, 1])
    few[0].begin([1], 2, seed=4)
    alone = few[0].__getitems__([1])
    assert torch.equal(first[0][1], alone[0][0]) and first[2].tolist() == [3, 1]
    assert numbers(alone[0][0].numpy()).tolist() == few[0].choose([1], 4)[0].tolist()


GROUPED = (
    "privacy.unit=group",
    "data.sensitive.group=person",
    "data.sensitive.kind=npz",
    "data.sensitive.path=x",
)


@pytest.mark.parametrize("method", ["dpdm", "dpgan"])
def test_images_of_a_group_have_random_numbers_of_their_own(method: str) -> None:
    """m images that are all alike are no copies of one draw, and none depends on the batch."""
    config = load(TINY, [f"method={method}", *GROUPED, "data.sensitive.per_group=3"])
    losses = GroupLosses(finetuned_family(config).private_training(config, 10, ALONE, None).losses, 3)
    images = torch.full((4, 3, 1, 8, 8), 90, dtype=torch.uint8)
    labels, indices = torch.arange(12).view(4, 3) % 10, torch.tensor([5, 0, 2, 9])
    whole = losses.draw(images, labels, indices, seed=11)
    part = losses.draw(images[2:], labels[2:], indices[2:], seed=11)
    copies = 3 * (config.noise_copies if method == "dpdm" else 2)
    for one, other in zip(whole, part, strict=True):
        assert one.shape[:2] == (4, copies) and torch.equal(one[2:], other)
    drawn = whole[3] if method == "dpdm" else whole[0][:, 1::2]  # noise, or fakes
    assert len({tuple(row.flatten().tolist()) for row in drawn[0]}) == drawn.shape[1]
    # Labels are those of the images, each with its copies.
    if method == "dpgan":
        assert whole[1].tolist() == labels.repeat_interleave(2, dim=1).tolist()


def test_the_gradient_of_a_group_is_the_mean_of_those_of_its_images() -> None:
    """Of the real denoiser: clipped once, with the price of as many copies."""
    config = load(TINY, ["method=dpdm", *GROUPED, "data.sensitive.per_group=2", "finetune.label_dropout=0"])
    training = finetuned_family(config).private_training(config, 10, ALONE, None)
    losses = GroupLosses(training.losses, 2)
    images = torch.randint(0, 256, (3, 2, 1, 8, 8), dtype=torch.uint8)
    tensors = losses.draw(images, torch.arange(6).view(3, 2), torch.arange(3), seed=1)
    module = copy.deepcopy(training.module)
    FoldedGradients(module).backward(losses, *tensors)
    of_groups = {name: p.grad_sample for name, p in module.named_parameters()}
    flat = copy.deepcopy(training.module)
    k = config.noise_copies
    FoldedGradients(flat).backward(losses, *(t.reshape(6, k, *t.shape[2:]) for t in tensors))
    for name, p in flat.named_parameters():
        mean = p.grad_sample.view(3, 2, *p.shape).mean(1)
        assert torch.allclose(of_groups[name], mean, rtol=1e-3, atol=1e-5), name


def test_the_plan_of_groups_samples_groups() -> None:
    options = [*GROUPED, "method=dpdm", "data.sensitive.per_group=5", "finetune.logical_batch_size=90"]
    plan = make_plan(load(TINY, options), 300)
    private = plan.the(DPSGD)
    assert (private.count, private.per_group, private.relation.unit) == (300, 5, "group")
    assert plan.delta == 1e-4 and float(private.sample_rate) == 0.3
    assert private.described(private.composition)["images_per_group"] == 5
    assert "each group is in a step" in private.claim
    with pytest.raises(UserError, match="90 is more than the 80 sensitive groups"):
        make_plan(load(TINY, options), 80)


def test_groups_must_be_named() -> None:
    with pytest.raises(UserError, match=r"data\.sensitive\.group: needed"):
        load(TINY, ["privacy.unit=group"])
    assert isinstance(load(TINY, ["data.sensitive.group=2"]).data.sensitive.group, int)
    assert SensitiveData(kind="folder", group="(.*)_").group == "(.*)_"


def test_what_one_image_costs_a_group_of_one_costs(tmp_path) -> None:
    """Same noise, same rate: the price of groups is computing, and that there are fewer of them."""
    of_images: Config = load(TINY, ["method=dpdm"])
    of_groups = load(TINY, ["method=dpdm", *GROUPED])
    first, second = (make_plan(one, 1437).the(DPSGD) for one in (of_images, of_groups))
    assert first.noise_multiplier == second.noise_multiplier
