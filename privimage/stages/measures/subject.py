"""What an evaluation looks at, and what it has found so far."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.evaluation.extractor import Extractor
from privimage.evaluation.utility import Labelled
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir


class Finished:
    """What this evaluation has measured so far, kept in `private/` so that a restart does not measure it
    again.

    Kept results count only for the same images and settings, and while the figures drawn with them are there;
    all ranks see the same ones.
    """

    def __init__(self, path: Path, figures: Path, key: str, world: World):
        self.path, self.world = path, world
        kept = read_json(path) if world.is_main and path.exists() and figures.exists() else {}
        self.results: dict = world.broadcast_object(kept if kept.get("key") == key else {"key": key})

    def get(self, name: str, compute: Callable[[], object]):
        """`compute()`, called on all ranks unless its result is known; the main rank's result counts.

        Raises Stopped.
        """
        if name not in self.results:
            if stop.agreed(self.world):
                raise Stopped("evaluate: finished measures are kept")
            self.results[name] = self.world.broadcast_object(compute())
            if self.world.is_main:
                write_json(self.path, self.results)
        return self.results[name]


@dataclass(frozen=True)
class Subject:
    """The sets of one evaluation, and where its figures go."""

    config: Config
    run: RunDir
    world: World
    train: ImageSet  # the sensitive set
    test: ImageSet | None  # held-out images, where there are any
    after: Labelled | None  # the synthetic set; None for a method that makes none
    before: (
        Labelled | None
    )  # images of the pretrained generator, labels -1 where it knows public classes only
    n_classes: int  # 1 if unlabelled
    extractor: Extractor
    vision: Extractor | None  # a second one, where its weights are given
    vectors: dict[str, np.ndarray] | None  # of words, for the similarity in meaning
    figures: Path
    finished: Finished
    ceiling: Finished  # measured on real images alone: it stays while the synthetic set changes


@dataclass(frozen=True)
class Measure:
    """One measure: the keys of report.json that it fills, and the figures that it draws.

    Whether a reader may take them for covered by the promise is decided by `report.covered` and
    `report.COVERED_FIGURES`, in which what nobody has thought about is not covered. `take` is called by all
    ranks; what the main rank returns counts.
    """

    keys: tuple[str, ...]
    take: Callable[[Subject], dict[str, Any]]
    figures: tuple[str, ...] = ()

    def results(self, subject: Subject) -> dict[str, Any]:
        """Measure. Raises RuntimeError where `take` fills other keys than it has declared."""
        results = self.take(subject)
        if subject.world.is_main and set(results) != set(self.keys):
            raise RuntimeError(f"a measure has filled {sorted(results)}, and declared {sorted(self.keys)}")
        return results
