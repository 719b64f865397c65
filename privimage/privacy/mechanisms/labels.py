"""Noisy counts of the labels, for synthetic sets with the proportions of the sensitive one."""

from dataclasses import dataclass
from typing import ClassVar, Self

from privimage.config import Config
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.mechanisms.histogram import Histogram
from privimage.privacy.relation import Relation


@dataclass(frozen=True, kw_only=True)
class LabelCounts(OneUse, Histogram):
    """One histogram, in which each image votes for its label."""

    name: ClassVar[str] = "label counts"
    stage: ClassVar[str] = "synthesize"

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`; it is the same for any `count`."""
        return cls(noise_multiplier=0.0, relation=Relation.of(config), per_image=1)

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose synthetic labels have the proportions of the sensitive ones."""
        settings = config.synthesize
        return Share(None, settings.max_rise) if settings.labels == "noisy" else None
