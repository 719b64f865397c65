"""What all tests share: the data beside the repository, root, one thread a process, and a tiny configuration."""

import os
from pathlib import Path

import pytest
import torch

from privimage.config import Config, load

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "tests" / "tiny.yaml"

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets beside the repository, or a visible skip."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real data sets in {path.relative_to(REPOSITORY.parent)} beside the repository")
    return path


@pytest.fixture(scope="session")
def root() -> None:
    """A visible skip for whoever is not root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def tiny_config(tmp_path: Path) -> Config:
    """The whole pipeline on embedded 8x8 images with the smallest networks: seconds on one thread. The run is in `tmp_path/run`."""
    return load(TINY, [f"run.dir={tmp_path / 'run'}"])
