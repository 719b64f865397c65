"""The contents of a ledger, read back line by line."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.relation import ONE_IMAGE, Relation


@dataclass(frozen=True)
class Charge:
    """One use of a mechanism (its count is 1) by a run, for a part of the run's plan."""

    run: str
    part: str
    mechanism: SampledGaussian


@dataclass
class Spent:
    """The contents of a ledger. A torn line before the first plan costs nothing: nothing was released."""

    charges: dict[str, Charge] = field(default_factory=dict)  # by name
    plans: dict[str, dict[str, SampledGaussian]] = field(
        default_factory=dict
    )  # run -> what it announced, by part
    promises: dict[str, Relation] = field(default_factory=dict)  # run -> the relation that it announced
    not_private: set[str] = field(default_factory=set)  # runs that used the set without noise
    places: dict[str, str] = field(default_factory=dict)  # run -> where its directory was last
    budget: tuple[float, float] | None = None  # (epsilon, delta) of everything
    identity: str | None = None
    torn: int = 0

    @property
    def relations(self) -> set[Relation]:
        """The relations that the charges and plans are for: one, or none before the first plan."""
        runs = {charge.run for charge in self.charges.values()} | {run for run, p in self.plans.items() if p}
        # Older versions knew one relation, and did not write it down.
        return {self.promises.get(run, ONE_IMAGE) for run in runs}

    def mechanisms(self, run: str | None = None, behind: Collection[str] = ()) -> tuple[SampledGaussian, ...]:
        """All charges, equal mechanisms added up; with `run`, those of the run and those `behind` its
        weights.
        """
        # Equal mechanisms are added up, since composing n equal ones is one operation.
        counts = Counter(
            c.mechanism for name, c in self.charges.items() if run is None or c.run == run or name in behind
        )
        return tuple(replace(m, count=n) for m, n in sorted(counts.items(), key=lambda item: repr(item[0])))

    def by_part(self, run: str, behind: Collection[str] = ()) -> dict[str, tuple[SampledGaussian, ...]]:
        """`mechanisms` of one run for each part of its plan."""
        # Charges of other runs count too where their output is behind the weights.
        counted = {name: c for name, c in self.charges.items() if c.run == run or name in behind}
        parts = dict.fromkeys(c.part for c in counted.values())
        return {
            part: Spent({name: c for name, c in counted.items() if c.part == part}).mechanisms()
            for part in parts
        }

    def promised(self, run: str, plan: Mapping[str, SampledGaussian]) -> tuple[SampledGaussian, ...]:
        """For each run and part, what was charged or announced, whichever is more, with `plan` for `run`.

        An unfinished run may still use what it has announced.
        """
        # What was charged, raised to what was announced where that is more.
        counts: Counter[tuple[str, str, SampledGaussian]] = Counter(
            (c.run, c.part, c.mechanism) for c in self.charges.values()
        )
        for other, announced in {**self.plans, run: plan}.items():
            for part, planned in announced.items():
                key = (other, part, planned.single)
                counts[key] = max(counts[key], planned.count)
        return tuple(replace(m, count=n) for (_, _, m), n in counts.items())


class Reader:
    """Reads a ledger as it grows."""

    def __init__(self) -> None:
        self.spent, self.size, self.lines = Spent(), 0, 0

    def feed(self, data: bytes) -> None:
        """Read the next bytes of the file; a last line without a newline counts as torn."""
        # A line that cannot be parsed was torn by a crash. It counts as spent.
        for line in data.split(b"\n"):
            if line:
                self.lines += 1
                try:
                    self._entry(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self._torn(line)
        self.size += len(data)

    def _entry(self, entry: dict) -> None:
        spent = self.spent
        # One kind of entry per key; the order of these tests does not matter.
        if "ledger" in entry:
            spent.identity = spent.identity or entry["ledger"]
        elif "budget" in entry:
            spent.budget = (float(entry["budget"][0]), float(entry["budget"][1]))
        elif "plan" in entry:
            # Ledgers before version 2 did not name parts; nothing is released from their runs any more.
            plan = entry["plan"]
            by_part = plan.items() if isinstance(plan, dict) else enumerate(plan)
            spent.plans[entry["run"]] = {str(part): SampledGaussian.from_entry(m) for part, m in by_part}
            spent.promises[entry["run"]] = Relation(**entry.get("relation", {}))
        elif "not_private" in entry:
            spent.not_private.add(entry["run"])
        elif "place" in entry:
            spent.places[entry["run"]] = entry["place"]
        else:
            run, mechanism = entry["run"], SampledGaussian.from_entry(entry["mechanism"])
            spent.charges[entry["charge"]] = Charge(run, entry.get("part", ""), mechanism)

    def _torn(self, line: bytes) -> None:
        spent = self.spent
        spent.torn += 1
        writer = re.match(rb'{"run": "([^"]*)"', line)
        # What was torn is unknown: assume the most expensive use that was still open.
        for run in [writer[1].decode(errors="replace")] if writer else list(spent.plans):
            if still_open := self._still_open(run):
                part, mechanism = max(still_open, key=lambda item: _cost(item[1]))
                spent.charges[f"torn line {self.lines} {run}"] = Charge(run, part, mechanism)

    def _still_open(self, run: str) -> list[tuple[str, SampledGaussian]]:
        """Single uses of the planned mechanisms of a run that are not charged in full: candidates for a torn
        line.
        """
        charged = Counter(c.part for c in self.spent.charges.values() if c.run == run)
        return [
            (part, m.single) for part, m in self.spent.plans.get(run, {}).items() if charged[part] < m.count
        ]


def _cost(mechanism: SampledGaussian) -> float:
    """Order of single uses by cost: the Gaussian-DP parameter of the sampled mechanism in its limit."""
    # Capped, since exp overflows above.
    exponent = min(mechanism.noise_multiplier**-2, 700.0)
    return mechanism.sample_rate * math.sqrt(math.expm1(exponent))
