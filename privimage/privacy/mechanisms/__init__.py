"""The mechanisms by which a run may draw from the sensitive set, by the stage that uses them."""

from privimage.privacy.mechanisms.base import Mechanism
from privimage.privacy.mechanisms.central import CentralImages
from privimage.privacy.mechanisms.classifier import NoisyGradients
from privimage.privacy.mechanisms.dpsgd import DPSGD
from privimage.privacy.mechanisms.embedding import MeanEmbedding, WarmEmbedding
from privimage.privacy.mechanisms.histogram import NearestHistogram, SemanticHistogram
from privimage.privacy.mechanisms.labels import LabelCounts
from privimage.privacy.mechanisms.moments import ClassMeans, Covariance

# In the order in which a run uses them.
MECHANISMS: dict[str, type[Mechanism]] = {
    kind.stage: kind
    for kind in (
        SemanticHistogram,
        ClassMeans,
        Covariance,
        WarmEmbedding,
        CentralImages,
        NoisyGradients,
        DPSGD,
        MeanEmbedding,
        NearestHistogram,
        LabelCounts,
    )
}

__all__ = [
    "DPSGD",
    "MECHANISMS",
    "CentralImages",
    "ClassMeans",
    "Covariance",
    "LabelCounts",
    "MeanEmbedding",
    "Mechanism",
    "NearestHistogram",
    "NoisyGradients",
    "SemanticHistogram",
    "WarmEmbedding",
]
