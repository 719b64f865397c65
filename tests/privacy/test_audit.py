"""The audit.

Its bound holds with the stated confidence and becomes tight, and the whole of it passes, and is able to fail.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, run_ranks
from scipy import stats
from typer.testing import CliRunner

from privimage.cli import app
from privimage.config import Config, load
from privimage.distributed.world import World
from privimage.privacy import audit, dpsgd
from privimage.privacy.accounting import SampledGaussian, epsilon, profile
from privimage.privacy.audit import Game
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import PrivacyPlan
from privimage.privacy.refutation import EPSILONS, Finding, TradeOff, find, refuted
from privimage.privacy.relation import Relation
from privimage.privacy.sampling import poisson_sample

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
# 30 steps at q = 0.3: epsilon 3.40 at delta 1e-4 for noise multiplier 2.
PLAN = PrivacyPlan(
    3.5,
    1e-4,
    "pld",
    (
        DPSGD(
            count=1000,
            logical_batch_size=300,
            steps=30,
            noise_multiplier=2.0,
            max_grad_norm=0.01,
            noise_copies=2,
        ),
    ),
)


def pure(value: float, delta: float = 0.0) -> TradeOff:
    return TradeOff(np.array([value]), np.array([delta]))


def gaussian(*deviations_and_shares: tuple[float, float]) -> TradeOff:
    """The curve of one Gaussian release, or of one whose deviation is drawn first, for all canaries alike,
    and shown.
    """
    deltas = sum(
        share * profile((SampledGaussian(deviation),), EPSILONS) for deviation, share in deviations_and_shares
    )
    return TradeOff(EPSILONS, np.asarray(deltas))


def fewest_refuting(curve: TradeOff, canaries: int, guesses: int, level: float) -> int:
    """The smallest number of right guesses that refutes the curve.

    One more than there are guesses if none does.
    """
    return next(
        (right for right in range(guesses + 1) if refuted(curve, canaries, guesses, right, level)),
        guesses + 1,
    )


@pytest.mark.parametrize("value", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [1, 2, 7, 40])
def test_all_guesses_right_has_the_probability_of_a_chain_of_coins(value: float, guesses: int) -> None:
    """(e^eps / (1 + e^eps))^r for r right guesses of r, worked out by hand from the recursion.

    B / a falls by e^-eps a step.
    """
    chance = (math.exp(value) / (1 + math.exp(value))) ** guesses
    assert refuted(pure(value), guesses, guesses, guesses, chance * 1.0001)
    assert not refuted(pure(value), guesses, guesses, guesses, chance * 0.9999)


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize(("canaries", "guesses"), [(10, 10), (200, 200), (500, 100)])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_randomised_response_is_refuted_no_more_often_than_stated(
    value: float, canaries: int, guesses: int, level: float
) -> None:
    """Each answer is right with probability e^eps / (1 + e^eps).

    The false-alarm rate is a binomial tail, computed exactly.
    """
    needed = fewest_refuting(pure(value), canaries, guesses, level)
    assert stats.binom.sf(needed - 1, guesses, 1 / (1 + math.exp(-value))) <= level


@pytest.mark.parametrize("delta", [0.01, 0.06, 0.2])
def test_a_catastrophe_of_probability_delta_is_not_refuted(delta: float) -> None:
    """With probability delta every coin is shown, else randomised response at epsilon 1.

    This is (1, delta)-DP, exactly.
    """
    needed = fewest_refuting(pure(1.0, delta), 200, 200, 0.05)
    honest = stats.binom.sf(needed - 1, 200, 1 / (1 + math.exp(-1)))
    assert delta * (needed <= 200) + (1 - delta) * honest <= 0.05
    assert refuted(pure(1.0), 200, 200, 200, 0.05)  # without its delta the claim falls


def test_canaries_that_stand_or_fall_together_are_covered() -> None:
    """With probability 0.06 the noise is a tenth, for all at once.

    Then nearly all guesses are right, more often than 0.05 allows to refute.
    """
    assert refuted(gaussian((1.0, 1.0)), 1000, 800, 790, 0.05)
    assert not refuted(gaussian((1.0, 0.94), (0.1, 0.06)), 1000, 800, 800, 0.05)
    assert refuted(gaussian((1.0, 0.97), (0.1, 0.03)), 1000, 800, 800, 0.05)


def bound(found: list[list[Finding]]) -> float:
    """The lower bound on the epsilon of all mechanisms."""
    return audit.best(found[-1]).epsilon


def play_gaussian(rng: np.random.Generator, canaries: int, deviation: float, guesses: int) -> int:
    coins = rng.random(canaries) < 0.5
    return audit.guess(coins, coins + deviation * rng.standard_normal(canaries), guesses)


@pytest.mark.parametrize("share", audit.SHARES)
def test_gaussian_noise_is_refuted_no_more_often_than_stated(share: float) -> None:
    """300 audits of a Gaussian release at level 0.05.

    More than 33 alarms would have probability 1e-5 at most; fixed seed.
    """
    rng, guesses = np.random.default_rng(0), 2 * round(share * 200)
    needed = fewest_refuting(gaussian((1.0, 1.0)), 400, guesses, 0.05)
    alarms = sum(play_gaussian(rng, 400, 1.0, guesses) >= needed for _ in range(300))
    assert alarms <= stats.binom.isf(1e-5, 300, 0.05)
    caught = sum(play_gaussian(rng, 400, 0.3, guesses) >= needed for _ in range(20))
    assert caught == 20


def test_the_bound_becomes_tight() -> None:
    """Randomised response at epsilon 2, the number of right guesses as expected.

    The bound rises towards 2 with their number.
    """
    bounds = []
    for guesses in (100, 1000, 10_000):
        right = round(guesses / (1 + math.exp(-2.0)))
        low, high = 0.0, 5.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (
                (middle, high) if refuted(pure(middle), guesses, guesses, right, 0.05) else (low, middle)
            )
        exact = stats.beta.ppf(
            0.05, right, guesses - right + 1
        )  # Clopper and Pearson: nothing can be tighter than this
        assert low <= math.log(exact / (1 - exact)) + 1e-3
        bounds.append(low)
    assert bounds == sorted(bounds) and bounds[-1] > 1.75
    assert find(PLAN.compositions, 1e-9, 10_000, 10_000, right, 0.05).any_epsilon == pytest.approx(
        bounds[-1], abs=2e-3
    )


def test_the_curve_of_the_mechanism_tells_more_than_one_point() -> None:
    """What refutes (epsilon, delta) refutes every mechanism of the planned kind that has it."""
    for right in (70, 100):
        found = find(PLAN.compositions, PLAN.delta, 500, 100, right, 0.05)
        assert found.any_epsilon <= found.epsilon + 0.02


def test_chance_refutes_nothing() -> None:
    assert find(PLAN.compositions, PLAN.delta, 500, 100, 50, 0.05) == Finding(100, 50, 0.0, 0.0)


@pytest.fixture
def config() -> Config:
    return load(TINY, ["runtime.threads=1"])


def test_a_canary_scores_c_for_each_step_in_which_it_takes_part(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise.

    Its gradient is clipped from 1000 C to C, averaged over its copies, and nothing else touches its
    coordinate.
    """
    root, plan = insecure_fixed(1), PLAN.the(DPSGD)
    samples: list[np.ndarray] = []

    def spy(*arguments) -> np.ndarray:
        samples.append(poisson_sample(*arguments))
        return samples[-1]

    monkeypatch.setattr(dpsgd, "poisson_sample", spy)
    coins = audit.tossed(config, 100, root)
    scores = audit.train(Game(config, PLAN, root, ALONE, noise_factor=0.0), coins)
    present = np.flatnonzero(coins)
    assert len(samples) == plan.steps and max(sample.max() for sample in samples) < len(present)
    parts = np.zeros(100)
    for step in range(plan.steps):
        parts[present[samples[step]]] += 1
    assert np.allclose(scores, parts * plan.max_grad_norm, rtol=1e-4, atol=1e-9)
    assert 30 < len(present) < 70 and parts[present].min() > 0


