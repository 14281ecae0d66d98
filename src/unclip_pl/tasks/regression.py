"""Training of the prior without noise."""

from unclip_pl.parts.regression import RegressionPriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch


class RegressionPriorTask(RegressionPriorPart, EmbeddingTask):
    """Trains the prior without noise."""

    batch_type = PriorBatch
    edges = ("net.out_proj",)
