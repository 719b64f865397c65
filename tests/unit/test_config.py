"""Settings: validated at the door, mistakes told in one line that names the key, overrides, reading back."""

from pathlib import Path

import pytest

from privimage.config import Config, load, parse
from privimage.errors import UserError
from privimage.rundir import differences

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "experiments")
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert isinstance(load(path), Config)


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
        ("data.sensitive.kind=zip", "data.sensitive.kind: input should be"),
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
    assert (config.privacy.epsilon, config.model.multipliers, config.evaluate.classifiers) == (1.0, (1, 2), ("lr",))
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yaml") == config


def test_every_setting_has_a_sentence_of_help() -> None:
    def walk(section: type, prefix: str) -> None:
        for name, field in section.model_fields.items():
            nested = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(c, "model_fields")]
            if nested:
                walk(nested[0], f"{prefix}{name}.")
            elif prefix:
                assert field.description, f"{prefix}{name}"

    walk(Config, "")


def test_differences_name_the_keys() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [("a.c", 2, 3), ("d", None, 4)]
