"""Nobody but the owner reads what a run leaves, whatever the umask; only a release is open to all."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from ranks import TINY, clean_environment, privimage

from privimage.errors import UserError
from privimage.storage import owner_only
from privimage.storage.rundir import RunDir

QUICK = (
    "query.steps=2",
    "pretrain.steps=2",
    "finetune.steps=2",
    "synthesize.samples=12",
    "synthesize.formats=[png]",
    "evaluate.fidelity_samples=10",
)


def made(folder: Path, umask: int, *arguments: str) -> subprocess.CompletedProcess:
    """A quick run by the command, under a umask."""
    shared = f"run.shared={folder.parent / 'shared'}"
    return privimage("run", TINY, f"run.dir={folder}", *QUICK, shared, *arguments, umask=umask)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a run leaves: report, figures, caches, curves, a shared stage.

    Its umask opens too much to the group, and too little to all others.
    """
    folder = tmp_path_factory.mktemp("modes") / "run"
    ended = made(folder, 0o007, "evaluate.before=true")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


def readable_by_others(*places: Path) -> list[str]:
    """Files and folders with any right for anybody but their owner."""
    every = [path for place in places for path in (place, *place.rglob("*"))]
    return [str(path) for path in every if path.lstat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]


def test_all_but_the_release_is_its_owners_alone(finished: Path) -> None:
    inside = [path for path in finished.iterdir() if path.name != "release"]
    assert (finished / "evaluate" / "figures" / "sensitive-nearest.png").exists() and list(
        (finished / "private").rglob("*.npy")
    )
    assert readable_by_others(*inside) == []
    assert stat.S_IMODE(finished.stat().st_mode) == 0o700


def test_ledgers_and_shared_stages_are_their_owners_alone(finished: Path) -> None:
    assert list((finished.parent / "ledgers").iterdir()) and list((finished.parent / "shared").iterdir())
    assert readable_by_others(finished.parent / "ledgers", finished.parent / "shared") == []


def test_a_release_is_open_to_all(finished: Path) -> None:
    release = finished / "release"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (release, *release.rglob("*")) if path.is_dir()}
    assert modes == {0o755}
    files = [path for path in release.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644} and len(files) == 8 + 12


def test_what_was_there_before_is_restricted(tmp_path: Path) -> None:
    """As after a copy, or from an older version."""
    folder = tmp_path / "run"
    for name in ("private/root.key", "evaluate/report.html", "finetune/checkpoint.pt", "config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
        (folder / name).chmod(0o666)
    for path in (folder, folder / "private", folder / "evaluate"):
        path.chmod(0o777)
    (folder / "notes").mkdir()  # not ours
    (folder / "notes").chmod(0o755)
    run = RunDir(folder)
    with run.lock():
        pass
    run.close_to_others()
    assert (
        readable_by_others(*(folder / name for name in ("private", "evaluate", "finetune", "config.yaml")))
        == []
    )
    assert (
        stat.S_IMODE(folder.stat().st_mode) == 0o700
        and stat.S_IMODE((folder / "notes").stat().st_mode) == 0o755
    )


@pytest.mark.parametrize("name", ["private", "finetune", "evaluate", "tensorboard"])
def test_a_link_in_place_of_a_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "open to all"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(elsewhere)
    ended = made(tmp_path / "run", 0o022)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert f"{tmp_path / 'run' / name}: a symbolic link" in ended.stderr
    assert not list(elsewhere.iterdir())


def test_a_run_directory_may_be_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir(mode=0o755)
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    with RunDir(tmp_path / "run").lock():
        pass
    assert stat.S_IMODE((tmp_path / "scratch").stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, root: None) -> None:
    private = tmp_path / "run" / "private"
    private.mkdir(parents=True)
    os.chown(private, 65534, -1)
    with pytest.raises(UserError, match=rf"{private}: belongs to another user \(id 65534\)"):
        _ = RunDir(tmp_path / "run").private
    os.chown(tmp_path / "run", 65534, -1)  # as on a disk that is mounted into a container
    assert RunDir(tmp_path / "run").private == private


def test_modes_that_are_not_kept_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loose").mkdir(mode=0o755)
    (tmp_path / "loose").chmod(0o755)
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)  # as on FAT
    with pytest.raises(UserError, match="its file system keeps no modes"):
        owner_only.folder(tmp_path / "loose")


def test_a_process_that_dies_leaves_no_core(tmp_path: Path) -> None:
    """Neither a file, for which the limit is too small, nor one that is piped to a handler, which a limit of
    0 would not keep back.
    """
    script = "import os, resource; from privimage.storage.owner_only import close_process; close_process()\n"
    script += "print(*resource.getrlimit(resource.RLIMIT_CORE), flush=True); os.abort()"
    python = shutil.which("python", path=clean_environment()["PATH"])
    ended = subprocess.run(
        [str(python), "-c", script],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -6 and ended.stdout == "1 1\n" and not list(tmp_path.iterdir())
