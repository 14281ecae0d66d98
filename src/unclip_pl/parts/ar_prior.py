"""The autoregressive priors: z_i as a sequence of principal components, quantised (§2.2 of the paper) or not (GIVT)."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.ar_prior import ARPriorTransformer, SequencePrior
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.mixture_prior import MixturePriorTransformer
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, NullText, Optimization
from unclip_pl.types import PriorBatch


class CodecPart(EmbeddingPart):
    """A part over the coordinates of a codec.

    Args:
        net: transformer over the coordinates.
        codec: file made by ``unclip codec``; empty when a checkpoint fills it.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_t; the codec is of unit-norm z_i.
        text_drop: share of captions replaced by the empty one.
        optimization: settings of the optimizer.
        null_text: condition in place of a dropped caption, see the subclasses.

    Raises:
        InputError: the codec does not fit the network, or belongs to another CLIP.
    """

    def __init__(
        self,
        net: SequencePrior,
        codec: str,
        statistics: str,
        scaling: Scaling,
        text_drop: float,
        optimization: Optimization | None,
        null_text: NullText,
    ) -> None:
        learned = net.text_embed_dim if null_text == "learned" else 0
        super().__init__(statistics, scaling, text_drop, optimization, learned_null=learned)
        self.net: Any = net
        self.codec = EmbeddingCodec(codec)
        if codec and statistics:
            self._check_codec(codec)

    def sizes(self, of: Any) -> dict[str, int]:
        """Return what a codec and a network have to agree on."""
        return {"code_length": of.code_length}

    def _check_codec(self, path: str) -> None:
        have, want = self.sizes(self.codec), self.sizes(self.net)
        if have != want:
            raise InputError(
                f"Expected a codec of ({', '.join(want)}) = {tuple(want.values())}, as the network's. {path} has "
                f"{tuple(have.values())}: fit it again with `unclip codec`, or change model.net."
            )
        if self.codec.fingerprint != self.space.fingerprint:
            raise InputError(
                f"Expected a codec of CLIP {self.space.fingerprint!r}, the data's. {path} was fitted on embeddings of "
                f"{self.codec.fingerprint!r}: fit it again with `unclip codec`."
            )

    @abstractmethod
    def nats(self, batch: PriorBatch) -> Tensor:
        """Return −log p(y | caption) in nats, (B,), of embeddings' coordinates y at unit variance.

        No caption is dropped. Priors over the coordinates of one codec are compared by it.
        """


class ARPriorPart(CodecPart):
    """An :class:`~unclip_pl.nn.ar_prior.ARPriorTransformer` over dot-product token and codes.

    Args:
        net: causal transformer.
        codec: file made by ``unclip codec``; empty when a checkpoint fills it.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_t; the codes are always of unit-norm z_i.
        text_drop: share of captions replaced by the empty one.
        optimization: settings of the optimizer.
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
        super().__init__(net, codec, statistics, scaling, text_drop, optimization, null_text)

    def sizes(self, of: Any) -> dict[str, int]:
        """Return what a codec and a network have to agree on."""
        return {"code_length": of.code_length, "buckets": of.buckets, "dot_buckets": of.dot_buckets}

    def nats(self, batch: PriorBatch) -> Tensor:
        """Return the nats (B,) of the codes and of the coordinates in their buckets, see :meth:`CodecPart.nats`.

        Those of the dot-product token, which the coordinates all but decide, are among them: a bound from above. On
        average it is too large by the logarithm of the token's number of values at most, as long as the network guesses
        the token no worse than evenly.
        """
        codes, dot = self.codec.encode(batch.image_embed), self.dot(batch)
        logits = self.net(self.space.scale_text(batch.text), dot, codes, self.codec.values(codes))
        of_codes = F.cross_entropy(logits.codes.mT, codes, reduction="none").sum(1)
        within = -self.codec.log_density(batch.image_embed).sum(1)
        return of_codes + F.cross_entropy(logits.dot, dot, reduction="none") + within

    def dot(self, batch: PriorBatch) -> Tensor:
        """Return the dot-product tokens, (B,); all are 0 where they are left out."""
        if self.net.dot_buckets == 1:
            return torch.zeros(len(batch.image_embed), dtype=torch.long, device=batch.image_embed.device)
        return self.codec.encode_dot(F.cosine_similarity(batch.image_embed, batch.text.embed, dim=-1))


class MixturePriorPart(CodecPart):
    """A :class:`~unclip_pl.nn.mixture_prior.MixturePriorTransformer` over the coordinates.

    Args:
        net: causal transformer.
        codec: file made by ``unclip codec``, of which the axes count and no buckets; empty when a checkpoint fills it.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_t; the coordinates are always of unit-norm z_i.
        text_drop: share of captions replaced by the empty one.
        optimization: settings of the optimizer.
        null_text: condition in place of a dropped caption: CLIP's features of the ``empty`` one, or a ``learned``
            vector, which data without those features need.

    Raises:
        InputError: the codec has another code length than the network, or belongs to another CLIP.
    """

    net: MixturePriorTransformer

    def __init__(
        self,
        net: MixturePriorTransformer,
        codec: str = "",
        statistics: str = "",
        scaling: Scaling = "unit",
        text_drop: float = 0.1,
        optimization: Optimization | None = None,
        null_text: NullText = "empty",
    ) -> None:
        super().__init__(net, codec, statistics, scaling, text_drop, optimization, null_text)

    def nats(self, batch: PriorBatch) -> Tensor:
        """Return the nats (B,), see :meth:`CodecPart.nats`; exact."""
        y = self.codec.coordinates(batch.image_embed)
        return -self.net(self.space.scale_text(batch.text), y).log_prob(y).sum(1)
