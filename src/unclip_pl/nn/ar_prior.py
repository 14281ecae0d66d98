"""The autoregressive prior's network: z_i as a sequence of codes after its caption (§2.2 of the paper)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.layers import Prefix, PrefixTransformer, causal_mask, zeroed
from unclip_pl.nn.recorded import recorded
from unclip_pl.nn.text import TextTransformer
from unclip_pl.streams import Streams, fill_like
from unclip_pl.types import TextFeatures


class CodeEmbedding(nn.Module, ABC):
    """How a code enters the transformer. Built by the network as ``CodeEmbedding(width, code_length, buckets)``."""

    @abstractmethod
    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """(B, m) codes at ``position`` (m,) and their buckets' values (unit variance) → (B, m, width)."""


class FourierCodeEmbedding(CodeEmbedding):
    """Fourier features of the bucket's value, one projection for all positions: neighbouring buckets look alike.

    Args:
        width: of the transformer.
        code_length: not needed.
        buckets: not needed.
        frequencies: number of them, geometric from 1/8 to 16 cycles per standard deviation.
    """

    frequency: Tensor

    def __init__(self, width: int, code_length: int, buckets: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * pi * torch.logspace(-3, 4, frequencies, base=2.0))
        self.proj = nn.Linear(2 * frequencies + 1, width)

    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """See :class:`CodeEmbedding`; ``codes`` and ``position`` are not looked at."""
        angle = values[..., None] * self.frequency
        return self.proj(torch.cat([values[..., None], angle.cos(), angle.sin()], dim=-1))


class TableCodeEmbedding(CodeEmbedding):
    """A learned vector for every (position, code). Overfits small data.

    Args:
        width: of the transformer.
        code_length: n.
        buckets: codes per position.
    """

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(code_length * buckets, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """See :class:`CodeEmbedding`; ``values`` are not looked at."""
        return self.table(codes + position * self.buckets)


class CodeHead(nn.Module, ABC):
    """How codes leave the transformer. Built by the network as ``CodeHead(width, code_length, buckets)``.

    Every bucket holds as many embeddings, so uniform logits are right as long as no caption is read, and every head
    starts with them. From random ones the way there is to shrink the last norm's gain, and with it the gradient by
    which the caption would be read: runs have stayed there for good.
    """

    @abstractmethod
    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """(B, m, width) from which the codes at ``position`` (m,) are read → logits (B, m, buckets)."""


class SharedHead(CodeHead):
    """One linear map for all positions; the hidden state knows which one it is.

    Args:
        width: of the transformer.
        code_length: not needed.
        buckets: codes per position.
    """

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.proj = zeroed(nn.Linear(width, buckets))

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """See :class:`CodeHead`."""
        return self.proj(hidden)


class CosineHead(CodeHead):
    """Logits as a cosine series over the buckets' ranks, one for all positions: a code teaches its neighbours too.

    A free logit for each bucket learns from the few tokens alone that fall there, which is little where data are few.

    Args:
        width: of the transformer.
        code_length: not needed.
        buckets: codes per position, in order of their values.
        terms: of the series, the constant aside; more than ``buckets − 1`` have nothing to add and are left out.
    """

    cosines: Tensor

    def __init__(self, width: int, code_length: int, buckets: int, terms: int = 64) -> None:
        super().__init__()
        order = torch.arange(1, min(terms, buckets - 1) + 1)
        rank = (torch.arange(buckets) + 0.5) / buckets
        self.proj = zeroed(nn.Linear(width, len(order)))
        # Scaled so that logits are as large as those of a plain linear map with weights as large.
        self.register_buffer("cosines", torch.cos(pi * order[:, None] * rank).mul((2 / len(order)) ** 0.5), False)

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """See :class:`CodeHead`."""
        return self.proj(hidden) @ self.cosines


class PerPositionHead(CodeHead):
    """A linear map of its own for every position.

    Args:
        width: of the transformer.
        code_length: n.
        buckets: codes per position.
    """

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(code_length, width, buckets))
        self.bias = nn.Parameter(torch.zeros(code_length, buckets))

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """See :class:`CodeHead`."""
        return torch.einsum("bmw,mwv->bmv", hidden, self.weight[position]) + self.bias[position]


class ARLogits(NamedTuple):
    """Unnormalised log-probabilities of every token, each given the caption and the tokens before it."""

    dot: Tensor  # (B, dot_buckets), the quantised z_i·z_t
    codes: Tensor  # (B, n, buckets)


