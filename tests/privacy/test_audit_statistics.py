"""The audit of what a run draws beside its training: canaries in each statistic, and in all of a plan."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from ranks import TINY
from scipy import stats

from privimage.config import Config, load
from privimage.distributed.world import World
from privimage.privacy import audit
from privimage.privacy.accounting import profile
from privimage.privacy.audit_statistics import scores
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import MECHANISMS, ClassMeans, Mechanism, NoisyGradients, SemanticHistogram
from privimage.privacy.plan import PrivacyPlan, make_plan
from privimage.privacy.refutation import EPSILONS, TradeOff, refuted
from privimage.privacy.relation import Relation

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
STATISTICS = [stage for stage in MECHANISMS if stage != "finetune"]
COUNT = 1000


@pytest.fixture
def config() -> Config:
    return load(TINY, ["runtime.threads=1", "select.per_image=3"])


def drafted(stage: str, config: Config, noise: float, relation: Relation | None = None) -> Mechanism:
    mechanism = MECHANISMS[stage].draft(config, COUNT).with_noise(noise)
    return dataclasses.replace(mechanism, relation=relation or mechanism.relation)


def keys(mechanism: Mechanism) -> list[bytes]:
    return audit._keys(mechanism, insecure_fixed(1))


@pytest.mark.parametrize("stage", STATISTICS)
@pytest.mark.parametrize("images", [1, 4])
def test_a_canary_adds_what_a_unit_may_add_and_no_more(stage: str, images: int, config: Config) -> None:
    """Without noise, vectors being a thousand times too long: 1 for a unit, 4 for one that is four of them.

    For the latter votes on their own are 4 in each bin, and so are vectors.
    """
    coins = np.arange(60) % 3 > 0
    for unit, expected in (("image", images), ("group", 1)):
        silent = drafted(stage, config, 0.0, Relation(unit))
        found = scores(silent, coins, images, config, keys(silent))
        # The sums of a group leave some room for the number of its images: 2 % of a vector.
        assert np.allclose(found, np.where(coins, expected, 0), rtol=1e-3 if unit == "image" else 0.025), unit
        assert found.max() <= expected * (1 + 1e-3), unit


@pytest.mark.parametrize("stage", STATISTICS)
def test_where_a_unit_is_replaced_a_canary_is_one_of_two_opposites(stage: str, config: Config) -> None:
    coins = np.arange(60) % 3 > 0
    silent = drafted(stage, config, 0.0, Relation(neighbours="replace"))
    assert np.allclose(scores(silent, coins, 1, config, keys(silent)), np.where(coins, 1, -1), rtol=1e-3)


@pytest.mark.parametrize("stage", STATISTICS)
@pytest.mark.parametrize(("relation", "factor"), [(Relation(), 1), (Relation(neighbours="replace"), 2)])
def test_an_absent_canary_scores_noise_of_the_planned_deviation(
    stage: str, relation: Relation, factor: int, config: Config
) -> None:
    """About 700 numbers against a normal distribution: Kolmogorov-Smirnov, false-alarm rate 1e-3, fixed key.

    Scores are in contributions of a unit; replacement doubles the noise, as the two vectors are opposite or,
    for votes, each has a noise of sqrt(2) and they are subtracted.
    """
    coins = np.arange(1000) % 3 == 0
    mechanism = drafted(stage, config, 1.5, relation)
    found = scores(mechanism, coins, 1, config, keys(mechanism)) - np.where(
        coins, 1, -1 if relation.replacement else 0
    )
    deviation = factor * 1.5 / math.sqrt(mechanism.composition.count)
    assert stats.kstest(found / deviation, "norm").pvalue > 1e-3


@pytest.fixture
def chain() -> tuple[Config, PrivacyPlan]:
    """A run that asks the query, moments and a classifier for as much as the training."""
    shares = ("select.max_rise=0.3", "warm.starts=[moments]", "warm.max_rise=0.6", "classify.max_rise=0.3")
    config = load(TINY, ["runtime.threads=1", "classify.use=true", "privacy.epsilon=4", *shares])
    plan = make_plan(config, COUNT)
    assert len(plan.mechanisms) == 5
    return config, plan


def fallen(config: Config, plan: PrivacyPlan, factor: float = 1.0) -> set[str]:
    """The claims that 600 canaries refute, at confidence 95 % for all of them."""
    root = insecure_fixed(3)
    coins = audit.tossed(config, 600, root)
    found = set()
    for part, scores_of_part in zip(
        audit.parts_of(plan), audit.play(audit.Game(config, plan, root, ALONE, factor), coins), strict=True
    ):
        curve = TradeOff(EPSILONS, profile(part.compositions, EPSILONS))
        made = [(guesses, audit.guess(coins, scores_of_part, guesses)) for guesses in audit.guesses_of(600)]
        level = audit.level_of(plan, part, 0.95)
        if any(refuted(curve, 600, guesses, right, level) for guesses, right in made):
            found.add(part.name)
    return found


def test_the_claim_of_a_whole_plan_stands_and_falls_with_a_tenth_of_the_noise(
    chain: tuple[Config, PrivacyPlan],
) -> None:
    """Fixed keys; with others the first would be a false alarm with probability 0.05 at most."""
    assert not fallen(*chain)
    names = {part.name for part in audit.parts_of(chain[1])}
    assert len(names) == 6 and fallen(*chain, factor=0.1) == names


@pytest.mark.parametrize("kind", [SemanticHistogram, ClassMeans, NoisyGradients])
def test_noise_forgotten_in_one_statistic_is_seen(
    kind: type[Mechanism],
    chain: tuple[Config, PrivacyPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not that of the training: a tenth of the noise of one of the others."""
    right = kind.standard_deviation.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "standard_deviation", property(lambda self: 0.1 * right(self)))
    assert fallen(*chain) - {"all together"} == {kind.name}


def test_a_method_that_trains_nothing_in_private_is_audited_too() -> None:
    config = load(TINY, ["method=dp-merf", "privacy.epsilon=3"])
    plan = make_plan(config, COUNT)
    findings = audit.audit(audit.Game(config, plan, insecure_fixed(3), ALONE), 600, 0.95)
    assert 0.5 < audit.best(findings[-1]).epsilon <= plan.spent()
    assert fallen(config, plan, factor=0.1) == {plan.training.name}
