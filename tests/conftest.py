"""Shared by all tests: data beside the repository, root, one thread per process, a tiny configuration."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, SMALL, TINY, run_stages

from privimage.config import Config, load
from privimage.distributed.preemption import SIGNALS, stop
from privimage.privacy import identity
from privimage.storage.files import write_json

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no test is told that other tests keep the machine busy
# No test writes into a user's ledgers.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="privimage-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets beside the repository, or a visible skip."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(
            f"needs the real data sets in {path.relative_to(REPOSITORY.parent)} beside the repository"
        )
    return path


@pytest.fixture(scope="session")
def root() -> None:
    """A visible skip for whoever is not root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A CPU, and a GPU or a visible skip."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Leave signal handlers as they were before the test, and no request to stop behind."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop.requested = False


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a fixed key is the same after a change of the package's source, and on any machine.

    Both are in the names that noise is derived from, so that a test of its distribution would draw it anew.
    """
    monkeypatch.setattr(identity, "_machine", lambda device: {})


@pytest.fixture
def tiny_config(tmp_path: Path) -> Config:
    """The whole pipeline on embedded 8x8 images with the smallest networks: seconds on one thread.

    The run is in `tmp_path/run`.
    """
    return load(TINY, [f"run.dir={tmp_path / 'run'}"])


@pytest.fixture(scope="session")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with prepare, query and select finished, with a fixed key, and no evaluation to come.

    Its ledger is beside it.
    """
    made = tmp_path_factory.mktemp("selected") / "made"
    run_stages(made, ("prepare", "query", "select"), *SMALL)
    (made / "evaluate").mkdir()
    write_json(made / "evaluate" / "done.json", {"images": 0})
    return made.rename(made.parent / "run")  # copies of it are then runs that have moved


@pytest.fixture
def a_copy(selected: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of `selected`, each with ledgers of its own: `a_copy("name")` is the path of one."""

    def copy(name: str) -> Path:
        folder = tmp_path / name / "run"
        shutil.copytree(selected.parent, folder.parent)
        return folder

    return copy
