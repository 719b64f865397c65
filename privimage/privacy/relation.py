"""Which sensitive sets are neighbours: the relation that the promise and every sensitivity are stated for."""

from dataclasses import asdict, dataclass
from typing import Literal

from privimage.config import Config


@dataclass(frozen=True)
class Relation:
    """Two sets are neighbours if one comes from the other by adding or removing one unit, or by replacing it.

    A unit is an image, or all images of one group. `grouping` is the digest of which images belong together
    (`ImageSet.grouping`), where the ledger has to know it, and empty elsewhere.
    """

    unit: Literal["image", "group"] = "image"
    neighbours: Literal["add-or-remove", "replace"] = "add-or-remove"
    grouping: str = ""

    @classmethod
    def of(cls, config: Config, grouping: str = "") -> "Relation":
        """The relation that a configuration names."""
        return cls(config.privacy.unit, config.privacy.neighbours, grouping)

    @property
    def replacement(self) -> bool:
        """Whether neighbours have the same number of units."""
        return self.neighbours == "replace"

    def __str__(self) -> str:
        if self.unit == "group":
            return (
                "replace all images of one group by those of another"
                if self.replacement
                else "add or remove all images of one group"
            )
        return "replace one image by another" if self.replacement else "add or remove one image"

    def to_entry(self) -> dict[str, str]:
        """Its form in the ledger and in account.json."""
        return asdict(self)


ONE_IMAGE = Relation()  # one image more or less
