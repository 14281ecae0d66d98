"""The numbers of a comparison as pure functions, and three torchmetrics.Metric that pool batches and processes.

Features come from the caller: no function here loads a network.
"""

from unclip_pl.metrics.frechet import FrechetDistance
from unclip_pl.metrics.interval import Interval
from unclip_pl.metrics.rows import Rows

__all__ = ["FrechetDistance", "Interval", "Rows"]
