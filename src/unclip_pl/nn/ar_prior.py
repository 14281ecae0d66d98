"""The autoregressive prior's network: z_i as a sequence of codes after its caption (§2.2 of the paper)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.codec import require_dot
from unclip_pl.nn.kernels import recorded
from unclip_pl.nn.layers import Prefix, PrefixTransformer, causal_mask, zeroed
from unclip_pl.nn.text import TextTransformer
from unclip_pl.streams import Streams, fill_like
from unclip_pl.types import TextFeatures


class CodeEmbedding(nn.Module, ABC):
    """The way of a code into the transformer. The network builds ``CodeEmbedding(width, code_length, buckets)``."""

    @abstractmethod
    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """Embed codes (B, m) as (B, m, width).

        Args:
            codes: (B, m) int64.
            values: (B, m) their buckets' values, at unit variance.
            position: (m,) their positions in the sequence of codes.
        """


class FourierCodeEmbedding(CodeEmbedding):
    """Fourier features of the bucket's value, one projection for all positions: neighbouring buckets look alike.

    Args:
        width: width of the transformer.
        code_length: not needed.
        buckets: not needed.
        frequencies: number of frequencies, geometric from 1/8 to 16 cycles per standard deviation.
    """

    frequency: Tensor

    def __init__(self, width: int, code_length: int, buckets: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * pi * torch.logspace(-3, 4, frequencies, base=2.0))
        self.proj = nn.Linear(2 * frequencies + 1, width)

    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """Embed the values; ``codes`` and ``position`` are not looked at."""
        return self.of(values)

    def of(self, values: Tensor) -> Tensor:
        """Embed numbers (B, m) of unit variance as (B, m, width)."""
        angle = values[..., None] * self.frequency
        return self.proj(torch.cat([values[..., None], angle.cos(), angle.sin()], dim=-1))


class CodeHead(nn.Module, ABC):
    """The way of codes out of the transformer. The network builds ``CodeHead(width, code_length, buckets)``.

    Every bucket holds as many embeddings, so uniform logits are right until the caption is read, and every head starts
    with them. Random logits get there by shrinking the last norm's gain, and with it the gradient that would teach the
    network to read the caption: some runs never came out of that.
    """

    @abstractmethod
    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Return logits (B, m, buckets) of the codes.

        Args:
            hidden: (B, m, width) outputs of the transformer.
            position: (m,) positions of the codes in their sequence.
        """


class SharedHead(CodeHead):
    """One linear map for all positions; the hidden state knows which one it is.

    Args:
        width: width of the transformer.
        code_length: not needed.
        buckets: number of values of a code.
    """

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.proj = zeroed(nn.Linear(width, buckets))

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Return the logits, see :class:`CodeHead`."""
        return self.proj(hidden)


class CosineHead(CodeHead):
    """Logits as a cosine series over the buckets' ranks, one for all positions: a code teaches its neighbours too.

    A free logit for each bucket would learn only from the tokens that fall there: too few where data are scarce.

    Args:
        width: width of the transformer.
        code_length: not needed.
        buckets: number of values of a code, in order of their values.
        terms: number of cosines, without the constant; more than ``buckets − 1`` add nothing and are left out.
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
        """Return the logits, see :class:`CodeHead`."""
        return self.proj(hidden) @ self.cosines


class ARLogits(NamedTuple):
    """Unnormalised log-probabilities of every token, each given the caption and the tokens before it."""

    dot: Tensor  # (B, dot_buckets), the quantised z_i·z_t
    codes: Tensor  # (B, n, buckets)


def upper_quantile(probability: Tensor, quantile: float) -> Tensor:
    """Return the distribution (…, V) of draws above their own ``quantile``; the last dimension is ordered.

    0 changes nothing; 0.5 is the paper's "top half". The bucket at the border keeps its share above it.
    """
    above = (probability.cumsum(-1) - quantile).clamp(min=0)
    kept = torch.minimum(probability, above)
    return kept / kept.sum(-1, keepdim=True)


def draw(probability: Tensor, *, generator: Streams | None = None) -> Tensor:
    """Draw one index (…) from each distribution (…, V): the first of V exponential clocks, rates p, to ring.

    ``torch.multinomial`` does the same, but on a GPU it waits for the device at every call. The clocks are drawn on the
    generator's device, then moved.
    """
    clocks = fill_like(probability, lambda rows, stream: rows.exponential_(generator=stream), generator)
    return (probability / clocks).argmax(-1)


