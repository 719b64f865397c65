"""Recipes: what is chosen for a set and a machine, that it is kept, and what is told of useless runs."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import TINY

from privimage.commands import init
from privimage.config import Config, load, parse
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.families.starter import STAGES, architecture, read
from privimage.families.work import Work
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.calibration import training_noise
from privimage.privacy.mechanisms import ClassMeans, NoisyGradients
from privimage.privacy.plan import make_plan
from privimage.recipes import Facts, automatic, choose, settle, settled
from privimage.recipes.choice import CHOSEN, Choice, applied, is_auto
from privimage.recipes.labels import LEAST_OF_A_CLASS, WANTED, can_be_learned, labels_rise
from privimage.recipes.signal import gaussian_mu, needed, noise_over_signal, reach, share
from privimage.recipes.usefulness import too_little_pretraining, too_little_signal, too_long
from privimage.recipes.warm_start import MOST, NOISE, warm_rise
from privimage.runs import pipeline
from privimage.storage.rundir import RunDir

# Seconds per image of a step, as on two CPU cores at 32x32.
SPEEDS = {"query": 1.5e-3, "pretrain": 4.6e-3, "finetune": 5.4e-3, "synthesize": 0.019, "evaluate": 0.05}


@pytest.fixture
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds as above, for tests of what does not depend on them: a GAN of 32x32 is measured for a minute."""
    works = [Work(stage, 1, 1, seconds, 0.0) for stage, seconds in SPEEDS.items()]
    monkeypatch.setattr(settle, "work_of", lambda *_: works)


def bare(**sections: dict) -> Config:
    """The least that a configuration must say."""
    tree: dict = {
        "run": {"dir": "runs/x"},
        "data": {"resolution": 32, "public": {"kind": "glyphs"}, "sensitive": {"kind": "npz", "path": "x"}},
    }
    return parse(tree | sections)


def recipe(count: int, hours: float, *, eps: float = 10, device: str = "cpu", **speeds: float) -> Config:
    facts = Facts(count, 2, 32, 3, 200, eps, 1e-6, hours, device)
    return applied(bare(), choose(bare(), facts, lambda _: SPEEDS | speeds))


def seconds(config: Config) -> float:
    """The time that the chosen steps take at `SPEEDS`."""
    private, query, pretrain = config.finetune, config.query, config.pretrain
    samples = config.synthesize.samples
    return (
        private.steps * private.logical_batch_size * private.noise_copies * SPEEDS["finetune"]
        + query.steps * query.batch_size * SPEEDS["query"]
        + pretrain.steps * pretrain.batch_size * SPEEDS["pretrain"]
        + samples * SPEEDS["synthesize"]
        + samples
        * (1 + 0.5 * config.evaluate.before + config.evaluate.ceiling)
        * config.evaluate.cnn_epochs
        / 20
        * SPEEDS["evaluate"]
    )


@pytest.mark.parametrize(("eps", "delta"), [(0.1, 1e-5), (1, 1e-5), (10, 1e-4), (1000, 1e-6)])
def test_mu_is_that_of_the_gaussian_mechanism(eps: float, delta: float) -> None:
    assert epsilon((SampledGaussian(1 / gaussian_mu(eps, delta)),), delta) == pytest.approx(eps, rel=2e-3)


