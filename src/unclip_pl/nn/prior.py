"""Networks that predict z_i from a caption and a noised z_i: the paper's causal transformer (§2.2), and an MLP.

Legend: B captions, K independent draws of each, d CLIP embedding dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.nn.layers import Prefix, PrefixTransformer, require_states, sinusoidal, states_of_width, zeroed
from unclip_pl.types import TextFeatures


class PriorNetwork(nn.Module, ABC):
    """A network that a prior's Task trains and a solver asks; its last layer is called ``out_proj``."""

    embed_dim: int
    text_embed_dim: int

    @abstractmethod
    def predict(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        """Predict z_i, (B, K, d), scaled as x_t, for K independent draws of each of B captions: a training step.

        Args:
            x_t: (B, K, d) noised, scaled image embeddings z_i^(t).
            index: (B, K) 0-based timesteps, t·T − 1.
            text: B captions, z_t scaled.
        """

    @abstractmethod
    def under(
        self, text: TextFeatures, null: TextFeatures | None = None, *, draws: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``step(x_t, index)``, which predicts as :meth:`predict` does, for a sampler's many calls.

        What the captions alone decide is computed here, once. No gradient passes.

        Args:
            text: B captions, z_t scaled.
            null: the empty caption, batch size 1. B rows under it then follow the captions' own, (2B, K, d) in all.
            draws: K.
        """


class PriorTransformer(PrefixTransformer, PriorNetwork):
    """Decoder-only transformer over [text states …, z_t, t, z_i^(t), query]; the output at the query predicts z_i.

    The caption cannot see what follows it, so its keys and values are computed once (:meth:`encode_prefix`) for all
    steps of a sampler and for all K draws of a training step. Modules are named as in Karlo, whose prior this is.

    Args:
        embed_dim: d, the width of CLIP's embeddings.
        text_width: W, the width of CLIP's text tower.
        context_length: number of tokens of the longest text.
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads.
        text_states: read the caption's token states; false leaves z_t alone.
        text_embed_dim: width of z_t; 0 is ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        width: int = 2048,
        layers: int = 24,
        heads: int = 32,
        text_states: bool = True,
        text_embed_dim: int = 0,
    ) -> None:
        sizes = (embed_dim, text_width, context_length, 3, width, layers, heads)
        super().__init__(*sizes, text_states=text_states, text_embed_dim=text_embed_dim)
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.clip_img_proj = nn.Linear(embed_dim, width)
        self.prd_emb = nn.Parameter(torch.empty(1, 1, width))
        self.out_proj = nn.Linear(width, embed_dim)
        nn.init.normal_(self.prd_emb, std=width**-0.5)

    def predict(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        """Predict z_i, see :meth:`PriorNetwork.predict`."""
        if x_t.shape[1] == 1:
            return self.in_one_pass(x_t, index, text)
        return self(x_t, index, self.encode_prefix(text))

    def under(
        self, text: TextFeatures, null: TextFeatures | None = None, *, draws: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``step(x_t, index)``, see :meth:`PriorNetwork.under`."""
        prefix = self.encode_prefix(text)
        if null is not None:
            prefix = prefix.cat(self.encode_prefix(null).expand(len(text.embed)))
        return partial(self, prefix=prefix.pad(prefix.mask.shape[1] + 3 * draws), overwrite=True)

    def encode_prefix(self, text: TextFeatures) -> Prefix:
        """Return the keys and values of B captions, z_t scaled like z_i, for any number of calls and draws."""
        tokens, mask = self.causal_prefix(self.seen(text))
        _, layers = self.transformer(tokens, None, start=tokens.shape[1])
        return Prefix(layers, mask)

    def forward(self, x_t: Tensor, index: Tensor, prefix: Prefix, *, overwrite: bool = False) -> Tensor:
        """Predict z_i, (B, K, d), scaled as x_t, for K independent draws of each of B captions.

        Args:
            x_t: (B, K, d) noised, scaled image embeddings z_i^(t).
            index: (B, K) 0-based timesteps, t·T − 1.
            prefix: keys and values of the B captions. A draw sees the caption and itself, never another draw.
            overwrite: use the room for 3·K tokens at the end of the prefix (``Prefix.pad``) at every call, so that
                a sampler need not copy the caption's keys at every step. No gradient passes there.
        """
        draws = index.shape[1]
        seen, slot = prefix.mask, None
        if overwrite:
            slot = torch.arange(seen.shape[1], device=seen.device)[-3 * draws :]
            seen = seen[:, : -3 * draws]
        time = self.time_embed(sinusoidal(index, self.width).to(x_t.dtype))
        query = self.prd_emb.expand_as(time)
        # Draw by draw the order is t, z_i^(t), query; kind by kind in memory, so that the queries stand together.
        tokens = torch.stack([time, self.clip_img_proj(x_t), query], dim=1)  # (B, 3, K, width)
        tokens = (tokens + self.suffix_positions[:, :, None]).flatten(1, 2)
        mask = torch.cat([seen[:, None, None].expand(-1, -1, 3 * draws, -1), self._own(x_t)], dim=-1)
        hidden, _ = self.transformer(tokens, mask, prefix.layers, slot=slot, start=2 * draws)
        return self.out_proj(self.final_ln(hidden))

    def in_one_pass(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        """Return :meth:`forward` of :meth:`encode_prefix` for a single draw of each caption, which is faster.

        t, z_i^(t) and the query stand right behind z_t and the text's padding behind them. So causality is all the mask
        there is, and flash attention needs none in memory. On an H200 the paper's prior at batch 64 trains at 54 % of
        the peak instead of 42 %, together with compiled blocks (45 % with those alone, measured before). On a CPU each
        weight is read once: a float32 step of 512 × 6 at batch 16 takes 0.96 of the time on one thread, 0.89 on two.

        Args:
            x_t: (B, 1, d) noised, scaled image embeddings z_i^(t).
            index: (B, 1) 0-based timesteps.
            text: B captions, z_t scaled like z_i.
        """
        text = self.seen(text)
        time = self.time_embed(sinusoidal(index, self.width).to(x_t.dtype))
        own = torch.cat([time, self.clip_img_proj(x_t), self.prd_emb.expand_as(time)], dim=1) + self.suffix_positions
        tokens = torch.cat([self.prefix_tokens(text), own], dim=1)  # (B, L + 4, width)
        length, count = text.mask.shape[1], text.mask.sum(1, keepdim=True)
        place = torch.arange(length + 4, device=tokens.device)
        # A permutation: the text's real tokens, z_t to the query, the text's padding.
        source = torch.where(place < count, place, torch.where(place < count + 4, place - count + length, place - 4))
        x, query = tokens.take_along_dim(source[..., None], dim=1), count + 3
        *blocks, top = self.transformer.resblocks
        for block in blocks:
            x, _ = block(x, None, None, None, 0)
        _, seen = top(x, None, None, None, x.shape[1])  # keys and values alone: the query is all that is read
        mask = F.pad(place < query, (0, 1), value=True)[:, None, None]  # (B, 1, 1, L + 5), itself at the end
        hidden, _ = top(x.take_along_dim(query[..., None], dim=1), mask, seen, None, 0)
        return self.out_proj(self.final_ln(hidden))

    @staticmethod
    def _own(x_t: Tensor) -> Tensor:
        """Return the mask (B, 1, 3K, 3K): causal within a draw, blind between draws."""
        batch, draws, _ = x_t.shape
        causal = torch.ones(3, 3, device=x_t.device).tril()
        own = torch.kron(causal, torch.eye(draws, device=x_t.device)).bool()
        return own.expand(batch, 1, -1, -1)


class ResidualBlock(nn.Module):
    """x + W_out s(LN(W_in s(LN x) + W_t s(time) + W_y s(y))), with s = SiLU and W_out zero at first (RCG)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, width), zeroed(nn.Linear(width, width))
        self.time_proj, self.text_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor, said: Tensor) -> Tensor:
        """Map (B, K, width) to the same.

        Args:
            x: (B, K, width).
            time: (B, K, width) SiLU of the embedded time.
            said: (B, 1, width) what ``text_proj`` makes of the caption.
        """
        hidden = self.in_proj(F.silu(self.ln_1(x))) + self.time_proj(time) + said
        return x + self.out_proj(F.silu(self.ln_2(hidden)))


class PriorMLP(PriorNetwork):
    """Residual MLP over z_i^(t) with time and caption added in every block: RCG's (Li et al. 2023, arXiv 2312.03701).

    RCG's condition is a class. Here it is the caption: y = W z_t, plus W' of the mean of its token states. Nothing
    attends, so the order of words reaches it through z_t alone.

    Args:
        embed_dim: d, the width of CLIP's embeddings.
        text_width: W, the width of CLIP's text tower.
        width: width of the residual stream (RCG: 1,536).
        blocks: number of residual blocks (RCG: 12).
        text_states: read the mean of the caption's token states; false leaves z_t alone.
        text_embed_dim: width of z_t; 0 is ``embed_dim``.

    Raises:
        InputError: token states are to be read, and the data have none.
    """

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        width: int = 1536,
        blocks: int = 12,
        text_states: bool = True,
        text_embed_dim: int = 0,
    ) -> None:
        super().__init__()
        require_states(text_states, text_width)
        self.embed_dim = embed_dim
        self.text_embed_dim = text_embed_dim or embed_dim
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text_emb_proj = nn.Linear(self.text_embed_dim, width)
        self.text_enc_proj = nn.Linear(text_width, width) if text_states else None
        self.in_proj = nn.Linear(embed_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.final_ln = nn.LayerNorm(width)
        self.out_proj = zeroed(nn.Linear(width, embed_dim))

    def predict(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        """Predict z_i, see :meth:`PriorNetwork.predict`."""
        return self(x_t, index, self.encode_condition(text))

    def under(
        self, text: TextFeatures, null: TextFeatures | None = None, *, draws: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``step(x_t, index)``, see :meth:`PriorNetwork.under`."""
        said = self.encode_condition(text)
        if null is not None:
            said = torch.cat([said, self.encode_condition(null).expand_as(said)], dim=0)
        return partial(self, said=said)

    def encode_condition(self, text: TextFeatures) -> Tensor:
        """Return what every block is told of B captions, (B, blocks, width)."""
        y = self.text_emb_proj(text.embed)
        if self.text_enc_proj is not None:
            states = states_of_width(text.states, self.text_enc_proj.in_features)
            seen = states.where(text.mask[..., None], 0).sum(1)
            y = y + self.text_enc_proj(seen / text.mask.sum(1, keepdim=True).clamp(min=1))
        return torch.stack([block.text_proj(F.silu(y)) for block in self.blocks], dim=1)  # type: ignore[operator]

    def forward(self, x_t: Tensor, index: Tensor, said: Tensor) -> Tensor:
        """Predict z_i, (B, K, d), scaled as x_t.

        Args:
            x_t: (B, K, d) noised, scaled image embeddings z_i^(t).
            index: (B, K) 0-based timesteps, t·T − 1.
            said: (B, blocks, width) from :meth:`encode_condition`.
        """
        time = F.silu(self.time_embed(sinusoidal(index, self.width).to(x_t.dtype)))
        x = self.in_proj(x_t)
        for block, told in zip(self.blocks, said.unbind(1), strict=True):
            x = block(x, time, told[:, None])
        return self.out_proj(F.silu(self.final_ln(x)))
