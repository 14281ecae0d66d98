"""The autoregressive prior: z_i as a sequence of quantised principal components (§2.2 of the paper)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.ar_prior import ARPriorTransformer
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, NullText, Optimization
from unclip_pl.types import PriorBatch


class ARPriorPart(EmbeddingPart):
    """An :class:`~unclip_pl.nn.ar_prior.ARPriorTransformer` by cross-entropy on dot-product token and codes.

    Args:
        net: causal transformer.
        codec: file made by ``unclip codec``; empty when a checkpoint fills it.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_t; the codes are always of unit-norm z_i.
        text_drop: share of captions replaced by the empty one.
        optimization: settings of AdamW.
        null_text: condition in place of a dropped caption: CLIP's features of the ``empty`` one, or a ``learned``
            vector, which data without those features need.

    Raises:
        InputError: the codec has another code length or bucket count than the network, or belongs to another CLIP.
    """

    net: ARPriorTransformer

    def __init__(
        self,
        net: ARPriorTransformer,
        codec: str = "",
        statistics: str = "",
        scaling: Scaling = "unit",
        text_drop: float = 0.1,
        optimization: Optimization | None = None,
        null_text: NullText = "empty",
    ) -> None:
        learned = net.text_embed_dim if null_text == "learned" else 0
        super().__init__(statistics, scaling, text_drop, optimization, learned_null=learned)
        self.net = net
        self.codec = EmbeddingCodec(codec)
        if codec and statistics:
            self._check_codec(codec)

    def _check_codec(self, path: str) -> None:
        have = (self.codec.code_length, self.codec.buckets, self.codec.dot_buckets)
        want = (self.net.code_length, self.net.buckets, self.net.dot_buckets)
        if have != want:
            raise InputError(
                f"Expected a codec of (code_length, buckets, dot_buckets) = {want}, as the network's. {path} has "
                f"{have}: fit it again with `unclip codec`, or change model.net."
            )
        if self.codec.fingerprint != self.space.fingerprint:
            raise InputError(
                f"Expected a codec of CLIP {self.space.fingerprint!r}, the data's. {path} was fitted on embeddings of "
                f"{self.codec.fingerprint!r}: fit it again with `unclip codec`."
            )

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean cross-entropy in nats per token, over the dot-product token and all codes."""
        codes = self.codec.encode(batch.image_embed)  # (B, n)
        dot = self._dot(batch)
        text = self.drop_text(batch.text, generator)
        logits = self.net(text, dot, codes, self.codec.values(codes))
        n = codes.shape[1]
        nats = F.cross_entropy(logits.codes.flatten(0, 1), codes.flatten())
        if self.net.dot_buckets == 1:
            return nats
        return (n * nats + F.cross_entropy(logits.dot, dot)) / (n + 1)

    def _dot(self, batch: PriorBatch) -> Tensor:
        """Return the dot-product tokens, (B,); all are 0 where they are left out."""
        if self.net.dot_buckets == 1:
            return torch.zeros(len(batch.image_embed), dtype=torch.long, device=batch.image_embed.device)
        return self.codec.encode_dot(F.cosine_similarity(batch.image_embed, batch.text.embed, dim=-1))
