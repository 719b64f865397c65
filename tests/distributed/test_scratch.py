"""The prepared set on the disks of nodes: one copy and one digest a node, before any rank reads it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, numbers, source_of
from ranks import run_ranks

from privimage.data import store
from privimage.data.transforms import Form
from privimage.distributed.world import ALONE
from privimage.errors import UserError

# Four ranks, of which two share a node; each node has a folder of its own.
STAGED = """
import os, sys
from pathlib import Path
rank = int(os.environ["RANK"])
os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
from privimage.config.settings import Runtime
from privimage.data import store
from privimage.distributed.world import connect
folder, scratch = Path(sys.argv[1]), Path(sys.argv[1], f"node{rank // 2}")
whole = store._digest
def digest(path):
    print("digest", path, flush=True)
    return whole(path)
store._digest = digest
world = connect(Runtime(device="cpu"))
path = store.at_hand(folder / "set.npy", scratch if sys.argv[2] == "copied" else None, world)
print("reads", path)
world.close()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a prepared set in it."""
    store.write(source_of(numbered(40), np.arange(40) % 3), tmp_path / "set.npy", Form(8, 1), 0)
    return tmp_path


@pytest.mark.parametrize("way", ["copied", "in place"])
def test_a_set_is_copied_and_compared_once_a_node(folder: Path, way: str) -> None:
    ended = run_ranks(STAGED, 4, str(folder), way)
    assert [rank.status for rank in ended] == [0] * 4, ended
    copies = [list((folder / f"node{node}").glob("*.npy")) for node in (0, 1)]
    for rank, found in enumerate(ended):
        path = copies[rank // 2][0] if way == "copied" else folder / "set.npy"
        compared = [f"digest {path}"] if rank % 2 == 0 else []
        assert found.out.splitlines() == [*compared, f"reads {path}"]
        assert numbers(store.read(path, np.arange(40))).tolist() == list(range(40))


def test_a_copy_is_used_again_and_a_damaged_one_is_refused(folder: Path) -> None:
    scratch = folder / "node"
    copy = store.at_hand(folder / "set.npy", scratch, ALONE)
    made = copy.stat().st_mtime_ns
    assert store.at_hand(folder / "set.npy", scratch, ALONE) == copy
    assert copy.stat().st_mtime_ns == made
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(UserError, match=f"^{copy}: altered"):
        store.at_hand(folder / "set.npy", scratch, ALONE)


def test_a_folder_where_no_copy_can_be_made_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    with pytest.raises(UserError, match=r"^data\.scratch: .*no copy could be made"):
        store.at_hand(folder / "set.npy", folder / "file" / "inside", ALONE)
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(UserError, match="No space left"):
        store.at_hand(folder / "set.npy", folder / "node", ALONE)
    assert not list((folder / "node").iterdir())


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")
