"""The ledger: append-only, adds up, counts replays once and torn lines always, refuses what exceeds the budget."""

import json
import multiprocessing
import sys
from collections.abc import Callable

import pytest

from privimage.errors import UserError
from privimage.privacy.accounting import Mechanism, epsilon
from privimage.privacy.ledger import Ledger, read

QUERY, STEP = Mechanism(5.0), Mechanism(2.0, 0.3)
PLAN = (QUERY, Mechanism(2.0, 0.3, 10))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    made = Ledger(tmp_path / "ledgers", "f" * 64)
    made.announce("run", PLAN, None, "pld")
    return made


def test_charges_add_up_by_mechanism_and_over_runs(ledger: Ledger) -> None:
    ledger.charge("run", QUERY, "query")
    for step in range(4):
        ledger.charge("run", STEP, f"step {step}")
    ledger.announce("other", PLAN, None, "pld")
    ledger.charge("other", STEP, "step 0")
    spent = ledger.read()
    assert set(spent.mechanisms("run")) == {QUERY, Mechanism(2.0, 0.3, 4)}
    assert set(spent.mechanisms()) == {QUERY, Mechanism(2.0, 0.3, 5)}


def test_a_replay_counts_once(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.charge("run", STEP, "step 7 attempt 0")
    ledger.charge("run", STEP, "step 7 attempt 1")
    assert ledger.read().mechanisms() == (Mechanism(2.0, 0.3, 2),)


def test_the_file_only_grows(ledger: Ledger) -> None:
    before = ledger.path.read_bytes()
    ledger.charge("run", STEP, "a")
    ledger.charge("run", STEP, "a")
    assert ledger.path.read_bytes().startswith(before)
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def tear(ledger: Ledger, run: str, mechanism: Mechanism, kept: int) -> None:
    """A crash in the middle of writing a charge: only its first bytes arrive."""
    whole = ledger.path.read_bytes()
    ledger.charge(run, mechanism, "torn")
    ledger.path.write_bytes(whole + ledger.path.read_bytes()[len(whole) :][:kept])


@pytest.mark.parametrize("kept", [1, 10, 40, -2])
def test_a_torn_line_counts_as_the_dearest_open_mechanism(ledger: Ledger, kept: int) -> None:
    tear(ledger, "run", QUERY, kept)
    assert ledger.read().torn == 1
    assert ledger.read().mechanisms() == (QUERY,)


@pytest.mark.parametrize("kept", [1, 10, 40, -2])
def test_once_the_query_is_charged_a_torn_line_is_a_step(ledger: Ledger, kept: int) -> None:
    ledger.charge("run", QUERY, "query")
    ledger.charge("run", STEP, "a")
    tear(ledger, "run", STEP, kept)
    assert set(ledger.read().mechanisms()) == {QUERY, Mechanism(2.0, 0.3, 2)}
    ledger.charge("run", STEP, "c")
    assert set(ledger.read().mechanisms()) == {QUERY, Mechanism(2.0, 0.3, 3)}
    assert json.loads(ledger.path.read_bytes().splitlines()[-1])["run"] == "run"


def test_a_torn_line_that_does_not_tell_its_run_is_charged_to_every_open_one(ledger: Ledger) -> None:
    ledger.announce("second", PLAN, None, "pld")
    ledger.charge("run", QUERY, "query")
    tear(ledger, "run", STEP, 4)
    assert ledger.read().mechanisms("second") == (QUERY,)
    assert set(ledger.read().mechanisms("run")) == {QUERY, STEP}


def test_a_torn_first_plan_costs_nothing_since_nothing_was_drawn(tmp_path) -> None:
    made = Ledger(tmp_path, "a" * 64)
    made.path.write_bytes(b'{"plan": [[5.0, 1')
    assert made.read().mechanisms() == () and made.read().torn == 1


def test_a_budget_refuses_a_run_before_it_starts(ledger: Ledger) -> None:
    one = epsilon(PLAN, 1e-5)
    two = epsilon((QUERY, QUERY, Mechanism(2.0, 0.3, 20)), 1e-5)
    ledger.announce("second", PLAN, (two + 0.01, 1e-5), "pld")
    before = ledger.path.read_bytes()
    with pytest.raises(UserError, match=r"privacy.budget: with this run epsilon on the sensitive set would be .* more than"):
        ledger.announce("third", PLAN, (two + 0.01, 1e-5), "pld")
    assert ledger.path.read_bytes() == before
    assert two > one


def test_an_announced_run_keeps_its_room_in_the_budget(ledger: Ledger) -> None:
    """The first run has charged one step of ten: the other nine are still its own."""
    ledger.charge("run", STEP, "step 0")
    limit = epsilon((QUERY, QUERY, Mechanism(2.0, 0.3, 15)), 1e-5)
    with pytest.raises(UserError, match=r"privacy\.budget"):
        ledger.announce("second", PLAN, (limit, 1e-5), "pld")


def test_going_on_with_a_run_is_not_counted_twice(ledger: Ledger) -> None:
    for step in range(10):
        ledger.charge("run", STEP, f"step {step}")
    ledger.announce("run", PLAN, (epsilon(PLAN, 1e-5) + 1e-6, 1e-5), "pld")


def test_a_run_without_noise_exhausts_every_budget(ledger: Ledger) -> None:
    ledger.not_private("loud")
    with pytest.raises(UserError, match="infinite, since a run without noise used it"):
        ledger.announce("second", PLAN, (1e6, 1e-5), "pld")


def at_once(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(n)` in `count` forked processes and return their exit statuses; 2 for a UserError."""

    def one(number: int) -> None:
        try:
            work(number)
        except UserError:
            sys.exit(2)

    processes = [multiprocessing.get_context("fork").Process(target=one, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_processes_at_once_lose_no_charge(ledger: Ledger) -> None:
    """Six real processes append 30 charges each."""

    def charge(number: int) -> None:
        for step in range(30):
            ledger.charge(f"run {number}", STEP, str(step))

    assert at_once(6, charge) == [0] * 6
    assert ledger.read().torn == 0
    assert ledger.read().mechanisms() == (Mechanism(2.0, 0.3, 180),)


def test_of_runs_that_announce_at_once_the_budget_admits_as_many_as_fit(tmp_path) -> None:
    """Five real processes, room for one: the check and the announcement are one, or several would find the room free."""
    plan = (Mechanism(2.0, 0.3, 10),)
    limit = epsilon(plan, 1e-5) * 1.01
    ledger = Ledger(tmp_path, "f" * 64)
    assert sorted(at_once(5, lambda number: ledger.announce(f"run {number}", plan, (limit, 1e-5), "pld"))) == [0, 2, 2, 2, 2]


def test_a_full_disk_releases_nothing_and_says_so(ledger: Ledger) -> None:
    ledger.path.unlink()
    ledger.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"the ledger could not be written .* nothing was released"):
        ledger.charge("run", STEP, "a")


def test_a_missing_ledger_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read"):
        read(tmp_path / "no.jsonl")
