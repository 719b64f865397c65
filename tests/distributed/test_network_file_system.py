"""On a network file system one node may not see for seconds what another has written; the ranks still agree.

Such a file system is made with FUSE: a second view of a folder that remembers "no such file" and the state of
files for some seconds, as NFS does by default for up to a minute.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import REPOSITORY, TINY, run_ranks, start_ranks, wait_ranks, wait_until

from privimage.storage.files import read_json

SECONDS = 20
RANK = f"""
import os, sys
from pathlib import Path
from privimage.config import load
from privimage.runs import pipeline
view = "there" if os.environ["RANK"] == "1" else "here"
settings = [f"run.dir={{sys.argv[1]}}/{{view}}/run", "privacy.insecure_fixed_key=7", *sys.argv[2:]]
sys.exit(pipeline.run(load({str(TINY)!r}, settings)))
"""


@pytest.fixture
def views(tmp_path: Path, root: None) -> Iterator[Path]:
    """A folder with two views of one file system: `here`, and `there` with a memory."""
    install = f"source {REPOSITORY}/tools/_apt.sh; command -v bindfs || apt_install bindfs"
    if subprocess.run(["bash", "-c", install], capture_output=True).returncode:
        pytest.skip("needs bindfs, for a file system with a memory")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{kind}_timeout={SECONDS}" for kind in ("negative", "entry", "attr"))
    mount = ["bindfs", "-o", options, str(tmp_path / "here"), str(tmp_path / "there")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs FUSE")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path / "there")], check=True)


def test_a_second_view_does_not_see_a_new_file_for_some_seconds(views: Path) -> None:
    """What the other tests rely on."""
    assert not (views / "there" / "new").exists()
    (views / "here" / "new").touch()
    assert not (views / "there" / "new").exists()


def test_ranks_go_on_from_a_checkpoint_that_only_the_main_one_sees(views: Path) -> None:
    """The second rank has looked for the checkpoint before there was one, and remembers that."""
    run = views / "here" / "run"
    arguments = (str(views), "method=dpdm", "finetune.steps=80", "finetune.checkpoint_every=5")
    ranks = start_ranks(RANK, 2, *arguments)
    written = (run / "finetune" / "checkpoint.pt").exists
    wait_until(written, 120, lambda: all(rank.process.is_alive() for rank in ranks))
    os.kill(ranks[0].pid, signal.SIGUSR2)
    assert [rank.status for rank in wait_ranks(ranks)] == [75, 75]
    ended = run_ranks(RANK, 2, *arguments, seconds=300)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert read_json(run / "finetune" / "done.json")["ranks"] == 2


@pytest.mark.parametrize("method", ["dp-merf"])
def test_a_run_whose_ranks_see_files_at_different_times_ends(views: Path, method: str) -> None:
    ended = run_ranks(RANK, 2, str(views), f"method={method}", seconds=300)
    assert [rank.status for rank in ended] == [0, 0], ended
