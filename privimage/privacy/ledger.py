"""What was ever spent on one sensitive set.

An append-only file of JSON lines, fsynced before an output is used.

The first line is the identity of the ledger. Then each line is a *plan* (what a run is going to do, written
before it starts, with the relation of its promise), a *charge* (one use of a mechanism, written before its
output is used), a *budget* (of all runs on the set; the last one holds), a run that is *not private*, or the
*place* of a run's directory. A charge is named by everything its output depends on, so the same computation
with the same noise has one charge, whichever run or copy of a run does it.

A torn line, left by a crash in the middle of a write, counts as one use of the dearest mechanism that its run
had announced and not yet charged in full; if its run cannot be read, of every run's.

All runs of a ledger promise for one relation: what is spent on images and on groups of them, or on groups
that were formed otherwise, does not add up.

A run knows the ledger that it has written to by its `Head`. A file that is missing, or does not begin as the
run knows it, is refused.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.limits import Plans, require_relation, require_room
from privimage.privacy.relation import ONE_IMAGE, Relation
from privimage.privacy.spent import Reader, Spent
from privimage.storage import owner_only
from privimage.storage.files import fsync_folder
from privimage.storage.lock import Lock


@dataclass(frozen=True)
class Head:
    """The state of a ledger when a run last read it: its identity, and the size and digest of its content."""

    ledger: str
    entries: int
    size: int
    digest: str

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class Ledger:
    """The ledger of the sensitive set with the given fingerprint, in `folder`, shared by all runs on it."""

    def __init__(self, folder: Path, fingerprint: str, head: Head | None = None):
        """`head` is what the run knows of the ledger; None begins one where there is none.

        Raises UserError for a folder that cannot be made.
        """
        # The folder may be reached through a link; what counts is the place itself.
        owner_only.folder(folder.resolve())
        self.path = folder / f"{fingerprint[:32]}.jsonl"
        self._head, self._reader = head, Reader()
        self._pending: dict[str, dict] = {}  # charges that are not on the disk yet, by name
        with self._locked(create=head is None) as handle:
            if self._reader.spent.identity is None:
                self._append(handle, {"ledger": secrets.token_hex(8)})
                fsync_folder(folder)
        owner_only.restrict(self.path)

    @property
    def head(self) -> Head:
        """What the ledger held when it was last looked at."""
        assert self._head is not None  # the constructor looks
        return self._head

    @property
    def spent(self) -> Spent:
        """Everything charged or announced. Raises UserError if the file does not begin as it is known."""
        with self._locked():
            return self._reader.spent

    @contextmanager
    def _locked(self, create: bool = False) -> Iterator[int]:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o600)
        except OSError as error:
            raise UserError(
                self._refusal(
                    "missing" if isinstance(error, FileNotFoundError) else f"not readable ({error.strerror})"
                )
            ) from None
        try:
            # Runs on several nodes may share the file: every reading and writing is under this lock.
            with Lock(self.path, handle, wait=True):
                self._catch_up(handle)
                yield handle
        finally:
            os.close(handle)

    def _catch_up(self, handle: int) -> None:
        """Read new entries of other runs. Raises UserError for a file that does not begin as it is known."""
        data = _whole(handle)
        # A crash may have left half a line. It is ended here, and counted as a use by the reader.
        if data and not data.endswith(b"\n"):
            self._write(handle, b"\n")  # the end of a torn line: nobody else is writing now
            data += b"\n"
        # The beginning that this run knows must still be there, byte for byte; anything may have been
        # appended.
        if self._head is not None:
            begun = data[: self._head.size]
            if len(begun) < self._head.size:
                raise UserError(self._refusal("shorter than this run knows it, as an older copy is"))
            if hashlib.sha256(begun).hexdigest() != self._head.digest:
                raise UserError(self._refusal("another one than this run has written to"))
        self._reader.feed(data[self._reader.size :])
        self._know(data)

    def _know(self, data: bytes) -> None:
        identity = self._reader.spent.identity
        if identity is not None:
            self._head = Head(identity, self._reader.lines, len(data), hashlib.sha256(data).hexdigest())

    def _refusal(self, problem: str) -> str:
        known = (
            f"with identity {self._head.ledger} and its {self._head.entries} lines or more"
            if self._head
            else ""
        )
        return (
            f"{self.path}: the ledger of the sensitive set is {problem}; bring back the file {known}, or "
            "name its folder in privacy.ledger:"
            " without it nothing that this run has drawn can be proven, and nothing is released"
        )

    def _write(self, handle: int, line: bytes) -> None:
        try:
            if os.write(handle, line) != len(line):
                raise OSError(28, "no space left")
            os.fsync(handle)
        except OSError as error:
            raise UserError(
                f"{self.path}: the ledger could not be written ({error.strerror}); nothing was released, "
                "make room and run again"
            ) from None

    def _append(self, handle: int, entry: dict) -> None:
        self._write(handle, json.dumps(entry).encode() + b"\n")
        self._catch_up(handle)

    @contextmanager
    def announced(
        self,
        run: str,
        plan: Plans,
        budget: tuple[float, float] | None,
        accountant: str,
        relation: Relation = ONE_IMAGE,
    ) -> Iterator[None]:
        """Write down what `run` is going to do, by part, and the relation of its promise, before it starts.

        What is done inside happens only if it may do so.

        `budget` is (epsilon, delta) for everything ever done on this set; it is kept in the ledger and holds
        for all runs, whether they name it or not. Raises UserError if this run, with all that others have
        charged or announced, would exceed it, if another budget is kept already, or if others promise for
        another relation.
        """
        with self._locked() as handle:
            spent = self._reader.spent
            self._require(run, plan, budget, accountant, relation)
            # The caller keeps its plan here: if that fails, nothing is announced.
            yield
            if budget is not None and spent.budget is None:
                self._append(handle, {"budget": list(budget)})
            if spent.plans.get(run) != dict(plan):
                parts = {part: m.to_entry() for part, m in plan.items()}
                self._append(handle, {"run": run, "plan": parts, "relation": relation.to_entry()})

    def require_room(
        self,
        run: str,
        plan: Plans,
        budget: tuple[float, float] | None,
        accountant: str,
        relation: Relation = ONE_IMAGE,
    ) -> None:
        """Raise UserError where `announced` would, without writing anything."""
        with self._locked():
            self._require(run, plan, budget, accountant, relation)

    def _require(
        self, run: str, plan: Plans, budget: tuple[float, float] | None, accountant: str, relation: Relation
    ) -> None:
        require_relation(self._reader.spent, plan, relation, self.path)
        require_room(self._reader.spent, run, plan, budget, accountant, self.path)

    def charge(
        self,
        run: str,
        part: str,
        mechanism: SampledGaussian,
        name: str,
        limit: int,
        behind: Collection[str] = (),
        later: bool = False,
    ) -> bool:
        """Charge one use of `mechanism` before its output is used.

        False if the run may not use it any more, and nothing was written.

        `name` is derived from everything that the output depends on: a name that is here already is the same
        output, and costs nothing. A new one is written if the run has fewer than `limit` charges of this
        part, counting those `behind` its present state. With `later` it is written by `settle`, which the
        caller must call before anything that follows from the output leaves this process.
        """
        charges = self._reader.spent.charges if self._pending else self.spent.charges
        if name in charges or name in self._pending:
            return True
        # A run that was restored from an older state may have charges that its weights do not know, and a
        # copy has weights from charges of another run: both count towards the limit.
        counted = {known for known, charge in charges.items() if charge.run == run and charge.part == part}
        counted |= {known for known, entry in self._pending.items() if entry["part"] == part}
        if len(counted | set(behind)) >= limit:
            return False
        self._pending[name] = {"run": run, "charge": name, "part": part, "mechanism": mechanism.to_entry()}
        if not later:
            self.settle()
        return True

    def settle(self) -> None:
        """Bring the charges to the disk that were to be written later. Raises UserError for a full disk."""
        if not self._pending:
            return
        with self._locked() as handle:
            known = self._reader.spent.charges
            lines = [json.dumps(entry) for name, entry in self._pending.items() if name not in known]
            if lines:
                self._write(handle, ("\n".join(lines) + "\n").encode())
                self._catch_up(handle)
        self._pending.clear()

    def not_private(self, run: str) -> None:
        """Write down that `run` uses the set without noise: what it makes must not be shared."""
        with self._locked() as handle:
            if run not in self._reader.spent.not_private:
                self._append(handle, {"run": run, "not_private": True})

    def place(self, run: str, path: Path) -> None:
        """Write down where the directory of `run` is."""
        with self._locked() as handle:
            if self._reader.spent.places.get(run) != str(path):
                self._append(handle, {"run": run, "place": str(path)})

    def set_budget(self, budget: tuple[float, float]) -> None:
        """Replace the budget of the set: a decision of whoever owns the data."""
        with self._locked() as handle:
            if self._reader.spent.budget != budget:
                self._append(handle, {"budget": list(budget)})


def _whole(handle: int) -> bytes:
    # pread may return less than asked for.
    size, parts, at = os.fstat(handle).st_size, [], 0
    while at < size and (part := os.pread(handle, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def read(path: Path) -> Spent:
    """Read a ledger file. Raises UserError for a missing file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    reader = Reader()
    reader.feed(data)
    return reader.spent