def upper_quantile(probability: Tensor, quantile: float) -> Tensor:
    """The distribution (…, V) given that the draw lies above its own ``quantile``; the last dim is ordered.

    0 changes nothing; 0.5 is the paper's "top half". The bucket at the border keeps its share above it.
    """
    above = (probability.cumsum(-1) - quantile).clamp(min=0)
    kept = torch.minimum(probability, above)
    return kept / kept.sum(-1, keepdim=True)


def draw(probability: Tensor, *, generator: Streams | None = None) -> Tensor:
    """One index (…) from each distribution (…, V): the first of V exponential clocks, rates p, to ring.

    ``torch.multinomial`` does the same, but on a GPU it waits for the device at every call. The clocks are drawn on the
    generator's device, then moved.
    """
    clocks = fill_like(probability, lambda rows, stream: rows.exponential_(generator=stream), generator)
    return (probability / clocks).argmax(-1)


def check_draws(temperature: float, dot_quantile: float, candidates: int) -> None:
    """The settings of :meth:`ARPriorTransformer.generate`.

    Raises:
        ValueError: one of them is out of its range.
    """
    if not (temperature > 0 and 0 <= dot_quantile < 1 and candidates > 0):
        got = f"{temperature}, {dot_quantile}, {candidates}"
        raise InputError(f"Expected temperature > 0, 0 <= dot_quantile < 1, candidates >= 1. Got {got}.")


