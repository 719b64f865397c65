"""The short measurement behind `privimage plan`."""

import time
from collections.abc import Callable

import pytest
import torch
from ranks import TINY
from torch import Tensor

from privimage.config import load
from privimage.distributed.microbatch import activations, block_size, fitting, pieces
from privimage.distributed.precision import resolved
from privimage.distributed.world import World
from privimage.families import base, family, work
from privimage.privacy.plan import make_plan

CPU = torch.device("cpu")


class Pass:
    """A layer of 3 weights, and how it was called."""

    def __init__(self) -> None:
        self.weight = torch.ones(3, 5, requires_grad=True)
        self.sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, images: int) -> Tensor:
        self.sizes.append(images)
        out = torch.ones(images, 3) @ self.weight
        self.dtypes.add(out.dtype)
        return out.square()


def test_a_fast_pass_is_measured_with_the_images_that_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_seconds", lambda forward, images: 1e-3 * len(forward(images)) ** 0.5)
    forward = Pass()
    seconds = work.seconds_of_a_pass(forward, CPU, "fp32", 50)
    assert sorted(set(forward.sizes)) == [8, 50]
    assert seconds == pytest.approx(1e-3 * 50**-0.5)  # of the last size: overhead is shared by 50 images
    assert forward.dtypes == {torch.float32}


def test_a_slow_pass_is_measured_with_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ENOUGH", 0.0)
    forward = Pass()
    work.seconds_of_a_pass(forward, CPU, "bf16", 50)
    assert set(forward.sizes) == {8} and forward.dtypes == {torch.bfloat16}


def test_no_more_images_than_the_stage_has() -> None:
    forward = Pass()
    work.seconds_of_a_pass(forward, CPU, "fp32", 3)
    assert set(forward.sizes) == {3}


def test_activations_are_what_the_backward_pass_keeps() -> None:
    assert (
        activations(Pass(), CPU, "fp32") == 4 * 3 + 4 * 5
    )  # of an image: what the product and the square keep


@pytest.mark.parametrize("method", ["privimage+d", "privimage+g"])
def test_fine_tuning_is_as_long_as_its_private_steps(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    config = resolved(
        load(TINY, [f"method={method}", "finetune.physical_batch_size=5"]), World(0, 0, 1, 1, CPU)
    )
    norms: list[Tensor] = []

    def measured(run: Callable[[int], Tensor], images: int, most: int, patience: float) -> float:
        norms.append(run(3))
        assert (images, most) == (5, 5)
        return 1000.0

    monkeypatch.setattr(base, "seconds_an_image", measured)
    row = next(
        row
        for row in family(config).work(config, make_plan(config, 1437), 10, CPU)
        if row.stage == "finetune"
    )
    assert [len(n) for n in norms] == [3] and (norms[0] > 0).all()  # of the gradient of each image
    assert row.seconds == pytest.approx(
        config.finetune.steps * config.finetune.logical_batch_size * 1000, rel=1e-3
    )  # a GAN's generator adds a trifle


def test_as_many_images_go_through_a_network_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that keeps 32 bytes per image, with room for 100."""
    alone = World(0, 0, 1, 1, CPU)
    monkeypatch.setattr("privimage.telemetry.memory.available", lambda: 5340)
    assert [fitting(wanted, Pass(), "fp32", alone, "query") for wanted in (10, 100, 8192)] == [10, 100, 100]
    monkeypatch.setattr("privimage.telemetry.memory.available", lambda: 1)
    assert fitting(8192, Pass(), "fp32", alone, "query") == 1


def test_pieces_are_even_and_cover_all_images() -> None:
    for count, size in ((10, 3), (10, 10), (10, 20), (1, 1), (7, 2)):
        found = list(pieces(count, size))
        lengths = [piece.stop - piece.start for piece in found]
        assert [i for piece in found for i in range(count)[piece]] == list(range(count))
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


def test_blocks_of_large_images_are_smaller_multiples_of_16() -> None:
    assert [block_size((3, side, side), 128) for side in (8, 32, 64, 96, 128, 256)] == [
        128,
        128,
        128,
        48,
        32,
        16,
    ]
    assert block_size((100, 3, 256, 256), 512) == 32


def test_guidance_by_the_classifier_costs_three_passes_of_what_it_sees_at_each_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, at 5 of the 10 noise levels here; each of the 10 has one pass more. Where images
    may be mirrored, what it sees of the mirror image is one pass more.
    """
    monkeypatch.setattr(work, "seconds_an_image", lambda run, images, at_once: 1e-3)
    work.label_features_pass.cache_clear()
    seconds = {}
    for weight, flip in ((0, False), (2, False), (2, True)):
        words = [
            f"data.flip={flip}",
            "method=dpdm",
            "classify.use=true",
            "classify.max_rise=0.1",
            f"synthesize.classifier_guidance={weight}",
        ]
        words += ["synthesize.sampler_steps=10", "synthesize.samples=50", "synthesize.guidance=0"]
        config = resolved(load(TINY, words), World(0, 0, 1, 1, CPU))
        done = family(config).work(config, make_plan(config, 1000), 10, CPU)
        (seconds[weight, flip],) = (one.seconds for one in done if one.stage == "synthesize")
    work.label_features_pass.cache_clear()
    assert seconds[0, False] == pytest.approx(50 * 10 * 1e-3)
    assert seconds[2, False] == pytest.approx(50 * (10 + 3 * 5) * 1e-3)
    assert seconds[2, True] == pytest.approx(50 * (10 + 4 * 5) * 1e-3)


@pytest.mark.parametrize(("patience", "sizes"), [(1.0, [8]), (2.0, [8, 30])])
def test_a_measurement_ends_in_time_with_as_many_images_as_it_allows(
    patience: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = 0.0, []

    def run(images: int) -> Tensor:
        nonlocal now
        now += images / 128
        seen.append(images)
        return torch.zeros(images)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert work.seconds_an_image(run, 8, 1000, patience) == 1 / 128
    # Twice each: an eighth of a second, which leaves 0.175 of 0.3, or 0.475 of 0.6 for two times 30. Less
    # than twice as many are not tried.
    assert sorted(set(seen)) == sizes
    assert now <= work.ENOUGH * patience


@pytest.mark.parametrize(("threads", "at_once"), [(1, 64), (2, 64), (2, 8)])
def test_threads_that_wait_for_each_other_are_not_taken_for_work(
    threads: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def run(images: int) -> Tensor:
        nonlocal now
        # Of one thread 10 ms an image; two threads wait for a second whatever there is to do.
        now += 0.01 * images if torch.get_num_threads() == 1 else 1.0
        return torch.zeros(images)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    torch.set_num_threads(threads)
    try:
        assert work.seconds_an_image(run, 8, at_once) == pytest.approx(0.01)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
