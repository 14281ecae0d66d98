"""The diffusion prior's network: a causal transformer that predicts z_i from a caption and a noised z_i (§2.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.nn.layers import Prefix, PrefixTransformer, sinusoidal
from unclip_pl.types import TextFeatures


class PriorTransformer(PrefixTransformer):
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
        """Return :meth:`forward` of :meth:`encode_prefix` for a single draw of each caption, which a GPU does faster.

        t, z_i^(t) and the query stand right behind z_t and the text's padding behind them. So causality is all the mask
        there is, and flash attention needs none in memory. On an H200 the paper's prior at batch 64 trains at 54 % of
        the peak instead of 42 %, together with compiled blocks (45 % with those alone, measured before).

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
