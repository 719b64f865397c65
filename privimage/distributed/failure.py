"""How ranks end together.

The first rank that fails writes so to the store; every rank then ends with the same status.

Otherwise a failing rank (a missing file on one node, a full disk) would leave the others in a collective
operation until its time-out, and each of them would report another error.
"""

import os
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist

from privimage.errors import tell

LOOK_SECONDS = 0.5
LEFT_SECONDS = 3.0  # how long the main rank, which serves the store, waits until all others have left
# how long the main rank may be out of reach before this one gives up; a short cut of the network only stalls
GONE_SECONDS = 20.0


class Watch(threading.Thread):
    """A thread of each rank that waits for the failure of another one, by its own connection to the store."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(name="privimage-watch", daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.closing = threading.Event()

    def run(self) -> None:
        """Look until closed; end this process with the status of the first rank that failed."""
        last_answer = time.monotonic()
        while not self.closing.wait(LOOK_SECONDS):
            try:
                # A non-blocking look: the main thread may be inside a collective at the same time.
                failed = self.store.check(["failed"])
                last_answer = time.monotonic()
            except RuntimeError:
                failed = False
                if time.monotonic() - last_answer > GONE_SECONDS:
                    tell(
                        (
                            f"rank {self.rank}: the main rank is gone; start all ranks again to go on from "
                            "the "
                            "last checkpoint"
                        ),
                        None,
                    )
                    self._leave(1)
            if failed:
                self._follow(int(self.store.get("failed").decode().split()[1]))

    def fail(self, message: str, status: int | None) -> NoReturn:
        """Print `message` and end this process with `status`, or with that of the rank that failed first."""
        self.closing.set()
        try:
            # Only one rank wins this compare-and-set: it prints, and all take its status.
            mine = f"{self.rank} {status or 1}"
            first = self.store.compare_set("failed", "", mine).decode()
            if first == mine:
                tell(
                    message, status
                )  # before the others end: their launcher may kill this rank as soon as it sees that
            self._follow(int(first.split()[1]))
        except RuntimeError:  # the store went with the main rank
            tell(message, status)
            self._leave(status or 1)

    def _follow(self, status: int) -> NoReturn:
        if self.rank > 0:
            self.store.add("left", 1)
        else:  # it serves the store, from which the others have yet to learn
            deadline = time.monotonic() + LEFT_SECONDS
            while self.store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS / 5)
        self._leave(status)

    def close(self) -> None:
        """Stop looking: the run is over on this rank."""
        self.closing.set()
        if self.is_alive():
            self.join()

    @staticmethod
    def _leave(status: int) -> NoReturn:
        # The main thread may be inside a collective operation that never returns: no exception reaches it
        # there.
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)
