"""What the checks before a run look at on one rank, and how findings of all ranks are combined."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from privimage.config import Config
from privimage.config.stages import DRAWING
from privimage.data.decode import Source
from privimage.data.sources import count_of
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.storage.rundir import RunDir

CHARGED = {*DRAWING} - {"select"}  # stages that open the account, as a query does


@dataclass
class Visit:
    """Input of the checks of one run on one rank, and what they have found."""

    config: Config
    run: RunDir
    world: World
    stages: frozenset[str]  # those that are about to run
    sensitive: Source | None = None  # None where it could not be opened, or is not needed
    public: tuple[int, tuple[str, ...]] | None = None  # of the public set: images, classes; on the main rank
    sizes: dict[str, int] = field(default_factory=dict)  # parameters of each network; on the main rank
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # of what may make the result useless; the run goes on

    def needs(self, stages: Iterable[str]) -> bool:
        """Whether one of `stages` is about to run."""
        return not self.stages.isdisjoint(stages)

    def attempt(self, check: "Check") -> None:
        """Run a check and keep the mistakes that it reports."""
        try:
            for line in check(self) or ():
                self.mistakes.append(line)
        except UserError as error:
            self.mistakes.append(str(error))
        # A check that needs a missing package cannot run; the package itself is reported by another one.
        except ModuleNotFoundError:
            if not self.mistakes:  # a missing package has been reported already
                raise

    @property
    def count(self) -> int | None:
        """N, the number of units of the sensitive set: as it is, else as it is stated."""
        if self.sensitive is None:
            return self.config.data.sensitive.count
        return count_of(self.config, self.sensitive)

    @property
    def rows(self) -> int | None:
        """Rows of the histogram, as far as they are known."""
        if self.sensitive is None:
            return None
        return len(self.sensitive.classes) if self.config.data.sensitive.labelled else 1

    @property
    def columns(self) -> int | None:
        """Columns of the histogram: public classes or clusters, as far as they are known."""
        if self.config.query.semantics == "clusters":
            return self.config.query.clusters
        return len(self.public[1]) if self.public else None

    @property
    def opens_account(self) -> bool:
        """Whether noise is going to be drawn, or a release to be made."""
        return self.needs(CHARGED) or ("select" in self.stages and self.config.spec.pretraining == "selected")


Check = Callable[[Visit], Iterable[str] | None]


def together(found: list[list[str]]) -> list[str]:
    """All mistakes, each once, with the ranks that have found it unless the main rank has."""
    lines = []
    for line in dict.fromkeys(line for mistakes in found for line in mistakes):
        ranks = [rank for rank, mistakes in enumerate(found) if line in mistakes]
        if ranks[0] == 0:
            lines.append(line)  # the main rank alone looks at what all share
        else:
            lines.append(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {line}")
    return lines
