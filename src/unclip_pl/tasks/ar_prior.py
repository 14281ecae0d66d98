"""Training of the autoregressive priors: their losses."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.generation.priors import ARPriorSpec, MixturePriorSpec
from unclip_pl.parts.ar_prior import ARPriorPart, MixturePriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch


class ARPriorTask(ARPriorPart, EmbeddingTask):
    """Trains the autoregressive prior by cross-entropy on dot-product token and codes."""

    spec = ARPriorSpec
    batch_type = PriorBatch
    edges = ("net.code_embedding", "net.dot_head", "net.head")

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean cross-entropy in nats per token, over the dot-product token and all codes."""
        codes = self.codec.encode(batch.image_embed)  # (B, n)
        dot = self.dot(batch)
        text = self.drop_text(batch.text, generator)
        logits = self.net(text, dot, codes, self.codec.values(codes))
        n = codes.shape[1]
        nats = F.cross_entropy(logits.codes.flatten(0, 1), codes.flatten())
        if self.net.dot_buckets == 1:
            return nats
        return (n * nats + F.cross_entropy(logits.dot, dot)) / (n + 1)


class MixturePriorTask(MixturePriorPart, EmbeddingTask):
    """Trains the autoregressive prior of Gaussian mixtures by the likelihood of the coordinates."""

    spec = MixturePriorSpec
    batch_type = PriorBatch
    edges = ("net.code_embedding", "net.head")

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean nats per coordinate."""
        y = self.codec.coordinates(batch.image_embed)
        return -self.net(self.drop_text(batch.text, generator), y).log_prob(y).mean()
