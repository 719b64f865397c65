"""The mechanisms by which a run may draw from the sensitive set, by the stage that uses them."""

from privimage.privacy.mechanisms.base import Mechanism
from privimage.privacy.mechanisms.dpsgd import DPSGD
from privimage.privacy.mechanisms.embedding import MeanEmbedding
from privimage.privacy.mechanisms.histogram import NearestHistogram, SemanticHistogram

MECHANISMS: dict[str, type[Mechanism]] = {
    kind.stage: kind for kind in (SemanticHistogram, DPSGD, MeanEmbedding, NearestHistogram)
}

__all__ = ["DPSGD", "MECHANISMS", "MeanEmbedding", "Mechanism", "NearestHistogram", "SemanticHistogram"]
