"""The private classifier: sensitivity of its gradients, its noise, what is charged and what comes of it."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_sets import read_sensitive
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TINY, charges, run_ranks
from scipy import stats

from privimage.config import Config, load
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.families.base import image_shape
from privimage.models.edm import to_unit
from privimage.models.label_features import (
    OF_NETWORK,
    LabelClassifier,
    LabelFeatures,
    PublicFeatures,
    body_of,
    field_means,
)
from privimage.privacy import accounting
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import NoisyGradients
from privimage.privacy.mechanisms.classifier import (
    FEATURE,
    LARGEST_GROUP,
    RESIDUAL,
    Alike,
    gradient_sum,
    images_behind,
    whole_features,
)
from privimage.privacy.plan import make_plan
from privimage.privacy.relation import Relation
from privimage.runs import pipeline
from privimage.runs.release import Release
from privimage.stages import classifier, guidance
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

CLASSIFY = ("classify.use=true", "method=dpdm", "classify.steps=4", "privacy.insecure_fixed_key=7")
STAGE = f"""
import sys
from privimage.config import load
from privimage.runs import pipeline
sys.exit(pipeline.run(load({str(TINY)!r}, sys.argv[2:]), sys.argv[1:2]))
"""


def settings_of(folder: Path, *overrides: str) -> Config:
    return load(TINY, [*CLASSIFY, f"run.dir={folder}", *overrides])


def weights(folder: Path) -> np.ndarray:
    return np.load(folder / "classify" / "weights.npz")["values"]


def seen_by(config: Config) -> LabelClassifier:
    trained = classifier.trained_classifier(config, RunDir(config.run.dir), ALONE)
    return LabelClassifier(trained.state, image_shape(config), ALONE.device)


def planned(folder: Path) -> NoisyGradients:
    plan = read_json(folder / "private" / "account.json")["plan"]
    (one,) = (one for one in plan["mechanisms"] if one["stage"] == "classify")
    return NoisyGradients(**{name: value for name, value in one.items() if name not in ("stage", "relation")})


def of_groups(
    features: torch.Tensor, residuals: torch.Tensor, groups: torch.Tensor, weight: float
) -> torch.Tensor:
    return gradient_sum(features, residuals, Alike(features, groups), weight)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pipeline.run(settings_of(folder), ["classify"]) == 0
    return folder


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 9), st.integers(100, 140)), st.integers(1, 12), st.integers(1, 70),
    st.sampled_from(["noise", "huge", "tiny", "alike", "opposite", "nan", "infinite", "zero"]),
    st.sampled_from([0.0, 0.05]), st.integers(0, 2**31),
)  # fmt: skip
def test_images_of_a_unit_move_the_sum_by_at_most_one(
    size: int, classes: int, d: int, kind: str, weight: float, seed: int
):
    """A unit is an image, or a group of several; sums are integers, and compared as integers."""
    rng = np.random.default_rng(seed)
    features, residuals = rng.normal(size=(size, d)), rng.normal(size=(size, classes)) * 3
    if kind in ("alike", "opposite"):
        features[:], residuals[:] = features[0], residuals[0] / min(1, np.linalg.norm(residuals[0]))
    if kind == "opposite":
        features[::2] *= -1  # gradients that cancel
    elif kind in ("huge", "tiny", "zero"):
        scale = {"huge": 1e300, "tiny": 1e-300, "zero": 0.0}[kind]
        features, residuals = features * scale, residuals * scale
    elif kind in ("nan", "infinite"):
        bad = {"nan": np.nan, "infinite": np.inf}[kind]
        features[0, 0], residuals[-1, 0] = bad, bad
    whole = whole_features(torch.from_numpy(features))
    total = of_groups(whole, torch.from_numpy(residuals), torch.zeros(size, dtype=torch.int64), weight)
    moved = sum(value**2 for value in total.tolist())
    assert moved <= (FEATURE * RESIDUAL) ** -2
    # And the bound is met, but for rounding, by residuals of a norm of 1 and more.
    if kind == "alike" and size <= LARGEST_GROUP and classes > 1 and d > 1:
        assert moved > 0.98 * (FEATURE * RESIDUAL) ** -2


def test_a_sum_is_that_of_its_parts_whatever_fills_the_block():
    rng = torch.Generator().manual_seed(0)
    features = whole_features(torch.randn(12, 30, generator=rng))
    residuals = torch.randn(12, 5, generator=rng, dtype=torch.float64)
    # Groups of 1 to 4 images, which are in one part.
    groups = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4])
    parts = [
        of_groups(features[groups == one], residuals[groups == one], groups[groups == one], 0.05)
        for one in range(5)
    ]
    assert torch.equal(of_groups(features, residuals, groups, 0.05), torch.stack(parts).sum(0))


def test_gradients_of_a_group_are_added_up_and_shortened():
    """Against the gradients themselves: within rounding of the sum, or as long as it may be."""
    rng = torch.Generator().manual_seed(1)
    for size in (1, 2, 5, 16, LARGEST_GROUP):
        features = whole_features(torch.rand(size, 30, generator=rng))
        for scale in (0.01, 0.1, 3.0):
            residuals = scale * torch.randn(size, 5, generator=rng, dtype=torch.float64)
            found = of_groups(features, residuals, torch.zeros(size, dtype=torch.int64), 0.05)
            found = found.double() * FEATURE * RESIDUAL
            residuals = residuals / residuals.norm(dim=1, keepdim=True).clamp(min=1.0)
            exact = torch.cat(
                [(residuals.T @ (features.double() * FEATURE)).flatten(), torch.tensor([0.05 * size])]
            )
            exact = exact / (1 + 0.05**2) ** 0.5
            # Rounding of products is allowed for by n^2 / 2^18.
            assert torch.allclose(found, exact / max(1.0, exact.norm()), rtol=0.03, atol=1e-5), (size, scale)


def test_noise_is_divided_by_the_images_of_all_groups() -> None:
    """Of groups of n images more is left than of one; without noise here."""
    plan = NoisyGradients(noise_multiplier=0.0, count=3, features=4, steps=1, relation=Relation("group"))
    features = whole_features(torch.eye(4, dtype=torch.float64))
    residuals = torch.full((4, 1), 0.2, dtype=torch.float64)
    total = (
        of_groups(features, residuals, torch.tensor([0, 0, 1, 2]), plan.weight).numpy() * FEATURE * RESIDUAL
    )
    assert images_behind(total, plan) == pytest.approx(4, rel=2e-3)
    assert images_behind(0 * total, plan) == 3  # no less than one of each group, whatever noise says
    assert images_behind(total, dataclasses.replace(plan, relation=Relation())) == 3


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_all_steps_together_cost_one_gaussian(steps: int, accountant: str):
    """Of T uses with sqrt(T) times the noise: what `NoisyGradients.composition` stands for."""
    one = accounting.epsilon([SampledGaussian(2.0)], 1e-5, accountant)
    many = accounting.epsilon([SampledGaussian(2.0 * steps**0.5, count=steps)], 1e-5, accountant)
    # PLD sums up on a grid of privacy losses, rounded up.
    assert many == pytest.approx(one, rel=2e-3)


def test_the_ledger_holds_one_use_and_the_release_states_it(undisturbed: Path, tmp_path: Path) -> None:
    plan = planned(undisturbed)
    (used,) = charges(undisturbed)
    assert (used.noise_multiplier, used.count, used.sample_rate) == (plan.noise_multiplier, 1, 1.0)
    folder = tmp_path / "run"
    overrides = ("method=privimage+d", "privacy.insecure_fixed_key=null")
    config = settings_of(folder, *overrides)
    stages = config.stages[: config.stages.index("synthesize")]
    assert stages[-2:] == ("classify", "finetune")
    assert pipeline.run(config, stages) == 0
    # Without its charge nothing is released.
    kept = np.load(folder / "classify" / "weights.npz")
    values, charge = kept["values"], str(kept["charge"])
    np.savez(folder / "classify" / "weights.npz", values=values, charge="ab" * 32)
    assert pipeline.run(config, ["synthesize"]) == 2
    assert not (folder / "release").exists()
    np.savez(folder / "classify" / "weights.npz", values=values, charge=charge)
    assert pipeline.run(config, ["synthesize"]) == 0
    said = read_json(folder / "release" / "PRIVACY.json")
    assert [one["name"] for one in said["mechanisms"]][1] == NoisyGradients.name
    assert said["epsilon"] <= 10
    # The labels of the release are those that the classifier sees.
    release = np.load(folder / "release" / "synthetic.npz")
    of_run = seen_by(config)
    seen = of_run.labels(release["images"])
    assert np.array_equal(release["labels"], seen)
    more, labels = Release(folder).sample(20, seed=3)
    assert np.array_equal(labels, of_run.labels(more))
    changed = read_json(folder / "synthesize" / "done.json")["relabelled"]
    assert changed == pytest.approx((seen != np.arange(len(seen)) % 10).mean())


def test_images_are_led_to_the_class_that_they_are_drawn_for(tmp_path: Path) -> None:
    """And so are those that are drawn later from the released model. 400 images each, of which a tenth and
    three tenths show their class: more than five standard deviations from the limit.
    """
    changed, later = {}, {}
    assert pipeline.run(settings_of(tmp_path / "0"), ["classify", "finetune"]) == 0
    shutil.copytree(tmp_path / "0", tmp_path / "9")
    for weight in (0, 9):
        folder = tmp_path / str(weight)
        config = settings_of(folder, f"synthesize.classifier_guidance={weight}", "synthesize.samples=400")
        assert pipeline.run(config, ["synthesize"]) == 0
        changed[weight] = read_json(folder / "synthesize" / "done.json")["relabelled"]
        _, labels = Release(folder).sample(400, seed=3)
        later[weight] = (labels != np.arange(400) % 10).mean()
    assert changed[9] < changed[0] - 0.05 and later[9] < later[0] - 0.05, (changed, later)


@pytest.mark.parametrize(("limit", "weight"), [(0.0, guidance.WEIGHT), (2.0, 0.0)])
def test_guidance_depends_on_how_often_labels_are_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, weight: float
) -> None:
    """The images, and those drawn later, are made with what is chosen; a run that goes on keeps it."""
    given, left = tmp_path / "given", tmp_path / "left"
    assert pipeline.run(settings_of(given), ["classify", "finetune"]) == 0
    shutil.copytree(given, left)
    assert pipeline.run(settings_of(given, f"synthesize.classifier_guidance={weight}"), ["synthesize"]) == 0
    monkeypatch.setattr(guidance, "MOSTLY_WRONG", limit)
    assert pipeline.run(settings_of(left), ["synthesize"]) == 0
    assert read_json(left / "synthesize" / "guidance.json")["classifier_guidance"] == weight
    images = [np.load(folder / "release" / "synthetic.npz")["images"] for folder in (given, left)]
    assert np.array_equal(*images)
    assert np.array_equal(*(Release(folder).sample(20, seed=3)[0] for folder in (given, left)))
    monkeypatch.setattr(guidance, "MOSTLY_WRONG", 2.0 - limit)
    (left / "synthesize" / "done.json").unlink()
    assert pipeline.run(settings_of(left), ["synthesize"]) == 0
    assert np.array_equal(images[0], np.load(left / "release" / "synthetic.npz")["images"])


def test_two_ranks_choose_the_guidance_and_draw_the_images_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert pipeline.run(settings_of(one), ["classify", "finetune"]) == 0
    shutil.copytree(one.parent, two.parent)
    assert pipeline.run(settings_of(one), ["synthesize"]) == 0
    ended = run_ranks(STAGE, 2, "synthesize", *CLASSIFY, f"run.dir={two}")
    assert [one.status for one in ended] == [0, 0], ended
    chosen = [read_json(folder / "synthesize" / "guidance.json") for folder in (one, two)]
    assert chosen[0] == chosen[1]
    images = [np.load(folder / "release" / "synthetic.npz")["images"] for folder in (one, two)]
    assert np.array_equal(*images)


def test_a_step_adds_the_noise_of_the_plan(tmp_path: Path, fixed_noise: None) -> None:
    """The first step begins at zero, where the gradient is known. Kolmogorov-Smirnov, false-alarm rate 1e-3,
    fixed key.
    """
    two = tmp_path / "two"
    images = read_sensitive(settings_of(two), "train")
    features = whole_features(
        LabelFeatures((1, 8, 8), torch.device("cpu"))(to_unit(torch.from_numpy(images.images)))
    )
    residuals = torch.full((len(features), 10), 0.1, dtype=torch.float64)
    residuals[torch.arange(len(features)), torch.from_numpy(images.labels)] -= 1
    clean = of_groups(features, residuals, torch.arange(len(features)), 0.0)[:-1].view(10, -1).numpy()
    clean = clean * FEATURE * RESIDUAL
    # The mean over the steps of the second half, undone: with 2 steps that of the second alone.
    assert (
        pipeline.run(settings_of(two, "classify.steps=2", "classify.learning_rate=1e-9"), ["classify"]) == 0
    )
    # At a rate of nearly zero the second gradient is the first: -(1 + 1.9) rate clean / N without noise.
    plan = planned(two)
    noisy = -weights(two) / 1e-9 * plan.count
    left = noisy - (2 + classifier.MOMENTUM) * clean
    # Sensitivity 1, two steps.
    deviation = plan.noise_multiplier * 2**0.5 * ((1 + classifier.MOMENTUM) ** 2 + 1) ** 0.5
    assert stats.kstest(left.flatten() / deviation, "norm").pvalue > 1e-3


@pytest.mark.parametrize("method", ["dpdm", "privimage+d"])  # without and with a query network
def test_two_ranks_train_the_classifier_of_one_to_the_bit(tmp_path: Path, method: str) -> None:
    words = [*CLASSIFY, f"method={method}"]
    public = [stage for stage in ("prepare", "query") if method != "dpdm"]
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    if public:
        assert pipeline.run(load(TINY, [*words, f"run.dir={one}"]), public) == 0
        shutil.copytree(one.parent, two.parent)
    assert pipeline.run(load(TINY, [*words, f"run.dir={one}"]), ["classify"]) == 0
    ended = run_ranks(STAGE, 2, "classify", *words, f"run.dir={two}")
    assert [one.status for one in ended] == [0, 0], ended
    assert np.array_equal(weights(two), weights(one))
    of_network = LabelFeatures.count((1, 8, 8), "resnet-small") - LabelFeatures.count((1, 8, 8), None)
    assert of_network > 0
    assert weights(one).shape[1] == LabelFeatures.count((1, 8, 8), None) + len(public[1:]) * of_network


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("shape", "network"),
    [((1, 8, 8), "resnet-small"), ((3, 32, 32), "resnet-small"), ((1, 28, 28), "resnet-small"),
     ((3, 32, 32), "resnet50")],
)  # fmt: skip
def test_what_the_classifier_sees_of_an_image_depends_on_that_image_alone(
    shape: tuple[int, int, int], network: str, mirrored: bool
) -> None:
    """To the bit, in blocks of one size: what stands beside an image must not change what it adds."""
    torch.manual_seed(0)
    body, here = body_of(network, shape[0]), torch.device("cpu")
    rng = np.random.default_rng(0)
    images = to_unit(torch.from_numpy(rng.integers(0, 256, (8, *shape), dtype=np.uint8)))
    public = PublicFeatures.of(network, body, field_means(body, images))
    features = LabelFeatures(shape, here, PublicFeatures(**public.to_dict()), mirrored)
    found = features(images)
    assert found.shape == (8, LabelFeatures.count(shape, network)) and torch.isfinite(found).all()
    others = images.roll(3, 0).clone()
    others[3:] = 0
    assert torch.equal(features(others)[0], features(images.roll(3, 0))[0])
    # One direction of the image's own: a share of the network's, and one of the frequencies.
    own = LabelFeatures.count(shape, None)
    assert torch.allclose(found[:, own:].norm(dim=1), torch.tensor(OF_NETWORK**0.5))
    assert torch.allclose(found.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("mirrored", [False, True])
def test_where_images_may_be_mirrored_the_classifier_knows_no_left_from_right(
    mirrored: bool, tmp_path: Path
) -> None:
    config = settings_of(tmp_path / "run", f"data.flip={mirrored}")
    assert pipeline.run(config, ["classify"]) == 0
    seen = seen_by(config)
    assert seen.features.mirrored == mirrored
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    same = seen.labels(images) == seen.labels(images[:, :, ::-1].copy())
    # Trained on the features that it is asked by: those of the other kind are other weights.
    other = settings_of(tmp_path / "other", f"data.flip={not mirrored}")
    assert pipeline.run(other, ["classify"]) == 0
    assert not np.allclose(weights(tmp_path / "run"), weights(tmp_path / "other"))
    assert same.all() if mirrored else not same.all()


def test_a_killed_training_comes_to_the_same_weights_and_is_charged_once(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "run", []

    def ends(*arguments: object) -> np.ndarray:
        steps.append(1)
        if len(steps) == 3:
            raise UserError("killed")
        return gradient(*arguments)  # type: ignore[arg-type]

    gradient = classifier._gradient
    monkeypatch.setattr(classifier, "_gradient", ends)
    assert pipeline.run(settings_of(folder), ["classify"]) == 2
    assert len(charges(folder)) == 1 and not (folder / "classify" / "weights.npz").exists()
    assert pipeline.run(settings_of(folder), ["classify"]) == 0
    assert sum(one.count for one in charges(folder)) == 1
    assert np.array_equal(weights(folder), weights(undisturbed))


def test_a_lost_classifier_is_not_trained_again(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert pipeline.run(settings_of(folder), ["classify"]) == 0
    (folder / "classify" / "weights.npz").write_bytes(b"damaged")
    (folder / "classify" / "done.json").unlink()
    assert pipeline.run(settings_of(folder), ["classify"]) == 2


def test_labels_that_are_not_there_are_told_before_the_run() -> None:
    with pytest.raises(UserError, match=r"classify.use: there are no labels to learn"):
        load(TINY, ["classify.use=true", "data.sensitive.labelled=false"])


@pytest.mark.parametrize(
    ("method", "has"), [("privimage+d", True), ("dpgan", True), ("dp-merf", False), ("nonpriv", False)]
)
def test_methods_whose_statistics_are_of_each_class_keep_their_labels(method: str, has: bool) -> None:
    config = load(TINY, ["classify.use=true", "classify.max_rise=0.1", f"method={method}"])
    assert ("classify" in config.stages) is has
    kinds = {type(one) for one in make_plan(config, 1437).mechanisms} if config.spec.private else set()
    assert (NoisyGradients in kinds) is (has and config.spec.private)


def test_it_learns_what_there_is_to_learn(tmp_path: Path) -> None:
    """80 % of unseen digits at the noise of epsilon 1 and a rise of a half, a fixed key; chance is 10 %."""
    folder = tmp_path / "run"
    overrides = ("privacy.epsilon=1", "classify.max_rise=0.5", "classify.steps=30")
    assert pipeline.run(settings_of(folder, *overrides), ["classify"]) == 0
    test = read_sensitive(settings_of(folder), "test")
    images = np.ascontiguousarray(np.moveaxis(np.asarray(test.images), 1, -1))
    seen = seen_by(settings_of(folder, *overrides)).labels(images)
    assert (seen == test.labels).mean() > 0.8


def test_an_attack_finds_what_is_claimed_and_no_more() -> None:
    """4,000 trainings, each with or without one image, which the attacker guesses from the weights by a
    threshold between what they are without noise. For a Gaussian mechanism of noise s, the quantiles of right
    and wrong alarms are 1 / s apart at most: they are not more (false-alarm rate 1e-3, Clopper-Pearson), and
    more than half as much: an attack that saw nothing could not find a leak either.
    """
    rng, games, sigma = np.random.default_rng(0), 4000, 0.8
    config = settings_of(Path("unused"), "classify.steps=2", "classify.learning_rate=1e-9")
    others = whole_features(torch.from_numpy(rng.normal(size=(6, 10))))
    canary = whole_features(torch.ones(1, 10))

    def score(there: bool, game: int, noise: float) -> float:
        plan = NoisyGradients(noise_multiplier=noise, count=6, features=10, steps=2)
        features = torch.cat([others, canary if there else torch.zeros_like(canary)])
        block = classifier._Block(features, torch.arange(7), Alike(features, torch.arange(7)))
        account = SimpleNamespace(root=insecure_fixed(game))
        sensitive = SimpleNamespace(account=account, rows=10)
        found = classifier._descended(config, ALONE, sensitive, plan, [block], "name")  # type: ignore[arg-type]
        # The image has label 6, and nearly the largest gradient: at zero all classes are as likely.
        return float(found[6].sum() - 0.1 * found.sum())

    threshold = (score(True, 0, 0.0) + score(False, 0, 0.0)) / 2
    alarms = {
        there: sum(score(there, 2 * game + there, sigma) > threshold for game in range(games // 2))
        for there in (False, True)
    }
    right = stats.beta.ppf(5e-4, alarms[True], games // 2 - alarms[True] + 1)
    wrong = stats.beta.ppf(1 - 5e-4, alarms[False] + 1, games // 2 - alarms[False])
    apart = stats.norm.ppf(right) - stats.norm.ppf(wrong)
    assert 0.5 / sigma < apart <= 1 / sigma
