"""Run directories and checkpoints.

Whole or not at all, damage told in one line, settings that may not change.
"""

import errno
import os
from pathlib import Path

import pytest
import torch

from privimage.config import Config
from privimage.distributed import checkpoint
from privimage.errors import UserError
from privimage.storage.files import read_json, write_json, write_whole
from privimage.storage.rundir import RunDir

STATE = {"weights": {"a": torch.arange(1000.0)}, "step": 7, "names": ["x"]}


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    found = checkpoint.load(tmp_path / "c.pt")
    assert (
        found is not None and found["step"] == 7 and torch.equal(found["weights"]["a"], STATE["weights"]["a"])
    )
    assert checkpoint.load(tmp_path / "none.pt") is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "truncated": bytes(content[:-100]),
            "altered": bytes(content),
            "empty": b"",
            "other": b"hello" * 100,
        }[damage]
    )
    with pytest.raises(UserError, match=r"c\.pt: damaged checkpoint .* delete it"):
        checkpoint.load(path)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    """A well-formed file whose payload is a pickle of a callable: weights_only refuses it."""
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    payload = pickle.dumps(Evil())
    (tmp_path / "c.pt").write_bytes(checkpoint.MAGIC + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError,
        match=r"c\.pt: could not be written \(No space left on device\); what was there before is kept",
    ):
        checkpoint.save(path, {"step": 8})
    monkeypatch.undo()
    found = checkpoint.load(path)
    assert found is not None and found["step"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]


def test_a_really_full_disk(tmp_path: Path, root: None) -> None:
    """A file system of 64 KiB, mounted for this test."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        checkpoint.save(small / "c.pt", {"step": 1})
        with pytest.raises(UserError, match=r"c\.pt: could not be written"):
            checkpoint.save(small / "c.pt", {"weights": torch.zeros(100_000)})
        found = checkpoint.load(small / "c.pt")
        assert found is not None and found["step"] == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match=r"a\.json: damaged"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


def test_private_is_private(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.private.stat().st_mode & 0o777 == 0o700


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock(), pytest.raises(UserError, match="another run is using this directory"), run.lock():
        pass
    with run.lock():
        pass


def changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_settings_of_stages_that_have_begun_must_stay(tiny_config: Config) -> None:
    run = RunDir(tiny_config.run.dir)
    run.stage("query")
    run.reconcile(tiny_config)
    run.reconcile(changed(tiny_config, "synthesize", samples=50))
    run.reconcile(changed(tiny_config, "runtime", threads=2))
    for section, values in (
        ("query", {"steps": 99}),
        ("runtime", {"seed": 1}),
        ("data", {"channels": 3}),
    ):
        with pytest.raises(
            UserError,
            match=rf"made with other settings \({section}\.\w+ was .* now .*\); "
            r"choose another run.dir, or go on .*, or delete query/ to do these stages again",
        ):
            run.reconcile(changed(tiny_config, section, **values))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("privacy", {"epsilon": 3.0}),
        ("select", {"max_rise": 0.2}),
        ("select", {"noise_multiplier": 7.0}),
        ("finetune", {"steps": 3}),
    ],
)
def test_settings_of_the_plan_must_stay_once_it_is_made(
    tiny_config: Config, section: str, values: dict
) -> None:
    run = RunDir(tiny_config.run.dir)
    run.path.mkdir()
    run.reconcile(tiny_config)
    run.stage("query")
    run.reconcile(changed(tiny_config, section, **values))  # not made yet
    run.reconcile(tiny_config)
    write_json(run.private / "account.json", {})
    with pytest.raises(UserError, match=rf"{section}\.\w+ was .* with the old values \(`[^`]*`\)$"):
        run.reconcile(changed(tiny_config, section, **values))


@pytest.mark.parametrize("values", [{"before": True}, {"fidelity_samples": 11}])
def test_what_synthesis_has_read_of_the_evaluation_must_stay(tiny_config: Config, values: dict) -> None:
    run = RunDir(tiny_config.run.dir)
    run.path.mkdir()
    run.reconcile(tiny_config)
    run.stage("synthesize")
    with pytest.raises(UserError, match=r"evaluate\.\w+ was .*delete synthesize/ to do"):
        run.reconcile(changed(tiny_config, "evaluate", **values))
    run.reconcile(changed(tiny_config, "evaluate", cnn_epochs=3))


def test_a_stage_keeps_the_settings_of_those_before_it(tiny_config: Config) -> None:
    """Also when their folders were deleted: what it made came from them."""
    run = RunDir(tiny_config.run.dir)
    run.path.mkdir()
    run.reconcile(tiny_config)
    run.stage("pretrain")
    with pytest.raises(UserError, match=r"query\.steps was .*delete pretrain/ to do"):
        run.reconcile(changed(tiny_config, "query", steps=99))


def test_a_setting_that_is_younger_than_the_run_had_its_default_in_it(tiny_config: Config) -> None:
    run = RunDir(tiny_config.run.dir)
    run.stage("query")
    run.reconcile(tiny_config)
    path, line = run.path / "config.yaml", "  flip: false\n"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, ""))
    run.reconcile(changed(tiny_config, "data", flip=True))
    with pytest.raises(UserError, match=r"data\.flip was True, now False"):
        run.reconcile(tiny_config)


def test_a_run_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.failure is None
    run.note_failure("data.public.path: not there")
    assert RunDir(tmp_path / "run").failure == "data.public.path: not there"
    run.note_failure(None)
    run.note_failure(None)
    assert run.failure is None


def test_whether_a_run_holds_its_directory_can_be_seen(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert not run.is_running
    with run.lock():
        assert run.is_running
    assert not run.is_running


def test_a_damaged_configuration_of_a_run_is_named(tiny_config: Config) -> None:
    run = RunDir(tiny_config.run.dir)
    run.stage("query")
    run.reconcile(tiny_config)
    for text in ("a: [", "", "- x"):
        (run.path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml: damaged, not readable as YAML"):
            run.reconcile(tiny_config)


def test_a_stage_that_is_not_finished_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match="stage select is not finished; run `privimage select` first"):
        run.require("select")
    run.finish("select", {"images": 3})
    assert run.require("select") == {"images": 3}


def test_whole_files_replace_whole_files(tmp_path: Path) -> None:
    for content in (b"one", b"two" * 1000, b""):
        write_whole(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content


def test_whoever_has_the_old_file_open_goes_on_reading_the_old_file(tmp_path: Path) -> None:
    """Replaced by a rename, never rewritten in place: a crash in the middle would leave half of each."""
    write_whole(tmp_path / "f", b"old")
    with open(tmp_path / "f", "rb") as reader:
        write_whole(tmp_path / "f", b"new and longer")
        assert reader.read() == b"old"