@pytest.mark.parametrize(
    ("count", "batch", "steps", "eps", "delta"),
    [(50_000, 16384, 152, 1, 1e-5), (1437, 862, 60, 10, 1e-4), (9000, 2000, 100, 1, 1e-5)],
)
def test_the_signal_in_closed_form_is_near_that_of_the_accountant(
    count: int, batch: int, steps: int, eps: float, delta: float
) -> None:
    sigma = training_noise(eps, delta, SampledGaussian(0.0, batch / count, steps), stated=False)
    most = reach(count, eps, delta)
    assert share(batch * steps**0.5 / most) * most == pytest.approx(steps**0.5 * batch / sigma, rel=0.1)
    assert share(needed(0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [3000, 8000, 200_000])
def test_the_pretrained_generator_is_judged_only_where_that_costs_no_images(count: int) -> None:
    found = set()
    for hours in (0.2, 0.5, 1, 2, 4, 8, 24):
        config = recipe(count, hours)
        facts = Facts(count, 2, 32, 3, 200, 10, 1e-6, hours, "cpu")
        left_out = bare(evaluate={"before": False})
        alone = applied(left_out, choose(left_out, facts, lambda _: SPEEDS)).synthesize.samples
        assert config.synthesize.samples == alone
        found.add(config.evaluate.before)
    assert found == {True, False}


def test_the_more_images_the_cnn_has_the_fewer_looks_it_takes_at_each() -> None:
    """However much time there is: more looks at 25,000 images of MNIST brought nothing, and 8,000 images of a
    set of 1,437 taught more than four times as many looks at 2,000.
    """
    small, large = recipe(2000, 24), recipe(200_000, 24)
    assert small.synthesize.samples == 16_000 and small.evaluate.cnn_epochs == 9
    assert large.synthesize.samples == 50_000 and large.evaluate.cnn_epochs == 4


@pytest.mark.parametrize("hours", [0.2, 0.5, 4])
@pytest.mark.parametrize("count", [300, 3000, 200_000])
def test_a_recipe_fills_the_time_and_not_more(count: int, hours: float) -> None:
    config = recipe(count, hours)
    assert not automatic(config)
    assert seconds(config) < 3600 * hours
    assert config.finetune.logical_batch_size <= 0.6 * count
    if count > 300:  # of so few images no more can be learnt in private; the rest is for pretraining
        assert seconds(config) > 0.5 * 3600 * hours


@pytest.mark.parametrize("method", ["dp-merf", "private-evolution", "dpdm", "nonpriv"])
def test_every_method_has_a_recipe(method: str) -> None:
    config = bare(method=method)
    chosen = choose(config, Facts(3000, 2, 32, 3, 200, 10, 1e-5, 1, "cpu"), lambda _: SPEEDS)
    assert ("finetune.learning_rate" in chosen) == ("finetune" in config.stages)


def test_noise_is_spent_where_it_teaches_most() -> None:
    """Small sets: copies and nine tenths of the signal; large ones: many small steps, as on MNIST."""
    small, large = recipe(3000, 4).finetune, recipe(200_000, 4).finetune
    assert small.noise_copies == 8 and large.noise_copies == 1
    most = reach(3000, 10, 1e-6)
    assert 0.85 < share(small.logical_batch_size * math.sqrt(small.steps) / most) < 0.97
    assert large.steps > 5 * small.steps and large.learning_rate < small.learning_rate
    # Images of a person take the place of copies.
    facts = Facts(3000, 2, 32, 3, 200, 10, 1e-6, 4, "cpu")
    of_persons = bare().model_dump(mode="json")
    of_persons["data"]["sensitive"]["group"], of_persons["privacy"]["unit"] = "person", "group"
    choices = choose(parse(of_persons), facts, lambda _: SPEEDS)
    assert choices["finetune.noise_copies"].value == 2


@pytest.mark.parametrize(
    ("count", "rows", "eps", "wanted"), [(60_000, 10, 1, 0.04), (3000, 2, 10, 0.01), (1437, 10, 1, 0.2)]
)
def test_a_warm_start_costs_what_lets_means_of_classes_stand_out(
    count: int, rows: int, eps: float, wanted: float
) -> None:
    rise = warm_rise(Facts(count, rows, 32, 3, 200, eps, 1e-5, 1, "cpu"))
    assert rise == pytest.approx(wanted, rel=0.5)
    tree = {"warm": {"starts": ["moments"], "max_rise": rise}, "privacy": {"epsilon": eps, "delta": 1e-5}}
    tree["finetune"] = {"logical_batch_size": count // 8, "steps": 100, "noise_copies": 1}
    config = applied(bare(**tree), {"select.max_rise": Choice(0.005, "")})
    deviation = make_plan(config, count).the(ClassMeans).standard_deviation * rows / count
    # Near what is wanted, or as near as a fifth more noise in the private steps brings it.
    assert 0.5 * NOISE < deviation < (2 * NOISE if rise < MOST else 0.1)


@pytest.mark.parametrize(
    ("count", "eps", "rise"), [(60_000, 10, 0.005), (60_000, 1, 0.1), (1437, 10, 0.2), (1437, 1, 0.2)]
)
def test_a_classifier_costs_what_shows_the_labels(count: int, eps: float, rise: float) -> None:
    facts = Facts(count, 10, 28, 1, 100, eps, 1e-5 if count > 5000 else 1e-4, 1, "cpu")
    assert labels_rise(facts) == pytest.approx(rise, rel=0.5) and can_be_learned(facts)
    tree = {"classify": {"use": True, "max_rise": labels_rise(facts)}}
    tree |= {"privacy": {"epsilon": eps, "delta": facts.delta}}
    tree["finetune"] = {"logical_batch_size": count // 8, "steps": 100, "noise_copies": 1}
    chosen = {"select.max_rise": Choice(0.005, ""), "query.network": Choice("resnet-small", "")}
    config = applied(bare(**tree), chosen)
    clearness = count / make_plan(config, count).the(NoisyGradients).standard_deviation
    # As clear as is wanted, or as a fifth more noise in the private steps makes it.
    assert clearness > (0.7 * WANTED if rise < MOST else LEAST_OF_A_CLASS * 10 * 0.7)


def test_labels_that_noise_hides_are_not_learned() -> None:
    assert not can_be_learned(Facts(300, 10, 28, 1, 100, 1, 1e-4, 1, "cpu"))
    assert not can_be_learned(Facts(60_000, 0, 28, 1, 100, 10, 1e-5, 1, "cpu"))  # there are none


def test_what_is_given_is_kept_and_the_rest_suits_it() -> None:
    facts = Facts(3000, 2, 32, 3, 200, 10, 1e-5, 1, "cpu")
    config = bare(finetune={"steps": 33}, model={"width": 16})
    chosen = choose(config, facts, lambda _: SPEEDS)
    assert not {"finetune.steps", "model.width"} & chosen.keys()
    done = applied(config, chosen)
    free = applied(bare(), choose(bare(), facts, lambda _: SPEEDS))
    assert (done.finetune.steps, done.model.width) == (33, 16)
    assert done.finetune.logical_batch_size > free.finetune.logical_batch_size


def test_every_setting_that_may_be_auto_is_chosen() -> None:
    tree = bare().model_dump(mode="json")
    resolved_where_read = {"physical_batch_size", "precision", "features", "classifier_guidance"}
    left = {
        f"{section}.{name}"
        for section, names in CHOSEN.items()
        for name, value in tree[section].items()
        if is_auto(value) and name not in {*names, *resolved_where_read}
    }
    assert not left


def test_values_are_chosen_once_and_kept(tmp_path: Path) -> None:
    """Also where the machine, or the time that is given, is another one when the run goes on."""
    open_ = ["finetune.steps=auto", "finetune.learning_rate=auto", "select.max_rise=auto"]
    words = [f"run.dir={tmp_path / 'run'}", "run.hours=1e-6", *open_]
    pipeline.execute(load(TINY, words), ["prepare"], ALONE)
    first = load(tmp_path / "run" / "config.yaml")
    assert not automatic(first) and first.finetune.logical_batch_size == 64
    again = load(TINY, [*words, "run.hours=2", "data.sensitive.count=10_000"])
    kept = settled(again, ALONE, RunDir(tmp_path / "run"))
    assert (kept.finetune, kept.select) == (first.finetune, first.select)
    # What the run does not use is kept as it was, too.
    assert (kept.warm, kept.classify) == (first.warm, first.classify)
    # The same in a fresh directory would be another choice, for a set of this size on any machine.
    assert settled(again, ALONE, RunDir(tmp_path / "other")).select != first.select


def test_noise_beyond_the_signal_is_told_before_hours_are_spent() -> None:
    def told(eps: float) -> str:
        return " ".join(too_little_signal(load(TINY, [f"privacy.epsilon={eps}"]), 500, 10))

    assert noise_over_signal(66_177, 500, 0.1, 1e-4) > 10
    assert "times the largest signal that 500 images can give" in told(0.1)
    enough = float(re.search(r"From about epsilon ([\d.e+]+) on", told(0.1))[1])  # type: ignore[index]
    assert not told(enough) and told(enough / 2)


def test_a_hopeless_run_is_told_with_what_to_change() -> None:
    from privimage.families.work import Work

    work = [Work("query", 1, 1, 10 * 3600, 0), Work("pretrain", 1, 1, 50 * 3600, 0)]
    config = load(TINY, ["run.hours=5.9"])
    (line,) = too_long(config, work)
    assert "most of it is pretrain (50 hours): leave the settings of pretrain at auto" in line
    assert not [*too_long(config, work, ranks=2)]


@pytest.mark.parametrize(
    ("steps", "resolution", "method", "told"),
    [(959, 32, "privimage+d", True), (960, 32, "privimage+d", False), (959, 16, "privimage+d", False),
     (959, 32, "privimage+g", False), (959, 32, "dpdm", False)],
)  # fmt: skip
def test_pretraining_that_is_too_short_for_an_image_is_told(
    steps: int, resolution: int, method: str, told: bool
) -> None:
    """20 public images for each of 32 x 32 x 3 values are 960 steps of 64; GANs and others are not known."""
    shape = [f"data.resolution={resolution}", "data.channels=3", "model.multipliers=[1,2,2]"]
    config = load(TINY, [f"method={method}", f"pretrain.steps={steps}", "pretrain.batch_size=64", *shape])
    lines = [*too_little_pretraining(config)]
    assert len(lines) == told
    assert not told or "show the network 61,376 public images; it takes 61,440 at least" in lines[0]


@pytest.fixture
def written(capsys: pytest.CaptureFixture, tmp_path: Path) -> Path:
    """A configuration of `init` for a small npz set of two classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 2
    np.savez(tmp_path / "mine.npz", images=images, labels=labels, classes=np.array(["no", "yes"]))
    init.write(init.Wanted(str(tmp_path / "mine.npz"), hours=0.05))
    out, told = capsys.readouterr()
    assert "60 images; 2 classes (no, yes); the first one 8 pixels" in told and "becomes public" in told
    (tmp_path / "mine.yaml").write_text(out)
    return tmp_path / "mine.yaml"


def test_init_writes_a_complete_commented_configuration(written: Path) -> None:
    text, config = written.read_text(), load(written)
    assert not automatic(config)
    sensitive = config.data.sensitive
    assert (config.data.resolution, config.data.channels, sensitive.count, sensitive.classes) == (8, 1, 60, 2)
    lines = [line for line in text.splitlines() if ": " in line and not line.startswith("#")]
    assert all(re.search(r"# \S", line) for line in lines)
    # Every setting of the file is one that counts: none is written twice.
    assert yaml.safe_load(text).keys() <= Config.model_fields.keys()


def test_init_for_persons_counts_persons_and_promises_for_them(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """How many images there are is not public then."""
    deltas = set()
    for images in (60, 90):
        people, labels = np.arange(images) % 20, np.arange(images) % 2
        pixels, classes = np.zeros((images, 8, 8), np.uint8), np.array(["no", "yes"])
        np.savez(tmp_path / "mine.npz", images=pixels, labels=labels, classes=classes, patient=people)
        init.write(init.Wanted(str(tmp_path / "mine.npz"), hours=0.05, group="patient"))
        out, told = capsys.readouterr()
        assert "looked at" in told and "20 groups; 2 classes" in told and f"{images} " not in told
        config = parse(yaml.safe_load(out))
        assert config.privacy.unit == "group" and config.data.sensitive.count == 20
        assert config.data.sensitive.group == "patient" and config.finetune.logical_batch_size <= 20
        deltas.add(config.privacy.delta)
    assert len(deltas) == 1


@pytest.mark.parametrize(
    ("resolution", "channels", "public", "method", "starter"),
    [
        (32, 3, "photographs", "privimage+d", "photos32"),
        (32, 3, "known", "privimage+d", "photos32"),
        (28, 1, None, "privimage+d", "glyphs28"),
        (28, 1, "photographs", "privimage+d", None),  # characters would be a strange beginning for them
        (16, 3, "photographs", "privimage+d", None),  # no networks of that size
        (32, 3, "photographs", "privimage+g", None),
    ],
)
def test_init_begins_with_the_starter_that_suits(
    resolution: int,
    channels: int,
    public: str | None,
    method: str,
    starter: str | None,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    not_measured: None,
) -> None:
    """Where one has the networks that are chosen for a CPU, and knows images of the kind; a start by moments
    is for networks without one. Weights that know all public classes are not trained on.
    """
    (tmp_path / "photographs" / "a").mkdir(parents=True)
    (tmp_path / "known" / "n01443537").mkdir(parents=True)  # a goldfish
    (tmp_path / "sealed").mkdir()
    wanted = init.Wanted(
        str(tmp_path / "sealed"),
        public=str(tmp_path / public) if public else None,
        hours=0.1,
        count=20_000,
        classes="no,yes",
        resolution=resolution,
        channels=channels,
        method=method,
    )
    init.write(wanted)
    config = parse(yaml.safe_load(out := capsys.readouterr().out))
    assert config.warm_starts == (() if starter or method == "privimage+g" else ("moments",))
    # Whether images are mirrored is for the owner to see: who knows that left and right tell classes apart?
    assert f"flip: {str(config.data.flip).lower()} " in out
    assert config.data.flip == (public is not None)
    assert config.query.start_from == config.pretrain.start_from
    assert (config.query.steps == 1) == (starter == "glyphs28" or public == "known")
    begun = config.pretrain.start_from
    assert (begun and begun.name) == starter
    for network in (begun and STAGES) or ():
        key = f"{STAGES[network]}.start_from"
        read(begun, network, key).require(key, architecture(config, network))


@pytest.mark.parametrize(
    ("capable", "precision"), [({"amx_bf16": True}, "bf16"), ({}, "auto"), (None, "auto")]
)
def test_init_computes_in_what_the_cpu_is_fast_in(
    capable: dict | None, precision: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if capable is None:  # as in older versions of torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    init.write(init.Wanted("digits", hours=0.1))
    config = parse(yaml.safe_load(capsys.readouterr().out))
    assert (config.runtime.precision, config.finetune.precision) == (precision, precision)


@pytest.mark.parametrize("method", ["privimage+d", "dpdm", "dp-merf"])
def test_characters_are_mirrored_for_no_method(
    method: str, capsys: pytest.CaptureFixture, not_measured: None
) -> None:
    """Classifiers ask for it where there is no pretraining too."""
    init.write(init.Wanted("digits", hours=0.1, method=method))
    assert not parse(yaml.safe_load(capsys.readouterr().out)).data.flip


@pytest.mark.parametrize(("count", "starts"), [(100, ()), (60_000, ("moments",))])
def test_init_looks_at_nothing_where_all_is_stated(
    count: int, starts: tuple[str, ...], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """And begins with moments only where noise leaves enough of them."""
    (tmp_path / "sealed").mkdir()
    init.write(
        init.Wanted(
            str(tmp_path / "sealed"),
            hours=0.1,
            count=count,
            classes="no,yes",
            resolution=8,
            channels=1,
            method="dpdm",
        )
    )
    out, told = capsys.readouterr()
    config = parse(yaml.safe_load(out))
    sensitive = config.data.sensitive
    assert config.warm_starts == starts
    assert not told and sensitive.count == count and sensitive.classes == ("no", "yes")


@pytest.mark.parametrize(
    ("sensitive", "public", "message"),
    [
        ("nowhere", None, r"nowhere: no such file or folder"),
        ("colours.npz", None, r"--public: colour images need a public set"),
        ("colours.npz", "colours.txt", r"colours.txt: not a folder, and its ending is none of"),
    ],
)
def test_a_mistake_of_init_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sensitive: str, public: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("colours.txt").write_text("")
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez("colours.npz", images=images, labels=np.arange(4) % 2, classes=np.array(["a", "b"]))
    with pytest.raises(UserError, match=message):
        init.write(init.Wanted(sensitive, public))
