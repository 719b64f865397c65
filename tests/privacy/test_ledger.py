"""The ledger.

Append-only, adds up, counts replays once and torn lines always, refuses what exceeds the budget.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable

import pytest

from privimage.errors import UserError
from privimage.privacy import ledger as ledger_module
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.ledger import Ledger, read

QUERY, STEP = SampledGaussian(5.0), SampledGaussian(2.0, 0.3)
PLAN = {"select": QUERY, "finetune": SampledGaussian(2.0, 0.3, 10)}


def announce(
    ledger: Ledger,
    run: str,
    budget: tuple[float, float] | None = None,
    plan: dict[str, SampledGaussian] | None = None,
) -> None:
    with ledger.announced(run, plan or PLAN, budget, "pld"):
        pass


def query(ledger: Ledger, run: str, name: str) -> bool:
    return ledger.charge(run, "select", QUERY, name, 1)


def step(ledger: Ledger, run: str, name: str, limit: int = 1000, behind: tuple[str, ...] = ()) -> bool:
    return ledger.charge(run, "finetune", STEP, name, limit, behind)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    made = Ledger(tmp_path / "ledgers", "f" * 64)
    announce(made, "run")
    return made


def test_charges_add_up_by_mechanism_and_over_runs(ledger: Ledger) -> None:
    query(ledger, "run", "query")
    for number in range(4):
        step(ledger, "run", f"step {number}")
    announce(ledger, "other")
    step(ledger, "other", "step 0 of the other")
    spent = read(ledger.path)
    assert set(spent.mechanisms("run")) == {QUERY, SampledGaussian(2.0, 0.3, 4)}
    assert set(spent.mechanisms()) == {QUERY, SampledGaussian(2.0, 0.3, 5)}


def test_a_replay_counts_once(ledger: Ledger) -> None:
    for _ in range(3):
        step(ledger, "run", "step 7 attempt 0")
    step(ledger, "run", "step 7 attempt 1")
    assert read(ledger.path).mechanisms() == (SampledGaussian(2.0, 0.3, 2),)


def test_the_file_only_grows(ledger: Ledger) -> None:
    before = ledger.path.read_bytes()
    step(ledger, "run", "a")
    after = ledger.path.read_bytes()
    step(ledger, "run", "a")
    assert after.startswith(before) and len(after) > len(before) and ledger.path.read_bytes() == after
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def tear(ledger: Ledger, run: str, mechanism: SampledGaussian, kept: int) -> None:
    """A crash in the middle of writing a charge: only its first bytes arrive."""
    whole = ledger.path.read_bytes()
    ledger.charge(run, "select" if mechanism == QUERY else "finetune", mechanism, "torn", 1000)
    ledger.path.write_bytes(whole + ledger.path.read_bytes()[len(whole) :][:kept])


@pytest.mark.parametrize("kept", [1, 10, 40, -2])
def test_a_torn_line_counts_as_the_dearest_open_mechanism(ledger: Ledger, kept: int) -> None:
    tear(ledger, "run", QUERY, kept)
    assert read(ledger.path).torn == 1
    assert read(ledger.path).mechanisms() == (QUERY,)


@pytest.mark.parametrize("kept", [1, 10, 40, -2])
def test_once_the_query_is_charged_a_torn_line_is_a_step(ledger: Ledger, kept: int) -> None:
    query(ledger, "run", "query")
    step(ledger, "run", "a")
    tear(ledger, "run", STEP, kept)
    assert set(read(ledger.path).mechanisms()) == {QUERY, SampledGaussian(2.0, 0.3, 2)}
    step(Ledger(ledger.path.parent, "f" * 64), "run", "c")  # after the crash
    assert set(read(ledger.path).mechanisms()) == {QUERY, SampledGaussian(2.0, 0.3, 3)}
    assert json.loads(ledger.path.read_bytes().splitlines()[-1])["run"] == "run"


def test_a_torn_line_that_does_not_tell_its_run_is_charged_to_every_open_one(ledger: Ledger) -> None:
    announce(ledger, "second")
    query(ledger, "run", "query")
    tear(ledger, "run", STEP, 4)
    assert read(ledger.path).mechanisms("second") == (QUERY,)
    assert set(read(ledger.path).mechanisms("run")) == {QUERY, STEP}


def test_a_torn_first_plan_costs_nothing_since_nothing_was_drawn(tmp_path) -> None:
    made = Ledger(tmp_path, "a" * 64)
    with open(made.path, "ab") as file:
        file.write(b'{"plan": [[5.0, 1')
    assert read(made.path).mechanisms() == () and read(made.path).torn == 1


def test_a_budget_refuses_a_run_before_it_starts(ledger: Ledger) -> None:
    one = epsilon(PLAN.values(), 1e-5)
    two = epsilon((QUERY, QUERY, SampledGaussian(2.0, 0.3, 20)), 1e-5)
    announce(ledger, "second", (two + 0.01, 1e-5))
    before = ledger.path.read_bytes()
    with pytest.raises(
        UserError, match=r"privacy.budget: with this run epsilon on the sensitive set would be .* more than"
    ):
        announce(ledger, "third", (two + 0.01, 1e-5))
    assert ledger.path.read_bytes() == before
    assert two > one


def test_an_announced_run_keeps_its_room_in_the_budget(ledger: Ledger) -> None:
    """The first run has charged one step of ten: the other nine are still its own."""
    step(ledger, "run", "step 0")
    limit = epsilon((QUERY, QUERY, SampledGaussian(2.0, 0.3, 15)), 1e-5)
    with pytest.raises(UserError, match=r"privacy\.budget"):
        announce(ledger, "second", (limit, 1e-5))


def test_going_on_with_a_run_is_not_counted_twice(ledger: Ledger) -> None:
    for number in range(10):
        step(ledger, "run", f"step {number}")
    announce(ledger, "run", (epsilon(PLAN.values(), 1e-5) + 1e-6, 1e-5))


def test_a_run_without_noise_exhausts_every_budget(ledger: Ledger) -> None:
    ledger.not_private("loud")
    with pytest.raises(UserError, match="infinite, since a run without noise used it"):
        announce(ledger, "second", (1e6, 1e-5))


def at_once(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(n)` in `count` forked processes and return their exit statuses; 2 for a UserError."""

    def one(number: int) -> None:
        try:
            work(number)
        except UserError:
            sys.exit(2)

    processes = [
        multiprocessing.get_context("fork").Process(target=one, args=(number,)) for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_processes_at_once_lose_no_charge(ledger: Ledger) -> None:
    """Six real processes append 30 charges each."""

    def charge(number: int) -> None:
        for turn in range(30):
            assert step(ledger, f"run {number}", f"{number} {turn}")

    assert at_once(6, charge) == [0] * 6
    assert read(ledger.path).torn == 0
    assert read(ledger.path).mechanisms() == (SampledGaussian(2.0, 0.3, 180),)


def test_of_runs_that_announce_at_once_the_budget_admits_as_many_as_fit(tmp_path) -> None:
    """Five real processes, room for one.

    The check and the announcement are one, or several would find the room free.
    """
    plan = {"finetune": SampledGaussian(2.0, 0.3, 10)}
    limit = epsilon(plan.values(), 1e-5) * 1.01
    ledger = Ledger(tmp_path, "f" * 64)
    assert sorted(at_once(5, lambda number: announce(ledger, f"run {number}", (limit, 1e-5), plan))) == [
        0,
        2,
        2,
        2,
        2,
    ]


def test_a_full_disk_releases_nothing_and_says_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(ledger_module.os, "write", lambda handle, line: real_write(full, line))
    with pytest.raises(UserError, match=r"the ledger could not be written .* nothing was released"):
        step(ledger, "run", "a")
    os.close(full)


real_write = os.write


def test_a_missing_ledger_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read"):
        read(tmp_path / "no.jsonl")


def test_a_run_has_no_more_charges_than_it_may(ledger: Ledger) -> None:
    assert all(step(ledger, "run", str(number), limit=3) for number in range(3))
    before = ledger.path.read_bytes()
    assert not step(ledger, "run", "one more", limit=3)
    assert ledger.path.read_bytes() == before
    assert step(ledger, "run", "1", limit=3)  # a replay


def test_charges_behind_what_a_copy_goes_on_from_count_for_it_too(ledger: Ledger) -> None:
    for number in range(2):
        step(ledger, "run", str(number))
    assert step(ledger, "copy", "a", 3, ("0", "1")) and not step(ledger, "copy", "b", 3, ("0", "1"))
    assert read(ledger.path).mechanisms("copy", ("0", "1")) == (SampledGaussian(2.0, 0.3, 3),)
    assert read(ledger.path).mechanisms() == (
        SampledGaussian(2.0, 0.3, 3),
    )  # of the set as a whole, each once


def test_a_ledger_that_is_known_is_recognised_after_others_have_written(ledger: Ledger) -> None:
    head = ledger.head
    step(Ledger(ledger.path.parent, "f" * 64), "other", "a")
    again = Ledger(ledger.path.parent, "f" * 64, head)
    assert again.head.size > head.size and again.head.ledger == head.ledger


def lost(path) -> None:
    path.unlink()


def older(path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))


