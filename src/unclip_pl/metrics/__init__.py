"""The numbers of a comparison as pure functions, and as torchmetrics.Metric where batches and processes are pooled.

Features come from the caller: no function here loads a network.
"""

from unclip_pl.metrics.clip_score import CLIPScore, RetrievalRecall
from unclip_pl.metrics.embedding import EmbeddingCalibration
from unclip_pl.metrics.frechet import FrechetDistance
from unclip_pl.metrics.interval import Interval
from unclip_pl.metrics.neighbours import NeighbourScores

__all__ = [
    "CLIPScore",
    "EmbeddingCalibration",
    "FrechetDistance",
    "Interval",
    "NeighbourScores",
    "RetrievalRecall",
]
