"""The causal transformer of both priors, and the keys and values of a caption that they compute once.

Parameter names and the layout of the fused QKV (q, k, v side by side within each head) are Karlo's.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import attend
from unclip_pl.types import TextFeatures

M = TypeVar("M", nn.Conv2d, nn.Linear)


def zeroed(layer: M) -> M:
    """Zero weights and bias: a residual branch that ends here starts as the identity (ADM), logits start uniform."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def sinusoidal(index: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Embed indices (…) as (…, width): the cosine half first, periods 2π … 2π·max_period (GLIDE).

    Computed in float32 at least, since bfloat16 cannot tell 998 from 999. An odd width ends in a zero.
    """
    half = width // 2
    dtype = torch.promote_types(index.dtype, torch.float32)
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=index.device) * (-log(max_period) / half))
    angle = index.to(dtype)[..., None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


class KeyValue(NamedTuple):
    """Keys and values of a sequence at one layer."""

    key: Tensor  # (B, heads, P, dim)
    value: Tensor  # (B, heads, P, dim)


class Prefix(NamedTuple):
    """Keys and values of B captions, [text states …, z_t], at every layer of a transformer.

    The order of keys does not matter to attention (positions went in with the tokens), so a prefix may be padded
    anywhere as long as ``mask`` is False there.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor  # (B, P) bool, True where a token may be seen

    def _map(self, change: Callable[[Tensor], Tensor], mask: Tensor) -> "Prefix":
        return Prefix(tuple(KeyValue(change(key), change(value)) for key, value in self.layers), mask)

    def expand(self, n: int) -> "Prefix":
        """Show one caption's prefix as that of n captions, without a copy: one unconditional prefix serves all."""
        return self._map(lambda x: x.expand(n, -1, -1, -1), self.mask.expand(n, -1))

    def repeat(self, n: int) -> "Prefix":
        """Return each caption's prefix n times in a row: (B·n) captions."""
        return self._map(lambda x: x.repeat_interleave(n, dim=0), self.mask.repeat_interleave(n, dim=0))

    def pad(self, length: int) -> "Prefix":
        """Make room for keys up to ``length``, hidden by the mask until something is written there."""
        room = length - self.mask.shape[1]
        return self._map(lambda x: F.pad(x, (0, 0, 0, room)), F.pad(self.mask, (0, room)))

    def cat(self, other: "Prefix") -> "Prefix":
        """Return both sets of captions in one batch, which guidance needs."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        a, b = self.pad(length), other.pad(length)
        layers = [
            KeyValue(torch.cat([x.key, y.key]), torch.cat([x.value, y.value]))
            for x, y in zip(a.layers, b.layers, strict=True)
        ]
        return Prefix(tuple(layers), torch.cat([a.mask, b.mask]))


class Attention(nn.Module):
    """Multi-head attention over the sequence itself and all that went before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None, slot: Tensor | None, start: int
    ) -> tuple[Tensor, KeyValue]:
        """Attend, see :meth:`Transformer.forward`."""
        parts = self.c_qkv(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        query, key, value = (part.transpose(1, 2) for part in parts)
        now = KeyValue(key, value)  # (B, heads, L, dim)
        if past is not None and slot is None:
            now = KeyValue(torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2))
        elif past is not None and slot is not None:
            now = KeyValue(past.key.index_copy_(2, slot, key), past.value.index_copy_(2, slot, value))
        query = query[:, :, start:]
        if mask is None:
            out = attend(query, *now, causal=True)
        else:
            out = attend(query, *now, mask[:, :, start:] if mask.shape[-1] else None)
        return self.c_proj(out.transpose(1, 2).flatten(2)), now


