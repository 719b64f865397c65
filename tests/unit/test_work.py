"""The short measurement behind `privimage plan`."""

import time
from collections.abc import Callable

import pytest
import torch
from ranks import TINY
from torch import Tensor

from privimage.commands import plan
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
    assert sorted(set(forward.sizes)) == [2, 50]
    assert seconds == pytest.approx(1e-3 * 50**-0.5)  # of the last size: overhead is shared by 50 images
    assert forward.dtypes == {torch.float32}


def test_a_slow_pass_is_measured_with_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ENOUGH", 0.0)
    forward = Pass()
    work.seconds_of_a_pass(forward, CPU, "bf16", 50)
    assert set(forward.sizes) == {2} and forward.dtypes == {torch.bfloat16}


def test_no_more_images_than_the_stage_has() -> None:
    forward = Pass()
    work.seconds_of_a_pass(forward, CPU, "fp32", 1)
    assert set(forward.sizes) == {1}


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
        assert (images, most) == (2, 5)
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


class Machine:
    """A clock, and a computation whose time depends on the number of threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: Callable[[int], float]) -> None:
        self.now, self.together, self.seen = 0.0, together, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, images: int) -> Tensor:
        self.seen.append((torch.get_num_threads(), images))
        self.now += 0.01 * images if torch.get_num_threads() == 1 else self.together(images)
        return torch.zeros(images)


@pytest.mark.parametrize(
    ("several", "at_once", "help_", "together", "seconds", "last"),
    [
        # Of two threads that share the work each has as many images as one had in the time.
        (2, 64, True, lambda images: 0.005 * images, 0.005, (2, 26)),
        (2, 8, True, lambda images: 0.005 * images, 0.005, (2, 8)),
        # Threads that begin to wait meanwhile are not taken for work; those that waited are not asked.
        (2, 64, True, lambda images: 1.0, 0.01, (2, 26)),
        (2, 8, True, lambda images: 1.0, 0.01, (2, 8)),
        (2, 64, False, lambda images: 1.0, 0.01, (1, 13)),
        (1, 64, False, lambda images: 1.0, 0.01, (1, 13)),
    ],
)
def test_a_machine_is_as_fast_as_one_thread_or_all(
    several: int,
    at_once: int,
    help_: bool,
    together: Callable[[int], float],
    seconds: float,
    last: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Machine(monkeypatch, together)
    monkeypatch.setattr(work, "threads_help", lambda count: help_)
    with work.threads(several):
        assert work.seconds_an_image(run, 2, at_once) == pytest.approx(seconds)
        assert torch.get_num_threads() == several
    assert [threads for threads, _ in run.seen].count(2) == help_ and run.seen[-1] == last


@pytest.mark.parametrize(("seconds", "help_"), [(0.05, True), (1.0, False)])
def test_threads_help_unless_they_wait_for_each_other(
    seconds: float, help_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Machine(monkeypatch, lambda images: seconds)
    monkeypatch.setattr(work.F, "silu", lambda maps: maps * run(len(maps)).sum())
    work.threads_help.cache_clear()
    try:
        assert work.threads_help(2) is help_
        # One thread has nobody to help it, and is not measured for that.
        before = len(run.seen)
        assert not work.threads_help(1) and len(run.seen) == before
    finally:
        work.threads_help.cache_clear()


def test_a_plan_leaves_the_threads_of_its_process_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook goes on after it. Where threads do not help, one measures."""
    seen = []
    monkeypatch.setattr(plan, "_planned", lambda *_: seen.append(torch.get_num_threads()))
    with work.threads(2):
        for given, help_ in (("null", True), ("null", False), ("3", False)):
            monkeypatch.setattr(plan, "threads_help", lambda count, help_=help_: help_)
            plan.plan_run(load(TINY, [f"runtime.threads={given}"]))
            assert torch.get_num_threads() == 2
    assert seen == [2, 1, 3]