def test_an_absent_canary_scores_noise_of_the_planned_deviation(config: Config) -> None:
    """About 500 numbers against N(0, T (sigma C)^2): Kolmogorov-Smirnov, false-alarm rate 1e-3, fixed key."""
    coins = audit.tossed(config, 1000, insecure_fixed(2))
    scores = audit.train(Game(config, PLAN, insecure_fixed(2), ALONE), coins)
    assert stats.kstest(scores[~coins] / (2.0 * 0.01 * 30**0.5), "norm").pvalue > 1e-3


def test_the_audit_passes_and_fails_with_a_tenth_of_the_noise(config: Config) -> None:
    """Fixed keys; with others the first would be a false alarm with probability 0.05 at most."""
    claim = epsilon((PLAN.the(DPSGD).composition,), PLAN.delta)
    planned = bound(audit.audit(Game(config, PLAN, insecure_fixed(3), ALONE), 600, 0.95))
    broken = bound(audit.audit(Game(config, PLAN, insecure_fixed(4), ALONE, noise_factor=0.1), 600, 0.95))
    assert 0.5 < planned <= claim < broken


SCRIPT = """
import json
from privimage.config import load
from privimage.distributed.world import connect
from privimage.privacy import audit, dpsgd
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import PrivacyPlan
from ranks import TINY

config = load(TINY, ["runtime.threads=1"])
world = connect(config.runtime)
training = DPSGD(
    count=1000, logical_batch_size=300, steps=30, noise_multiplier=2.0, max_grad_norm=0.01, noise_copies=2
)
plan, root = PrivacyPlan(10.0, 1e-5, "pld", (training,)), insecure_fixed(5)
coins = audit.tossed(config, 600, root)
games = [audit.Game(config, plan, root, world, factor) for factor in (0.0, 1.0)]
found = [audit.train(game, coins).tolist() for game in games]
print(json.dumps(found))
world.close()
"""