class MLP(nn.Module):
    """Linear ×4, exact GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-LN attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None, slot: Tensor | None, start: int
    ) -> tuple[Tensor, KeyValue]:
        """Attend, see :meth:`Transformer.forward`."""
        out, now = self.attn(self.ln_1(x), mask, past, slot, start)
        x = x[:, start:] + out
        return x + self.mlp(self.ln_2(x)), now


class Transformer(nn.Module):
    """A stack of pre-LN blocks.

    Args:
        width: width of the residual stream, a multiple of ``heads``.
        layers: number of blocks.
        heads: number of attention heads.

    Raises:
        InputError: heads do not divide the width.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise InputError(
                f"Expected heads to divide the width. Got width {width}, heads {heads}: change one of them."
            )
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        with torch.no_grad():  # GPT-2: the residual stream's variance must not grow with depth
            for block in self.resblocks:
                block.attn.c_proj.weight.mul_((2 * layers) ** -0.5)  # type: ignore[union-attr, operator]
                block.mlp.c_proj.weight.mul_((2 * layers) ** -0.5)  # type: ignore[union-attr, operator]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: tuple[KeyValue, ...] | None = None,
        *,
        slot: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Return the top layer's outputs, and every layer's keys and values of past and present.

        Args:
            x: (B, L, width) tokens, positions already added.
            mask: (B or 1, 1, L, keys) bool, True where a query may look; ``keys`` counts past and present. One of no
                keys hides nothing. None is causal: the present must then stand last, so not with ``slot``.
            past: keys and values of the tokens before, per layer. Without ``slot`` the present is appended to them.
            slot: (L,) int64, positions of ``past`` that the present overwrites in place, so that shapes stay static.
            start: first token that the top layer answers for: nobody reads the others, only their keys.
        """
        now = []
        for i, block in enumerate(self.resblocks):
            last = i + 1 == len(self.resblocks)
            x, seen = block(x, mask, past[i] if past else None, slot, start if last else 0)
            now.append(seen)
        return x, tuple(now)


class PrefixTransformer(nn.Module):
    """A causal transformer over [text states …, z_t, suffix …]: the common part of the two priors.

    z_t and the suffix keep their position slots (``context_length`` and on) wherever the text is cut, so neither
    cutting nor padding changes an output. Padding stands at a caption's end.

    Args:
        embed_dim: d of CLIP.
        text_width: W of CLIP's text tower; 0 for data without token states.
        context_length: number of tokens of the longest text.
        suffix_length: number of tokens after z_t.
        width: width of the residual stream, independent of CLIP's.
        layers: number of blocks.
        heads: number of attention heads.
        text_states: read the token states; false leaves z_t alone.
        text_embed_dim: width of z_t; 0 is ``embed_dim``.

    Raises:
        InputError: token states are to be read, and the data have none.
    """

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        suffix_length: int,
        width: int,
        layers: int,
        heads: int,
        *,
        text_states: bool = True,
        text_embed_dim: int = 0,
    ) -> None:
        super().__init__()
        require_states(text_states, text_width)
        self.embed_dim = embed_dim
        self.text_embed_dim = text_embed_dim or embed_dim
        self.context_length = context_length
        self.text_states = text_states
        self.text_enc_proj = nn.Linear(text_width, width) if text_width else None
        self.text_emb_proj = nn.Linear(self.text_embed_dim, width)
        self.positional_embedding = nn.Parameter(torch.empty(1, context_length + 1 + suffix_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.final_ln = nn.LayerNorm(width)
        # A third of what nn.Linear makes of unit contents: the AR prior is slow to learn with softer or louder ones.
        nn.init.normal_(self.positional_embedding, std=0.2)

    @property
    def suffix_positions(self) -> Tensor:
        """Positions of the tokens after z_t, (1, suffix_length, width)."""
        return self.positional_embedding[:, self.context_length + 1 :]

    def seen(self, text: TextFeatures) -> TextFeatures:
        """Return what the network reads of B captions."""
        return text if self.text_states else text.without_states()

    def token_states(self, text: TextFeatures) -> Tensor:
        """Return the states of every token, (B, L, text_width): frozen CLIP's."""
        return text.states

    def prefix_tokens(self, text: TextFeatures) -> Tensor:
        """Return [text states …, z_t] with their positions, (B, L + 1, width).

        Raises:
            InputError: the text is longer than ``context_length``, or its states are left out.
        """
        length = text.states.shape[1]
        if length > self.context_length:
            raise InputError(
                f"Expected at most context_length = {self.context_length} text tokens. Got {length}: shorten captions."
            )
        positions = self.positional_embedding
        z_t = self.text_emb_proj(text.embed)[:, None] + positions[:, self.context_length, None]
        if self.text_enc_proj is None:
            return z_t
        states = states_of_width(self.token_states(text), self.text_enc_proj.in_features)
        return torch.cat([self.text_enc_proj(states) + positions[:, :length], z_t], dim=1)

    def causal_prefix(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Return the same tokens with each z_t right behind its text's last real one, and their mask (B, L + 1).

        Only padding stands behind z_t, and causality hides it from all that is read.
        """
        tokens = self.prefix_tokens(text)
        count, place = text.mask.sum(1, keepdim=True), torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where((place < count)[..., None], tokens, tokens[:, -1:]), place <= count


def require_states(text_states: bool, text_width: int) -> None:
    """Raise InputError where token states are to be read, and the data have none."""
    if text_states and not text_width:
        raise InputError(
            "The data have no token states: set model.init_args.net.init_args.text_states to false, and z_t alone is "
            "read."
        )


def states_of_width(states: Tensor, width: int) -> Tensor:
    """Return token states (B, L, width); of no tokens they may come without a width.

    Raises:
        InputError: they have another width.
    """
    if states.shape[2] == width:
        return states
    if states.shape[1]:
        raise InputError(
            f"Expected token states of width {width}. Got {states.shape[2]}: give data with them, or train with "
            "model.init_args.net.init_args.text_states set to false."
        )
    return states.new_zeros(len(states), 0, width)


def causal_mask(keys: Tensor) -> Tensor:
    """Return a mask (B, 1, L, L): each token sees itself, and those before it where ``keys`` (B, L) is True.

    Padding sees itself too, since a softmax over nothing is not a number.
    """
    length = keys.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril(-1)
    return (before & keys[:, None, None]) | torch.eye(length, dtype=torch.bool, device=keys.device)
