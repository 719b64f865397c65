"""The Python interface: the same as the command line, with exceptions in place of exit statuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import REPOSITORY, SMALL, TINY, clean_environment

import privimage
from privimage.commands import sample
from privimage.config import Config
from privimage.runs.release import Release
from privimage.storage.files import read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small finished run, made by the interface."""
    folder = tmp_path_factory.mktemp("api") / "run"
    config = privimage.load_config(TINY, [f"run.dir={folder}", "method=dpdm", *SMALL])
    assert privimage.run(config) == folder
    return folder


def test_a_release_is_opened_with_its_promise(finished: Path) -> None:
    for path in (finished, finished / "release"):
        release = privimage.open_release(path)
        with np.load(finished / "release" / "synthetic.npz") as data:
            assert (release.images == data["images"]).all() and (release.labels == data["labels"]).all()
        assert release.promise == read_json(finished / "release" / "PRIVACY.json")
        assert release.promise["method"] == "dpdm"
        assert release.classes == tuple("0123456789")


def test_more_images_come_from_the_released_model(finished: Path) -> None:
    release = privimage.open_release(finished)
    images, labels = release.sample(7, seed=3)
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8 and labels.tolist() == list(range(7))
    again, other = release.sample(7, seed=3)[0], release.sample(7, seed=4)[0]
    assert (images == again).all() and (images != other).any()


def test_samples_of_the_runs_own_seed_are_not_those_of_the_release(finished: Path) -> None:
    release = privimage.open_release(finished)
    found = release.sample(len(release.labels), seed=0)[0]
    assert not (found == release.images).all((1, 2, 3)).any()


def test_the_command_writes_a_folder_like_that_of_the_release(finished: Path, tmp_path: Path) -> None:
    sample.run(finished, 23, 5, "png,webdataset", tmp_path / "more")
    with np.load(tmp_path / "more" / "synthetic.npz") as data:
        drawn, labels = privimage.open_release(finished).sample(23, seed=5)
        assert (data["images"] == drawn).all() and (data["labels"] == labels).all()
    same = "PRIVACY.json"
    assert (tmp_path / "more" / same).read_bytes() == (finished / "release" / same).read_bytes()
    text = (tmp_path / "more" / "README.md").read_text()
    assert "drawn later from the released model, with seed 5" in text
    assert len(list((tmp_path / "more" / "images").rglob("*.png"))) == 23
    assert not (tmp_path / "more" / "model.pt").exists()
    assert (tmp_path / "more").stat().st_mode & 0o777 == 0o755


def test_mistakes_of_the_command_write_nothing(finished: Path, tmp_path: Path) -> None:
    for formats, out, told in (
        ("gif", tmp_path / "more", "--formats: formats.0"),
        ("", finished, "exists already"),
        ("", tmp_path / "no" / "more", "no such folder"),
    ):
        with pytest.raises(privimage.UserError, match=told):
            sample.run(finished, 3, 5, formats, out)
    assert not list(tmp_path.iterdir())


def test_the_ten_lines_of_the_documentation_load_the_model(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "release.md").read_text()
    block = text.split("## The model in ten lines")[1].split("```python\n")[1].split("```")[0]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == 10
    monkeypatch.chdir(finished)
    names: dict = {}
    exec(block, names)
    assert names["images"].shape == (20, 1, 8, 8) and names["images"].dtype == torch.uint8
    state = torch.load(finished / "release" / "model.pt", weights_only=True)["weights"]
    loaded = names["network"].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    before = (finished / "release" / "synthetic.npz").stat().st_mtime_ns
    config = privimage.load_config(finished / "config.yaml")
    privimage.run(config, ["synthesize"])
    assert (finished / "release" / "synthetic.npz").stat().st_mtime_ns == before


def test_a_script_may_end_with_a_run(tmp_path: Path) -> None:
    """Processes that decode do not run the script again, which asks for nothing like `if __name__`."""
    script = tmp_path / "mine.py"
    settings = [f"run.dir={tmp_path / 'run'}", "data.workers=1"]
    script.write_text(
        f"import privimage\nprint('begun')\n"
        f"privimage.run(privimage.load_config({str(TINY)!r}, {settings!r}), ['prepare'])\n"
    )
    ended = subprocess.run(
        [sys.executable, script], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("begun") == 1
    assert (tmp_path / "run" / "prepare" / "done.json").exists()


def test_mistakes_are_exceptions_of_one_base_class(tmp_path: Path, tiny_config: Config) -> None:
    assert issubclass(privimage.UserError, privimage.PrivImageError)
    assert issubclass(privimage.Stopped, privimage.PrivImageError)
    with pytest.raises(privimage.UserError, match="no such configuration file"):
        privimage.load_config(tmp_path / "none.yaml")
    with pytest.raises(privimage.UserError, match="has no stage match"):
        privimage.run(tiny_config, ["match"])
    with pytest.raises(privimage.UserError, match="no release"):
        privimage.open_release(tmp_path)


def test_a_release_without_a_model_that_can_be_read_has_nothing_to_sample_from(
    finished: Path, tmp_path: Path
) -> None:
    for name in ("PRIVACY.json", "synthetic.npz"):
        (tmp_path / name).write_bytes((finished / "release" / name).read_bytes())
    release = Release(tmp_path)
    assert len(release.images) == len(release.labels)
    with pytest.raises(privimage.UserError, match="no model to sample from"):
        release.sample(1)
    (tmp_path / "model.pt").write_bytes(b"damaged")
    with pytest.raises(privimage.UserError, match="damaged"):
        Release(tmp_path).sample(1)
    # A classifier was a matrix alone once, and did not say whether it sees mirror images too.
    for earlier in (torch.ones(2, 3), {"weights": torch.ones(2, 3), "public": None}):
        state = torch.load(finished / "release" / "model.pt", weights_only=True) | {"classifier": earlier}
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(privimage.UserError, match=r"model\.pt: made by another version"):
            Release(tmp_path).sample(1)


def test_a_plan_is_an_object_that_prints_itself() -> None:
    plan = privimage.plan(privimage.load_config(TINY, ["method=dp-merf", "privacy.delta=0.01"]))
    assert plan.promise.plan.epsilon == 10 and plan.count == 1437 and plan.classes == 10
    assert plan.parameters["generator"] > 0 and [row.stage for row in plan.work] == [
        "match",
        "synthesize",
        "evaluate",
    ]
    text = str(plan)
    assert "noisy mean embedding" in text and "is not below 1/N" in text.replace("\n", " ")