def test_several_ranks_are_audited_as_one(config: Config) -> None:
    """Three gloo ranks: the same canaries take part, and the noise has the planned deviation.

    Chi-squared, false-alarm rate 1e-3.
    """
    ended = run_ranks(SCRIPT, 3)
    assert [rank.status for rank in ended] == [0] * 3, ended[0].err[-2000:]
    first, *others = (json.loads(rank.out.splitlines()[-1]) for rank in ended)
    assert all(other == first for other in others)
    silent, scores = (np.array(part) for part in first)
    root = insecure_fixed(5)
    alone = audit.train(Game(config, PLAN, root, ALONE, 0.0), audit.tossed(config, 600, root))
    assert np.allclose(silent, alone, rtol=1e-4, atol=1e-9)
    total = ((scores - silent) ** 2).sum() / (30 * (2.0 * 0.01) ** 2)
    assert stats.chi2.sf(total, 600) > 1e-3 and stats.chi2.cdf(total, 600) > 1e-3


SMALL = ("method=dpdm", "finetune.logical_batch_size=431", "finetune.steps=20", "privacy.epsilon=2")


def test_the_command_touches_neither_data_nor_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "privimage.data.sources.open_sensitive",
        lambda *_, **__: pytest.fail("the audit has read an image set"),
    )
    done = CliRunner().invoke(app, ["audit", str(TINY), *SMALL, "--canaries", "1000"])
    assert done.exit_code == 0, done.output
    assert "the claim stands" in done.output and "the audit sees the breach" in done.output
    assert list(tmp_path.iterdir()) == []


def test_noise_forgotten_in_the_training_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DPSGD, "rank_deviation", lambda self, ranks: 0.1 * self.noise_multiplier * self.max_grad_norm
    )
    done = CliRunner().invoke(app, ["audit", str(TINY), *SMALL, "--canaries", "1000"])
    assert done.exit_code == 1
    assert "the claim is refuted" in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["method=nonprivd"], "method: nonprivd adds no noise"),
        ([*SMALL, "privacy.epsilon=20", "--canaries", "100"], "--canaries: 100 are too few"),
        (["data.sensitive.kind=folder"], "data.sensitive.count"),
    ],
)
def test_what_cannot_be_audited_is_told(arguments: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["audit", str(TINY), *arguments])
    assert done.exit_code != 0 and named in str(done.exception)


def of_groups(per_group: int) -> PrivacyPlan:
    """`PLAN` with groups as the unit, and the same noise."""
    private = dataclasses.replace(PLAN.the(DPSGD), relation=Relation("group"), per_group=per_group)
    return dataclasses.replace(PLAN, mechanisms=(private,))


def test_canaries_of_several_images_refute_a_promise_for_images_and_none_for_groups(config: Config) -> None:
    """The same noise, fixed keys. A promise for images says nothing of 8 of them, and the audit shows it."""
    claim = epsilon((PLAN.the(DPSGD).composition,), PLAN.delta)
    found = {
        unit: bound(audit.audit(Game(config, plan, insecure_fixed(6), ALONE, images=8), 600, 0.95))
        for unit, plan in (("image", PLAN), ("group", of_groups(3)))
    }
    assert 0.5 < found["group"] <= claim < found["image"]


def test_groups_of_canaries_score_c_for_each_step_however_many_their_images(config: Config) -> None:
    """Without noise: the mean over the images of a group, clipped once."""
    root, scores = insecure_fixed(1), []
    for images, per_group in ((1, 1), (8, 3)):
        game = Game(config, of_groups(per_group), root, ALONE, 0.0, images)
        coins = audit.tossed(config, 60, root)
        scores.append(audit.train(game, coins))
    assert np.allclose(scores[0], scores[1], rtol=1e-4) and scores[0][coins].min() > 0


def test_where_a_unit_is_replaced_a_canary_is_one_of_two_opposites(config: Config) -> None:
    private = dataclasses.replace(PLAN.the(DPSGD), relation=Relation(neighbours="replace"))
    plan = dataclasses.replace(PLAN, mechanisms=(private,))
    coins = audit.tossed(config, 60, insecure_fixed(1))
    scores = audit.train(Game(config, plan, insecure_fixed(1), ALONE, noise_factor=0.0), coins)
    assert ((scores > 0) == coins).all() and (scores != 0).all()
    claim = epsilon((private.composition,), PLAN.delta)
    planned = bound(audit.audit(Game(config, plan, insecure_fixed(3), ALONE), 600, 0.95))
    broken = bound(audit.audit(Game(config, plan, insecure_fixed(4), ALONE, noise_factor=0.1), 600, 0.95))
    assert 0.5 < planned <= claim < broken
