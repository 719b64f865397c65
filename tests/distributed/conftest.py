"""A run whose public stages are done, to begin from where ranks come into play."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import SMALL, TINY, clean_environment

from privimage.rundir import write_json


@pytest.fixture(scope="session")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with prepare, query and select finished, with a fixed key, and no evaluation to come."""
    folder = tmp_path_factory.mktemp("selected") / "run"
    for stage in ("prepare", "query", "select"):
        command = ["privimage", stage, str(TINY), f"run.dir={folder}", *SMALL]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (folder / "evaluate").mkdir()
    write_json(folder / "evaluate" / "done.json", {"images": 0})
    return folder


@pytest.fixture
def a_copy(selected: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of `selected`, each with ledgers of its own: `a_copy("name")` is the path of one."""

    def copy(name: str) -> Path:
        folder = tmp_path / name / "run"
        shutil.copytree(selected.parent, folder.parent)
        return folder

    return copy