def another(path) -> None:
    path.unlink()
    step(Ledger(path.parent, "f" * 64), "somebody", "x" * 4000)


def edited(path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.3", b"0.2"))


@pytest.mark.parametrize(
    ("change", "told"),
    [(lost, "missing"), (older, "shorter"), (another, "another one"), (edited, "another one")],
)
@pytest.mark.parametrize("while_open", [False, True])
def test_a_ledger_that_is_not_the_known_one_is_refused_in_one_line(
    ledger: Ledger, change: Callable, told: str, while_open: bool
) -> None:
    step(ledger, "run", "a")
    head = ledger.head
    change(ledger.path)
    with pytest.raises(
        UserError,
        match=rf"the ledger of the sensitive set is {told}.*bring back the file with identity {head.ledger}",
    ) as refused:
        step(ledger, "run", "b") if while_open else Ledger(ledger.path.parent, "f" * 64, head)
    assert "\n" not in str(refused.value) and str(ledger.path) in str(refused.value)
    if change is lost:
        assert not ledger.path.exists()


def test_the_budget_is_kept_and_holds_for_runs_that_do_not_name_it(ledger: Ledger) -> None:
    limit = (epsilon(PLAN.values(), 1e-5) * 1.01, 1e-5)
    announce(ledger, "run", limit)
    with pytest.raises(UserError, match=r"privacy.budget: with this run"):
        announce(ledger, "second")
    with pytest.raises(
        UserError,
        match=r"privacy.budget: epsilon 100 at delta 1e-05 is not the one that the ledger of the set holds",
    ):
        announce(ledger, "second", (100.0, 1e-5))
    ledger.set_budget((100.0, 1e-5))
    announce(ledger, "second")


def test_what_may_not_be_announced_is_not_begun(ledger: Ledger) -> None:
    with (
        pytest.raises(UserError, match=r"privacy\.budget"),
        ledger.announced("second", PLAN, (1.0, 1e-5), "pld"),
    ):
        pytest.fail("the body ran")


def test_a_ledger_of_an_older_version_counts(tmp_path) -> None:
    """Lines without parts, in front of which no identity stands."""
    path = tmp_path / f"{'f' * 32}.jsonl"
    lines = [
        {"run": "old", "plan": [[5.0, 1.0, 1], [2.0, 0.3, 10]]},
        {"run": "old", "charge": "a", "mechanism": [5.0, 1.0, 1]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = Ledger(tmp_path, "f" * 64)
    assert ledger.spent.identity and ledger.spent.mechanisms() == (QUERY,)
    assert set(ledger.spent.promised("new", {})) == {QUERY, SampledGaussian(2.0, 0.3, 10)}
