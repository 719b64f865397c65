"""What was ever spent on one sensitive set: an append-only file of JSON lines, fsynced before an output is used.

A line is a *plan* (what a run is going to do, written before it starts), or a *charge* (one use of a mechanism, written
before its output is used). Charges with the same identity are replays of the same computation with the same noise and
count once.
A torn line, left by a crash in the middle of a write, counts as one use of the dearest mechanism that its run had announced
and not yet charged in full; if it does not tell its run, of every run's.
"""

import fcntl
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privimage.errors import UserError
from privimage.privacy.accounting import Mechanism, epsilon


@dataclass(frozen=True)
class Spent:
    """The contents of a ledger, read back. Before the first plan nothing can have been released, and a torn line costs nothing."""

    charges: dict[str, tuple[str, Mechanism]]  # identity -> (run, mechanism with count 1)
    plans: dict[str, tuple[Mechanism, ...]]  # run -> what it announced
    not_private: frozenset[str]  # runs that used the set without noise
    torn: int = 0

    def mechanisms(self, run: str | None = None) -> tuple[Mechanism, ...]:
        """What was charged, of one run or of all, equal mechanisms added up."""
        counts = Counter(m for r, m in self.charges.values() if run is None or r == run)
        return tuple(Mechanism(m.noise_multiplier, m.sample_rate, n) for m, n in sorted(counts.items(), key=lambda item: repr(item[0])))

    def promised(self, without: str) -> tuple[Mechanism, ...]:
        """What all runs but one have charged or announced, whichever is more: an unfinished run may still go on."""
        total: list[Mechanism] = []
        for run in dict.fromkeys([*self.plans, *(r for r, _ in self.charges.values())]):
            if run == without:
                continue
            charged = {(m.noise_multiplier, m.sample_rate): m.count for m in self.mechanisms(run)}
            for planned in self.plans.get(run, ()):
                kind = (planned.noise_multiplier, planned.sample_rate)
                charged[kind] = max(charged.get(kind, 0), planned.count)
            total += [Mechanism(*kind, count) for kind, count in charged.items()]
        return tuple(total)


class Ledger:
    """The ledger of the sensitive set with the given fingerprint, in `folder`, shared by all runs on that set."""

    def __init__(self, folder: Path, fingerprint: str):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{fingerprint[:32]}.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _append(self, handle: int, entry: dict) -> None:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        line = (b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n"
        try:
            if os.write(handle, line) != len(line):
                raise OSError(28, "no space left")
            os.fsync(handle)
        except OSError as error:
            raise UserError(f"{self.path}: the ledger could not be written ({error.strerror}); nothing was released, make room and run again") from None

    def read(self) -> Spent:
        """All that was ever charged or announced here."""
        return read(self.path) if self.path.exists() else Spent({}, {}, frozenset())

    def announce(self, run: str, plan: tuple[Mechanism, ...], budget: tuple[float, float] | None, accountant: str) -> None:
        """Write down what `run` is going to do, before it starts.

        `budget` is (epsilon, delta) for everything ever done on this set. Raises UserError if this run, with all that others
        have charged or announced, would exceed it.
        """
        with self._locked() as handle:
            spent = self.read()
            if budget is not None:
                limit, delta = budget
                total = epsilon((*spent.promised(without=run), *_more(spent.mechanisms(run), plan)), delta, accountant)
                if spent.not_private or total > limit:
                    told = "infinite, since a run without noise used it" if spent.not_private else f"{total:.4g}"
                    raise UserError(f"privacy.budget: with this run epsilon on the sensitive set would be {told}, more than {limit:g} (ledger {self.path})")
            if spent.plans.get(run) != plan:
                self._append(handle, {"run": run, "plan": [_pack(m) for m in plan]})

    def charge(self, run: str, mechanism: Mechanism, identity: str) -> None:
        """Charge one use of `mechanism` before its output is used. A charge of the same identity again costs nothing.

        `identity` names everything on which the output depends (key, step, ranks, software): two uses may share it only if
        they are the same computation with the same noise.
        """
        with self._locked() as handle:
            self._append(handle, {"run": run, "charge": charge_name(run, identity), "mechanism": _pack(mechanism)})

    def not_private(self, run: str) -> None:
        """Write down that `run` uses the set without noise: what it makes must not be shared."""
        with self._locked() as handle:
            if run not in self.read().not_private:
                self._append(handle, {"run": run, "not_private": True})


def charge_name(run: str, identity: str) -> str:
    """The name under which a charge is kept; it tells nothing of the identity."""
    return hashlib.sha256(f"{run}|{identity}".encode()).hexdigest()[:32]


def _pack(mechanism: Mechanism) -> list:
    return [mechanism.noise_multiplier, mechanism.sample_rate, mechanism.count]


def _more(charged: tuple[Mechanism, ...], plan: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """The plan of a run and what it has charged already, whichever is more of each mechanism."""
    counts = {(m.noise_multiplier, m.sample_rate): m.count for m in charged}
    for m in plan:
        kind = (m.noise_multiplier, m.sample_rate)
        counts[kind] = max(counts.get(kind, 0), m.count)
    return tuple(Mechanism(*kind, count) for kind, count in counts.items())


def _open_mechanisms(plan: tuple[Mechanism, ...], charged: list[Mechanism]) -> list[Mechanism]:
    """Single uses of those mechanisms of a plan that are not charged in full: what a torn line may have been."""
    return [single for m in plan if charged.count(single := Mechanism(m.noise_multiplier, m.sample_rate)) < m.count]


def _cost(mechanism: Mechanism) -> float:
    """An order of cost for single uses: the Gaussian-DP parameter of the sampled mechanism at its central limit."""
    exponent = min(mechanism.noise_multiplier**-2, 700.0)
    return mechanism.sample_rate * math.sqrt(math.expm1(exponent))


def read(path: Path) -> Spent:
    """Read a ledger file. Raises UserError for a missing file or for a whole line that is no entry."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    charges: dict[str, tuple[str, Mechanism]] = {}
    plans: dict[str, tuple[Mechanism, ...]] = {}
    not_private: set[str] = set()
    torn = 0
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            entry = json.loads(line)
            run = entry["run"]
            if "plan" in entry:
                plans[run] = tuple(Mechanism(*m) for m in entry["plan"])
            elif "not_private" in entry:
                not_private.add(run)
            else:
                charges[entry["charge"]] = (run, Mechanism(*entry["mechanism"]))
        except (ValueError, KeyError, TypeError):
            torn += 1
            writer = re.match(rb'{"run": "([^"]*)"', line)
            for run in [writer[1].decode()] if writer else list(plans):
                still_open = _open_mechanisms(plans.get(run, ()), [m for r, m in charges.values() if r == run])
                if still_open:
                    charges[f"torn line {number} {run}"] = (run, max(still_open, key=_cost))
    return Spent(charges, plans, frozenset(not_private), torn)
