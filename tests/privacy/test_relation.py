"""Neighbours by replacement and by groups: what the accountant proves, and ledgers of one relation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from ranks import TINY
from scipy.stats import norm

from privimage.config import load
from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian, epsilon, profile
from privimage.privacy.ledger import Ledger, read
from privimage.privacy.mechanisms import DPSGD, MeanEmbedding, SemanticHistogram
from privimage.privacy.plan import make_plan, plan_from_dict
from privimage.privacy.relation import Relation

REPLACE = Relation(neighbours="replace")
GRID = np.linspace(-8, 8, 401)


def density(mean: tuple[float, float], rate: float) -> np.ndarray:
    """Of the output of a step in the plane: noise of deviation 1, around `mean` with probability `rate`."""
    noise = np.outer(norm.pdf(GRID), norm.pdf(GRID))
    return (1 - rate) * noise + rate * np.outer(norm.pdf(GRID - mean[0]), norm.pdf(GRID - mean[1]))


def hockey_stick(p: np.ndarray, q: np.ndarray, value: float) -> float:
    return float(np.maximum(p - np.exp(value) * q, 0).sum() * (GRID[1] - GRID[0]) ** 2)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.4, 1.0])
def test_no_two_contributions_cost_more_than_the_accountant_says(rate: float, value: float) -> None:
    """One step whose unit contributes a vector of norm 1, then another: opposite ones cost the most."""
    stated = float(profile([SampledGaussian(0.5, rate, 1, replacement=True)], np.array([value]))[0])
    worst, first = 0.0, density((1.0, 0.0), rate)
    for angle in np.linspace(0, np.pi, 9):
        for length in (1.0, 0.6):
            second = density((length * np.cos(angle), length * np.sin(angle)), rate)
            found = max(hockey_stick(first, second, value), hockey_stick(second, first, value))
            assert found <= stated + 1e-4
            worst = max(worst, found)
    assert worst == pytest.approx(stated, abs=2e-3)


def test_replacing_a_unit_of_a_plain_gaussian_is_its_sensitivity_doubled() -> None:
    """The noise multiplier is beside the sensitivity, so the cost is the same function of it."""
    for sigma in (0.8, 3.0):
        alone = epsilon([SampledGaussian(sigma)], 1e-5)
        assert epsilon([SampledGaussian(sigma, replacement=True)], 1e-5) == pytest.approx(alone, abs=1e-3)


def test_replacement_costs_more_than_one_more_or_less_and_less_than_both_at_once() -> None:
    """The same noise beside the same clipping bound; removing and adding would be two of the others."""
    one = epsilon([SampledGaussian(3.0, 0.3, 60)], 1e-5)
    replaced = epsilon([SampledGaussian(1.5, 0.3, 60, replacement=True)], 1e-5)
    assert one < replaced < epsilon([SampledGaussian(1.5, 0.3, 60)], 1e-5)


def test_relations_do_not_compose_and_rdp_knows_no_replacement() -> None:
    mixed = [SampledGaussian(2.0), SampledGaussian(2.0, replacement=True)]
    for mechanisms, accountant in ((mixed, "pld"), (mixed[1:], "rdp")):
        with pytest.raises(ValueError, match="do not compose"):
            epsilon(mechanisms, 1e-5, accountant)
    with pytest.raises(UserError, match=r"privacy: accountant: rdp has no bound for neighbours=replace"):
        load(TINY, ["privacy.neighbours=replace"])


@pytest.mark.parametrize(
    ("method", "kind", "grown"),
    [("dpdm", DPSGD, 2.0), ("dp-merf", MeanEmbedding, 2.0), ("privimage+d", SemanticHistogram, 2**0.5)],
)
def test_sensitivity_and_noise_are_those_of_the_relation(method: str, kind: type, grown: float) -> None:
    both = []
    for neighbours in ("add-or-remove", "replace"):
        options = [f"method={method}", f"privacy.neighbours={neighbours}", "privacy.accountant=pld"]
        options += ["finetune.steps=2", "privacy.epsilon=3"]
        plan = make_plan(load(TINY, options), 1437)
        assert plan.spent() <= plan.epsilon and plan_from_dict(plan.to_dict()) == plan
        both.append(plan.the(kind))
    one, replaced = both
    assert replaced.sensitivity == pytest.approx(grown * one.sensitivity)
    assert replaced.standard_deviation > one.standard_deviation
    assert replaced.standard_deviation == replaced.noise_multiplier * replaced.sensitivity
    assert replaced.composition.replacement and not one.composition.replacement


def test_a_mechanism_with_a_sensitivity_for_another_relation_is_refused(monkeypatch) -> None:
    """As a new one would be that knows nothing of relations."""
    draft = SemanticHistogram.draft
    monkeypatch.setattr(
        SemanticHistogram,
        "draft",
        lambda config, count: dataclasses.replace(draft(config, count), relation=Relation()),
    )
    options = ["privacy.neighbours=replace", "privacy.accountant=pld", "select.noise_multiplier=9"]
    with pytest.raises(UserError, match="semantic distribution query has no bound for these"):
        make_plan(load(TINY, [*options, "finetune.steps=1"]), 1437)


PLAN = {"finetune": SampledGaussian(2.0, 0.3, 10)}
REPLACED = {"finetune": SampledGaussian(2.0, 0.3, 10, replacement=True)}


def announce(ledger: Ledger, run: str, plan: dict, relation: Relation) -> None:
    with ledger.announced(run, plan, None, "pld", relation):
        pass


def test_a_ledger_knows_one_relation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "f" * 64)
    announce(ledger, "first", REPLACED, REPLACE)
    ledger.charge("first", "finetune", REPLACED["finetune"].single, "a", 10)
    before = ledger.path.read_bytes()
    for other in (Relation(), Relation(unit="group", neighbours="replace", grouping="a")):
        with pytest.raises(UserError, match=r"privacy\.unit, privacy\.neighbours: .* does not add up"):
            announce(ledger, "second", PLAN, other)
        with pytest.raises(UserError, match="does not add up"):
            ledger.require_room("second", PLAN, None, "pld", other)
    assert ledger.path.read_bytes() == before
    announce(ledger, "third", REPLACED, REPLACE)
    spent = read(ledger.path)
    assert spent.relations == {REPLACE}
    assert spent.mechanisms() == (SampledGaussian(2.0, 0.3, 1, replacement=True),)


def test_other_groups_of_the_same_images_are_another_relation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "f" * 64)
    announce(ledger, "first", PLAN, Relation("group", grouping="a"))
    with pytest.raises(UserError, match="with other groups; what they spend does not add up"):
        announce(ledger, "second", PLAN, Relation("group", grouping="b"))


def test_a_ledger_of_older_versions_promises_for_one_image_more_or_less(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "f" * 64)
    with open(ledger.path, "a") as file:
        file.write('{"run": "old", "plan": {"finetune": [2.0, 0.3, 10]}}\n')
    ledger = Ledger(tmp_path, "f" * 64)
    with pytest.raises(UserError, match="does not add up"):
        announce(ledger, "new", REPLACED, REPLACE)
    announce(ledger, "new", PLAN, Relation())


def test_runs_without_noise_promise_for_no_relation(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "f" * 64)
    announce(ledger, "without", {}, Relation())
    announce(ledger, "replaced", REPLACED, REPLACE)
    announce(ledger, "without again", {}, Relation())
