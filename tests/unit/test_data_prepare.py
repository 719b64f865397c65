"""The prepare stage: the public set in the run's shape, or the store that was given, checked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, save_npz, source_of

from privimage.config import Config
from privimage.data import beton, store
from privimage.data.transforms import Form
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.stages import prepare
from privimage.storage.rundir import RunDir

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def with_data(config: Config, kind: str, path: Path | None, **more) -> Config:
    public = config.data.public.model_copy(update={"kind": kind, "path": path})
    return config.model_copy(update={"data": config.data.model_copy(update={"public": public, **more})})


def prepared(config: Config) -> dict:
    return prepare.run(config, RunDir(config.run.dir), ALONE)


@pytest.mark.parametrize("kind", ["npy", "beton", "auto"])
def test_the_public_set_is_brought_to_the_shape_of_the_run(
    tiny_config: Config, tmp_path: Path, kind: str
) -> None:
    if kind == "beton" and (missing := beton.ffcv_missing()):
        pytest.skip(missing)
    path = save_npz(
        tmp_path / "set.npz",
        numbered(30, resolution=20, channels=3),
        np.arange(30) % 3,
        classes=np.array(["x", "y", "z"]),
    )
    record = prepared(with_data(tiny_config, "npz", path, store=kind, resolution=16))
    assert (record["images"], record["count"], record["classes"]) == (30, 30, ["x", "y", "z"])
    assert store.verify(tiny_config.run.dir / "prepare" / record["store"]).shape == (1, 16, 16)
    assert Path(record["store"]).name == record["store"]  # so that the run may be moved


def test_without_ffcv_the_run_goes_on_and_says_so(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ffcv", None)
    path = save_npz(tmp_path / "set.npz", numbered(30), np.arange(30) % 3)
    record = prepared(with_data(tiny_config, "npz", path, store="auto"))
    assert record["store"].endswith("public.npy")
    assert "FFCV's compiled part" in capsys.readouterr().err


def test_a_given_beton_is_used_where_it_is(tiny_config: Config, tmp_path: Path) -> None:
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    path = tmp_path / "given.beton"
    store.write(source_of(numbered(30), np.arange(30) % 3), path, Form(8, 1), 0)
    record = prepared(with_data(tiny_config, "beton", path))
    assert record["store"] == str(path.resolve()) and record["classes"] == ["a", "b", "c"]
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="truncated"):
        prepared(with_data(tiny_config, "beton", path))


@pytest.mark.parametrize("kind", ["npz", "folder", "beton", "cifar10"])
def test_a_kind_that_needs_a_path_says_which_key(tiny_config: Config, kind: str) -> None:
    with pytest.raises(UserError, match=r"^data\.public\.path: kind \S+ needs one$"):
        prepared(with_data(tiny_config, kind, None))