def check_draws(temperature: float, dot_quantile: float, candidates: int) -> None:
    """Refuse settings that :meth:`ARPriorTransformer.generate` cannot follow.

    Raises:
        InputError: one of them is out of its range.
    """
    if not (temperature > 0 and 0 <= dot_quantile < 1 and candidates > 0):
        got = f"{temperature}, {dot_quantile}, {candidates}"
        raise InputError(f"Expected temperature > 0, 0 <= dot_quantile < 1, candidates >= 1. Got {got}: change them.")


def guided_probability(logits: Tensor, guidance: float, temperature: float) -> Tensor:
    """Return the distribution (B, …) of logits; with guidance they are (2B, …), the second half unconditional."""
    logits = logits.float()
    if guidance != 1:
        cond, uncond = logits.chunk(2)
        logits = uncond.lerp(cond, guidance)
    return (logits / temperature).softmax(-1)


class SequencePrior(PrefixTransformer):
    """A causal transformer that says z_i number by number after [text states …, z_t], at once or with a cache."""

    def outputs(self, text: TextFeatures, suffix: Tensor) -> Tensor:
        """Return the outputs at z_t and at m tokens behind it, (B, 1 + m, width).

        Args:
            text: features of B captions, z_t scaled.
            suffix: (B, m, width) tokens, without their positions.
        """
        text = self.seen(text)
        prefix = self.prefix_tokens(text)
        mask = causal_mask(F.pad(text.mask, (0, 1 + suffix.shape[1]), value=True))
        tokens = torch.cat([prefix, suffix + self.suffix_positions], dim=1)
        hidden, _ = self.transformer(tokens, mask, start=prefix.shape[1] - 1)
        return self.final_ln(hidden)

    def encode_prefix(self, text: TextFeatures) -> tuple[Tensor, Prefix]:
        """Return the output at z_t, (B, width), and the captions' keys and values."""
        text = self.seen(text)
        tokens = self.prefix_tokens(text)
        keys = F.pad(text.mask, (0, 1), value=True)
        hidden, layers = self.transformer(tokens, causal_mask(keys), start=tokens.shape[1] - 1)
        return self.final_ln(hidden[:, 0]), Prefix(layers, keys)

    def with_null(self, hidden: Tensor, prefix: Prefix, unconditional: TextFeatures) -> tuple[Tensor, Prefix]:
        """Append the empty caption's half of the batch: one prefix serves every caption."""
        null_hidden, null = self.encode_prefix(unconditional)
        rows = len(hidden)
        null = null.expand(rows) if len(null_hidden) == 1 else null
        return torch.cat([hidden, null_hidden.expand(rows, -1)]), prefix.cat(null)

    def step(self, token: Tensor, cache: Prefix, slot: Tensor, position: Tensor) -> Tensor:
        """Feed a token into the cache, and return the output there, (rows, 1, width).

        Args:
            token: (rows, 1, width), without its position.
            cache: keys and values of what stands before, with room for more.
            slot: (1,) where the token goes in the cache.
            position: (1,) its place among the tokens behind z_t.
        """
        cache.mask.index_fill_(1, slot, True)
        mask = cache.mask[:, None, None]
        token = token + self.suffix_positions[:, position]
        hidden, _ = self.transformer(token, mask, cache.layers, slot=slot)
        return self.final_ln(hidden)


