"""Training of the autoregressive priors."""

from unclip_pl.parts.ar_prior import ARPriorPart, MixturePriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch


class ARPriorTask(ARPriorPart, EmbeddingTask):
    """Trains the autoregressive prior."""

    batch_type = PriorBatch
    edges = ("net.code_embedding", "net.dot_head", "net.head")


class MixturePriorTask(MixturePriorPart, EmbeddingTask):
    """Trains the autoregressive prior of Gaussian mixtures."""

    batch_type = PriorBatch
    edges = ("net.code_embedding", "net.head")
