"""The public set is prepared by several ranks, to the same bytes however often it is interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_sets import linked_folder, numbered, save_folder
from ranks import (
    COMMAND,
    TINY,
    Rank,
    clean_environment,
    privimage,
    run_ranks,
    start_ranks,
    wait_ranks,
    wait_until,
)

from privimage.data import store

PREPARE = """
import sys
from pathlib import Path
from privimage.config.settings import Runtime
from privimage.data import store
from privimage.data.readers import open_source
from privimage.data.transforms import Form
from privimage.distributed.world import connect
world = connect(Runtime(device="cpu"))
source = open_source("folder", Path(sys.argv[1]), "train")
store.write(source, Path(sys.argv[2]), Form(8, 3), 1, world=world)
world.close()
"""
OTHERWISE = """
import sys
from pathlib import Path
from privimage.config.settings import Runtime
from privimage.data.private_store import open_set
from privimage.data.readers import open_source
from privimage.data.transforms import Form
from privimage.distributed.world import connect
world = connect(Runtime(device="cpu"))
source = open_source("folder", Path(sys.argv[1], str(world.rank)), "train")
found = open_set(Path(sys.argv[1], "set"), {"stamp": []}, lambda: source, Form(8, 3), 0, world, "read")
print(found.content.hex())
world.close()
"""
DECODE = """
import forever
from privimage.data.decode import Workers
with Workers(2) as workers:
    workers.map(forever.slow, [(number,) for number in range(100)])
"""
SLOW = """
import os, time
from pathlib import Path
def slow(number):
    Path(os.environ["STARTED"], str(os.getpid())).touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same_store(tmp_path: Path, ranks: int) -> None:
    """2,000 images in four parts."""
    images = numbered(2000, channels=3)
    folder = save_folder(tmp_path / "set", images, np.arange(2000) % 3)
    for size in (1, ranks):
        for ended in run_ranks(PREPARE, size, str(folder), str(tmp_path / f"{size}.npy")):
            assert ended.status == 0, ended.err
    assert store.verify(tmp_path / "1.npy").sha256 == store.verify(tmp_path / f"{ranks}.npy").sha256
    assert not list(tmp_path.glob(".*.parts"))


def test_a_node_that_lists_its_copy_otherwise_puts_no_image_twice_into_the_set(tmp_path: Path) -> None:
    """1,500 images in three parts, of which a second rank would decode one, in an order of its own."""
    images, labels = numbered(1500, channels=3), np.zeros(1500, int)
    save_folder(tmp_path / "0", images, labels)
    save_folder(tmp_path / "1", images[::-1], labels)
    contents = set()
    for size in (1, 2):
        ended = run_ranks(OTHERWISE, size, str(tmp_path))
        assert [rank.status for rank in ended] == [0] * size, ended[0].err
        contents |= {rank.out for rank in ended}
        shutil.rmtree(tmp_path / "set")
    assert len(contents) == 1


def test_decoders_end_when_the_process_that_they_work_for_is_killed(tmp_path: Path) -> None:
    (tmp_path / "forever.py").write_text(SLOW)
    (tmp_path / "started").mkdir()
    env = clean_environment(STARTED=str(tmp_path / "started"))
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    process = subprocess.Popen([sys.executable, "-c", DECODE], env=env)
    started = tmp_path / "started"

    def both() -> list[int]:
        found = [int(path.name) for path in started.iterdir()]
        return found if len(found) >= 2 else []

    workers = wait_until(both, 60, lambda: process.poll() is None)
    # What a batch system sends to all processes of a job is for the rank to act on.
    for pid in workers:
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    time.sleep(1.5)
    assert all(alive(pid) for pid in workers)
    process.kill()
    process.wait()
    told = "decoders outlive the process that they work for"
    wait_until(lambda: not any(alive(pid) for pid in workers), 10, said=lambda: told)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def test_kills_and_a_stop_change_no_byte(tmp_path: Path) -> None:
    """`benchmarks/prepare.py --images 100000 --kills 10` is the long form, its table in docs/results.md."""
    data = ("data.public.kind=folder", f"data.public.path={linked_folder(tmp_path)}", "data.workers=1")

    def words(name: str) -> tuple[str, ...]:
        return "prepare", str(TINY), f"run.dir={tmp_path / name}", *data

    def disturbed_after(parts: int) -> list[Rank]:
        """Ranks that are at work, with at least so many parts of the set decoded."""
        ranks, place = start_ranks(COMMAND, 2, *words("disturbed")), tmp_path / "disturbed" / "prepare"
        ranks[0].wait_until(lambda: len(list(place.glob(".public.npy.parts/*.npz"))) >= parts, 120)
        assert all(rank.process.is_alive() for rank in ranks)
        return ranks

    ranks = disturbed_after(1)
    for rank in ranks:  # as a launcher hands it on
        os.kill(rank.pid, signal.SIGUSR2)
    ended = wait_ranks(ranks)
    assert [rank.status for rank in ended] == [75, 75], ended
    ranks = disturbed_after(2)
    for rank in ranks:  # a launcher ends the others where one dies
        os.kill(rank.pid, signal.SIGKILL)
    wait_ranks(ranks)
    ended = run_ranks(COMMAND, 2, *words("disturbed"))
    assert [rank.status for rank in ended] == [0, 0], ended
    assert privimage(*words("alone")).returncode == 0
    digests = [store.verify(tmp_path / name / "prepare" / "public.npy") for name in ("alone", "disturbed")]
    assert digests[0] == digests[1]