class ARPriorTransformer(SequencePrior):
    """Causal transformer over [text states …, z_t, dot, code 0 … code n−2]; each output predicts the next token.

    ``dot`` is the quantised z_i·z_t, predicted at z_t; code 0 is predicted at ``dot``. The codes are those of an
    :class:`~unclip_pl.nn.codec.EmbeddingCodec`, whose bucket values come along with them.

    Args:
        embed_dim: d, the width of CLIP's embeddings.
        text_width: W, the width of CLIP's text tower.
        context_length: number of tokens of the longest text.
        code_length: n, the number of codes per embedding.
        buckets: number of values of a code.
        dot_buckets: number of values of the dot-product token; 1 leaves it out: a start token without content remains.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads.
        code_embedding: class of the way in; it gets width, code_length and buckets from here.
        head: class of the way out; it gets width, code_length and buckets from here.
        text_encoder: text transformer that reads token ids and is trained along (the paper's, 2048 × 24); None takes
            the states of frozen CLIP.
        text_states: read the caption's token states; false leaves z_t alone.
        text_embed_dim: width of z_t; 0 is ``embed_dim``.

    Raises:
        InputError: ``text_encoder`` has nothing to read, since ``text_states`` is false; or z_i and z_t have different
            widths, and so no dot product.
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
        text_states: bool = True,
        text_embed_dim: int = 0,
    ) -> None:
        if text_encoder is not None:
            if not text_states:
                raise InputError("Expected text_states with a text_encoder. Got false: leave one of them out.")
            text_width = text_encoder.width
        sizes = (embed_dim, text_width, context_length, code_length, width, layers, heads)
        super().__init__(*sizes, text_states=text_states, text_embed_dim=text_embed_dim)
        if dot_buckets > 1:
            require_dot(embed_dim, self.text_embed_dim)
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
        """Return the states of every token, (B, L, W): its own text transformer's, or CLIP's."""
        return text.states if self.text_encoder is None else self.text_encoder(text.tokens, text.mask).states

    def forward(self, text: TextFeatures, dot: Tensor, codes: Tensor, values: Tensor) -> ARLogits:
        """Return the logits of every token given the true ones before it.

        Args:
            text: features of B captions, z_t scaled.
            dot: (B,) int64, the codec's :meth:`~unclip_pl.nn.codec.EmbeddingCodec.encode_dot`.
            codes: (B, n) int64.
            values: (B, n) bucket values of the codes at unit variance.
        """
        position = torch.arange(self.code_length, device=codes.device)
        code_tokens = self.code_embedding(codes[:, :-1], values[:, :-1], position[:-1])
        suffix = torch.cat([self.dot_embedding(dot)[:, None], code_tokens], dim=1)
        hidden = self.outputs(text, suffix)  # (B, 1 + n, width)
        return ARLogits(self.dot_head(hidden[:, 0]), self.head(hidden[:, 1:], position))

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
        """Draw codes (B, candidates, n) for B captions, token by token with cached keys and values.

        Args:
            text: features of B captions, z_t scaled.
            values_of: (n, buckets) bucket values at unit variance
                (:attr:`~unclip_pl.nn.codec.EmbeddingCodec.value_table`).
            unconditional: features of the empty caption, batch size 1 or B; needed unless ``guidance`` is 1.
            guidance: scale g of logits u + g·(c − u); 1 is off, 0 ignores the caption.
            temperature: divisor of all logits.
            dot_quantile: quantile of its distribution above which the dot-product token is drawn; 0.5 is the paper's
                top half, 0 is plain sampling.
            candidates: number of draws per caption, which share its prefix.
            generator: source of the draws; one for each caption if they must not depend on the other captions.

        Raises:
            InputError: guidance without an unconditional caption, or a number outside its range.
        """
        check_draws(temperature, dot_quantile, candidates)
        if guidance != 1 and unconditional is None:
            raise InputError(f"Expected unconditional, the empty caption, for guidance {guidance}. Got None: give it.")
        hidden, prefix = self.encode_prefix(text)  # (B, width)
        if guidance != 1 and unconditional is not None:
            hidden, prefix = self.with_null(hidden, prefix, unconditional)  # (2B, width)
        p_dot = upper_quantile(guided_probability(self.dot_head(hidden), guidance, temperature), dot_quantile)
        dot = draw(p_dot.repeat_interleave(candidates, dim=0), generator=generator)  # (B·candidates,)
        filled, branches = prefix.mask.shape[1], 1 if guidance == 1 else 2
        cache = prefix.repeat(candidates).pad(filled + self.code_length)

        def after(token: Tensor, position: Tensor) -> Tensor:
            """Return the distribution (B·candidates, buckets) of the code at ``position`` (1,), behind ``token``."""
            hidden = self.step(token.repeat(branches, 1, 1), cache, filled + position, position)
            return guided_probability(self.head(hidden, position), guidance, temperature)[:, 0]

        def advance(code: Tensor, position: Tensor) -> Tensor:
            """Return the same distribution behind ``code`` (B·candidates, 1), the one before."""
            before = position - 1
            return after(self.code_embedding(code, values_of[before][0][code], before), position)

        first, *others = torch.arange(self.code_length, device=dot.device).split(1)
        codes = [draw(after(self.dot_embedding(dot)[:, None], first), generator=generator)[:, None]]
        step = recorded(advance, dot.device)
        for position in others:
            codes.append(draw(step(codes[-1], position), generator=generator)[:, None])
        return torch.cat(codes, dim=1).unflatten(0, (-1, candidates))
