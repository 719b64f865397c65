"""Settings: validated at the door, mistakes told in one line that names the key, overrides, reading back."""

from pathlib import Path

import pytest

from privimage.config import Config, load, parse
from privimage.errors import UserError
from privimage.storage.rundir import differences

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "experiments"
)
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
TINY = REPOSITORY / "tests" / "tiny.yaml"


@pytest.mark.parametrize("method", ["privimage+d", "privimage+g"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path, method: str) -> None:
    assert isinstance(load(path, [f"method={method}"]), Config)


@pytest.mark.parametrize(
    ("data", "width", "pretrain", "finetune"),
    [
        ("cifar10", 96, (64, 20_000, 5, 2e-4), (16384, 30, 5, 2e-4, 2e-4)),
        ("celeba32", 96, (64, 4_000, 5, 2e-4), (16384, 124, 5, 2e-4, 2e-4)),
        ("celeba64", 64, (64, 4_000, 5, 2e-4), (16384, 124, 2, 2e-4, 5e-4)),
    ],
)
@pytest.mark.parametrize("epsilon", [1, 5, 10])
def test_the_paper_s_files_have_the_constants_of_its_gans(
    data: str, width: int, pretrain: tuple, finetune: tuple, epsilon: int
) -> None:
    """Table 6: batch, steps of the generator, ratio, learning rates; C = 1 and the same promise."""
    path = REPOSITORY / "configs" / "paper" / f"{data}-eps{epsilon}.yaml"
    config, diffusion = load(path, ["method=privimage+g"]), load(path)
    first, then = config.pretrain, config.finetune
    assert (
        config.model.gan_width == width
        and config.privacy == diffusion.privacy
        and config.run.dir != diffusion.run.dir
    )
    assert (
        first.batch_size,
        first.steps // first.discriminator_steps,
        first.discriminator_steps,
        first.learning_rate,
    ) == pretrain
    steps = then.steps // then.discriminator_steps
    assert (
        then.logical_batch_size,
        steps,
        then.discriminator_steps,
        then.generator_learning_rate,
        then.learning_rate,
    ) == finetune
    assert (then.max_grad_norm, config.noise_copies) == (1.0, 1)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("finetune.steps=0", r"finetune\.steps: input should be greater than or equal to 1, not 0"),
        ("finetune.steps=many", r"finetune\.steps: input should be a valid integer"),
        ("model.multipliers=[1,x]", r"model\.multipliers\.1: input should be a valid integer"),
        ("data.workers=-1", r"data\.workers: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_of_a_setting_that_may_be_auto_names_its_key(setting: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(TINY, [setting])


def test_a_gan_has_defaults_of_its_own_which_any_setting_replaces() -> None:
    tree = {
        "run": {"dir": "runs/x"},
        "data": {"resolution": 8, "public": {"kind": "glyphs"}, "sensitive": {"kind": "digits"}},
    }
    diffusion, gan = parse(tree), parse(tree | {"method": "privimage+g", "finetune": {"steps": 7}})
    assert (diffusion.finetune.max_grad_norm, diffusion.pretrain.batch_size, diffusion.noise_copies) == (
        "auto",
        "auto",
        "auto",
    )
    assert (gan.finetune.max_grad_norm, gan.pretrain.batch_size, gan.noise_copies, gan.finetune.steps) == (
        1.0,
        64,
        1,
        7,
    )


def test_the_section_gan_replaces_settings_for_gans_only_and_overrides_replace_it(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(
        TINY.read_text().split("gan:")[0]
        + "gan: {finetune: {steps: 11, max_grad_norm: 2}, model: {width: 24}}\n"
    )
    assert (load(path).finetune.steps, load(path).finetune.max_grad_norm) == (8, 0.01)
    gan = load(path, ["method=dpgan", "finetune.steps=5", "gan.finetune.logical_batch_size=9"])
    assert (
        gan.finetune.steps,
        gan.finetune.max_grad_norm,
        gan.model.width,
        gan.finetune.logical_batch_size,
    ) == (5, 2.0, 24, 9)
    assert gan.finetune.physical_batch_size == 16  # what the section leaves alone is the file's
    (tmp_path / "again.yaml").write_text(gan.to_yaml())
    assert load(tmp_path / "again.yaml") == gan


@pytest.mark.parametrize("method", ["privimage+d", "privimage+g"])
@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("{finetune: {stops: 1}}", "finetune.stops: unknown setting"),
        ("3", "gan: expected sections"),
        ("{finetun: {}}", "finetun: unknown"),
    ],
)
def test_a_mistake_in_the_section_gan_is_told_even_where_it_is_not_used(
    method: str, section: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(QUICKSTART.read_text().split("gan:")[0] + f"gan: {section}\n")
    with pytest.raises(UserError, match=told):
        load(path, [f"method={method}"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetune.noise_copy=3", "finetune.noise_copy: unknown setting (did you mean 'noise_copies'?)"),
        ("privacy.epsilon=0", "privacy.epsilon: input should be greater than 0, not 0"),
        ("privacy.epsilon=-1", "privacy.epsilon: input should be greater than 0"),
        ("privacy.delta=1.5", "privacy.delta: input should be less than 1"),
        ("model.widht=3", "model.widht: unknown setting (did you mean 'width'?)"),
        ("privcy.epsilon=3", "privcy: unknown setting (did you mean 'privacy'?)"),
        ("method=privimage+x", "method: unknown 'privimage+x' (did you mean"),
        ("data.sensitive.kind=floppy", "data.sensitive.kind: input should be"),
        ("finetune.steps=many", "finetune.steps: input should be a valid integer"),
        ("finetune.physical_batch_size=fast", "finetune.physical_batch_size"),
        ("data=3", "data: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load(QUICKSTART, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_setting_a_missing_file_and_bad_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: required setting is missing"):
        parse({"data": {"resolution": 8, "public": {"kind": "glyphs"}, "sensitive": {"kind": "digits"}}})
    with pytest.raises(UserError, match=r"no\.yaml: no such configuration file"):
        load(tmp_path / "no.yaml")
    for text in ("method: [", "- a\n- b\n", "a: b: c"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml: "):
            load(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=r"finetune\.steps: overrides are written section.key=value"):
        load(QUICKSTART, ["finetune.steps"])


def test_overrides_win_and_the_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load(QUICKSTART, ["privacy.epsilon=1", "model.multipliers=[1,2]", "evaluate.classifiers=[lr]"])
    assert (config.privacy.epsilon, config.model.multipliers, config.evaluate.classifiers) == (
        1.0,
        (1, 2),
        ("lr",),
    )
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yaml") == config


def test_every_setting_has_a_sentence_of_help() -> None:
    def walk(section: type, prefix: str) -> None:
        for name, field in section.model_fields.items():
            nested = [
                c
                for c in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if hasattr(c, "model_fields")
            ]
            if nested:
                walk(nested[0], f"{prefix}{name}.")
            elif prefix:
                assert field.description, f"{prefix}{name}"

    walk(Config, "")


def test_differences_name_the_keys() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        ("a.c", 2, 3),
        ("d", None, 4),
    ]
