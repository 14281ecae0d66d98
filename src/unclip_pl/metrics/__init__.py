"""What a comparison reports: each number as a pure function, and as a torchmetrics.Metric where pooling needs more than
the mean of per-caption values. Features come from the caller: nothing here loads a network.
"""

from unclip_pl.metrics.attributes import AttributeMatch
from unclip_pl.metrics.clip_score import CLIPScore, RetrievalRecall
from unclip_pl.metrics.diversity import VendiScore
from unclip_pl.metrics.embedding import EmbeddingCalibration
from unclip_pl.metrics.frechet import FrechetDistance
from unclip_pl.metrics.interval import Interval
from unclip_pl.metrics.neighbours import NeighbourScores

__all__ = [
    "AttributeMatch",
    "CLIPScore",
    "EmbeddingCalibration",
    "FrechetDistance",
    "Interval",
    "NeighbourScores",
    "RetrievalRecall",
    "VendiScore",
]
