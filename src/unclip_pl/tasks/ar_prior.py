"""Training of the autoregressive prior."""

from unclip_pl.parts.ar_prior import ARPriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch


class ARPriorTask(ARPriorPart, EmbeddingTask):
    """Trains the autoregressive prior."""

    batch_type = PriorBatch
    edges = ("net.code_embedding", "net.dot_head", "net.head")
