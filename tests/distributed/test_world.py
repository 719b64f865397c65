"""Real gloo processes: ranks meet, wait, fail and stop together."""

import os
import signal
from pathlib import Path

import pytest
from ranks import TINY, run_ranks, start_ranks, wait_ranks

HEAD = """
import sys, time, torch
from privimage.config.settings import Runtime
from privimage.distributed.world import connect
from privimage.errors import UserError
world = connect(Runtime(device="cpu", timeout_minutes={minutes}))
"""


def head(minutes: float = 1) -> str:
    return HEAD.format(minutes=minutes)


def test_ranks_add_up_share_objects_and_end_cleanly():
    script = """
value = world.all_reduce_(torch.tensor([1.0, world.rank]))
print(value.tolist(), world.broadcast_object({"from": world.rank}))
world.barrier()
world.close()
"""
    for ended in run_ranks(head() + script, 3):
        assert (ended.status, ended.out.strip(), ended.err) == (0, "[3.0, 3.0] {'from': 0}", "")


def test_a_barrier_outlasts_the_time_out_of_collectives():
    script = """
if world.is_main:
    time.sleep(8)
world.barrier()
print(world.all_reduce_(torch.ones(1)).item())
world.close()
"""
    assert [(e.status, e.out.strip()) for e in run_ranks(head(minutes=0.05) + script, 2)] == [
        (0, "2.0"),
        (0, "2.0"),
    ]


FAILING = """
try:
    if world.rank == int(sys.argv[1]):
        raise UserError("data.public.path: not on this node")
    world.all_reduce_(torch.ones(1)) if sys.argv[2] == "collective" else world.barrier()
except Exception as error:
    sys.exit(world.fail(error))
"""


@pytest.mark.parametrize(("rank", "waiting"), [("2", "collective"), ("0", "barrier")])
def test_a_mistake_on_one_rank_ends_all_with_its_status_and_one_line(rank: str, waiting: str):
    ended = run_ranks(head() + FAILING, 3, rank, waiting, seconds=40)
    assert [e.status for e in ended] == [2, 2, 2]
    assert "".join(e.err for e in ended) == "privimage: error: data.public.path: not on this node\n"


def test_the_status_is_left_for_the_launcher(tmp_path: Path):
    run_ranks(head() + FAILING, 2, "1", "collective", PRIVIMAGE_STATUS_FILE=str(tmp_path / "status"))
    assert (tmp_path / "status").read_text() == "2\n"


STEPS = """
print("ready", flush=True)
try:
    while True:
        world.all_reduce_(torch.ones(1))
        time.sleep(0.01)
except Exception as error:
    sys.exit(world.fail(error))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line(victim: int):
    ranks = start_ranks(head() + STEPS, 3)
    for rank in ranks:
        rank.wait_until_it_says("ready")
    ranks[victim].process.kill()
    ended = wait_ranks(ranks, seconds=40)
    assert [e.status for e in ended] == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    told = "".join(e.err for e in ended)
    assert "start all ranks again to go on from the last checkpoint" in told
    assert "Traceback" not in told


COMPUTING = """
from privimage.distributed import failure
failure.GONE_SECONDS = 2
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


def test_a_killed_main_rank_ends_those_that_are_computing():
    ranks = start_ranks(head() + COMPUTING, 2)
    for rank in ranks:
        rank.wait_until_it_says("ready")
    ranks[0].process.kill()
    ended = wait_ranks(ranks, seconds=60)
    assert ended[1].status == 1
    assert "the main rank is gone" in ended[1].err


def test_ranks_that_do_not_meet_say_where_in_one_line():
    script = (
        "import privimage.distributed.world as w\nw.CONNECT_MINUTES = 0.05\n"
        + "try:\n    w.connect(w.Runtime(device='cpu'))\nexcept w.UserError as e:\n    print(e)"
    )
    ranks = start_ranks(script, 2)
    ranks[0].process.kill()
    ended = wait_ranks(ranks, seconds=60)[1]
    assert ended.status == 0
    assert "rank 1 of 2 could not connect to the others at 127.0.0.1" in ended.out
    assert ended.out.count("\n") == 1


def test_a_stop_is_an_exception_on_all_ranks_that_call_the_python_interface(tmp_path: Path):
    """None of them ends the others, which may still be saving."""
    script = (
        "import sys, privimage\nfrom privimage.distributed.preemption import stop\n"
        f"config = privimage.load_config({str(TINY)!r}, ['run.dir={tmp_path}/run', 'runtime.threads=1'])\n"
        "stop.requested = True\n"
        "try:\n    privimage.run(config)\nexcept privimage.Stopped as error:\n    print(error)"
    )
    for ended in run_ranks(script, 2):
        told = "read train: what was decoded is kept; run again to go on\n"
        assert (ended.status, ended.out) == (0, told), ended.err


STOPPING = """
from privimage.distributed.preemption import stop
stop.install(announced=world.is_main)
print("ready", flush=True)
step = 0
while not stop.agreed(world):
    step += 1
    time.sleep(0.01)
print(step)
world.close()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(number: int):
    ranks = start_ranks(head() + STOPPING, 2)
    for rank in ranks:
        rank.wait_until_it_says("ready")
    os.kill(ranks[1].pid, number)
    first, second = wait_ranks(ranks, seconds=40)
    assert first.status == second.status == 0
    assert first.out == second.out