class ARPriorTransformer(PrefixTransformer):
    """Causal transformer over [text states …, z_t, dot, code 0 … code n−2]; each output predicts the next token.

    ``dot`` is the quantised z_i·z_t, predicted at z_t; code 0 is predicted at ``dot``. The codes are those of an
    :class:`~unclip_pl.nn.codec.EmbeddingCodec`, whose bucket values come along with them.

    Args:
        embed_dim: d of CLIP.
        text_width: W of CLIP's text tower.
        context_length: the longest text.
        code_length: n, codes per embedding.
        buckets: values of a code.
        dot_buckets: values of the dot-product token.
        width: of the residual stream.
        layers: number of blocks.
        heads: attention heads.
        code_embedding: class of the way in; gets width, code_length and buckets from here.
        head: class of the way out; likewise.
        text_encoder: reads the caption's token ids and is trained along (the paper's, 2048 × 24); None takes the
            states of frozen CLIP.
    """

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        code_length: int,
        buckets: int = 1024,
        dot_buckets: int = 256,
        width: int = 1664,
        layers: int = 24,
        heads: int = 26,
        code_embedding: Callable[[int, int, int], CodeEmbedding] = FourierCodeEmbedding,
        head: Callable[[int, int, int], CodeHead] = SharedHead,
        text_encoder: TextTransformer | None = None,
    ) -> None:
        if text_encoder is not None:
            text_width = text_encoder.width
        super().__init__(embed_dim, text_width, context_length, code_length, width, layers, heads)
        self.text_encoder = text_encoder
        self.code_length = code_length
        self.buckets = buckets
        self.dot_buckets = dot_buckets
        self.dot_embedding = nn.Embedding(dot_buckets, width)
        self.dot_head = zeroed(nn.Linear(width, dot_buckets))
        self.code_embedding = code_embedding(width, code_length, buckets)
        self.head = head(width, code_length, buckets)
        nn.init.normal_(self.dot_embedding.weight, std=width**-0.5)

    def token_states(self, text: TextFeatures) -> Tensor:
        """(B, L, W) of the text transformer of its own, or CLIP's."""
        return text.states if self.text_encoder is None else self.text_encoder(text.tokens, text.mask).states

    def forward(self, text: TextFeatures, dot: Tensor, codes: Tensor, values: Tensor) -> ARLogits:
        """Logits of every token given the true ones before it.

        Args:
            text: of B captions, z_t scaled.
            dot: (B,) int64, the codec's :meth:`~unclip_pl.nn.codec.EmbeddingCodec.encode_dot`.
            codes: (B, n) int64.
            values: (B, n) the codes' bucket values at unit variance.
        """
        prefix = self.prefix_tokens(text)
        position = torch.arange(self.code_length, device=codes.device)
        code_tokens = self.code_embedding(codes[:, :-1], values[:, :-1], position[:-1])
        suffix = torch.cat([self.dot_embedding(dot)[:, None], code_tokens], dim=1) + self.suffix_positions
        mask = causal_mask(F.pad(text.mask, (0, 1 + self.code_length), value=True))
        tokens = torch.cat([prefix, suffix], dim=1)
        hidden, _ = self.transformer(tokens, mask, start=prefix.shape[1] - 1)
        hidden = self.final_ln(hidden)  # (B, 1 + n, width)
        return ARLogits(self.dot_head(hidden[:, 0]), self.head(hidden[:, 1:], position))

    def encode_prefix(self, text: TextFeatures) -> tuple[Tensor, Prefix]:
        """What is read at z_t, (B, width), and the captions' keys and values."""
        tokens = self.prefix_tokens(text)
        keys = F.pad(text.mask, (0, 1), value=True)
        hidden, layers = self.transformer(tokens, causal_mask(keys), start=tokens.shape[1] - 1)
        return self.final_ln(hidden[:, 0]), Prefix(layers, keys)

    @torch.no_grad()
    def generate(
        self,
        text: TextFeatures,
        *,
        values_of: Tensor,
        unconditional: TextFeatures | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        dot_quantile: float = 0.5,
        candidates: int = 1,
        generator: Streams | None = None,
    ) -> Tensor:
        """Codes (B, candidates, n) for B captions, token by token with cached keys and values.

        Args:
            text: of B captions, z_t scaled.
            values_of: (n, buckets) bucket values at unit variance
                (:attr:`~unclip_pl.nn.codec.EmbeddingCodec.value_table`).
            unconditional: features of the empty caption, batch size 1 or B; needed unless ``guidance`` is 1.
            guidance: scale g of logits u + g·(c − u); 1 is off, 0 ignores the caption.
            temperature: divides all logits.
            dot_quantile: the dot-product token is drawn from above this quantile of its distribution; the paper takes
                the top half, 0 is plain sampling.
            candidates: draws per caption; they share its prefix.
            generator: of the draws; one for each caption where they must not depend on the others.

        Raises:
            ValueError: guidance without an unconditional caption, or a number outside its range.
        """
        check_draws(temperature, dot_quantile, candidates)
        if guidance != 1 and unconditional is None:
            raise InputError(f"Guidance {guidance} needs the features of the empty caption (unconditional).")
        hidden, prefix = self.encode_prefix(text)  # (B, width)
        if guidance != 1 and unconditional is not None:
            hidden, prefix = self._with_null(hidden, prefix, unconditional)  # (2B, width)
        branches = len(hidden) // len(text.embed)

        def distribution(logits: Tensor) -> Tensor:
            cond, *uncond = logits.float().chunk(branches)
            guided = uncond[0].lerp(cond, guidance) if uncond else cond
            return (guided / temperature).softmax(-1)

        p_dot = upper_quantile(distribution(self.dot_head(hidden)), dot_quantile)
        dot = draw(p_dot.repeat_interleave(candidates, dim=0), generator=generator)  # (B·candidates,)
        filled = prefix.mask.shape[1]
        cache = prefix.repeat(candidates).pad(filled + self.code_length)

        def after(token: Tensor, position: Tensor) -> Tensor:
            """Distribution (B·candidates, buckets) of the code at ``position`` (1,), which follows ``token``."""
            hidden = self._step(token.repeat(branches, 1, 1), cache, filled + position, position)
            return distribution(self.head(hidden, position))[:, 0]

        def advance(code: Tensor, position: Tensor) -> Tensor:
            """The same after the code (B·candidates, 1) before it."""
            before = position - 1
            return after(self.code_embedding(code, values_of[before][0][code], before), position)

        first, *others = torch.arange(self.code_length, device=dot.device).split(1)
        codes = [draw(after(self.dot_embedding(dot)[:, None], first), generator=generator)[:, None]]
        step = recorded(advance, dot.device)
        for position in others:
            codes.append(draw(step(codes[-1], position), generator=generator)[:, None])
        return torch.cat(codes, dim=1).unflatten(0, (-1, candidates))

    def _with_null(self, hidden: Tensor, prefix: Prefix, unconditional: TextFeatures) -> tuple[Tensor, Prefix]:
        """The empty caption's half of the batch appended: one prefix serves every caption."""
        null_hidden, null = self.encode_prefix(unconditional)
        rows = len(hidden)
        null = null.expand(rows) if len(null_hidden) == 1 else null
        return torch.cat([hidden, null_hidden.expand(rows, -1)]), prefix.cat(null)

    def _step(self, token: Tensor, cache: Prefix, slot: Tensor, position: Tensor) -> Tensor:
        """Feeds the token (rows, 1, width) before code ``position`` (1,) into its slot (1,); (rows, 1, width)."""
        cache.mask.index_fill_(1, slot, True)
        mask = cache.mask[:, None, None]
        token = token + self.suffix_positions[:, position]
        hidden, _ = self.transformer(token, mask, cache.layers, slot=slot)
        return self.final_ln(hidden)
