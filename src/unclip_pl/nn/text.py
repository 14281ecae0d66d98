"""Captions as features: how they are dropped, and GLIDE's text transformer, trained with its reader.

Legend: B captions, L tokens (cut to the longest), W width of the states, d CLIP embedding dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.errors import InputError
from unclip_pl.nn.layers import Transformer
from unclip_pl.types import TextFeatures


def mix_text(text: TextFeatures, null: TextFeatures, keep: Tensor) -> TextFeatures:
    """Return the captions where ``keep`` (B,) bool is True and the null caption (B = 1) elsewhere; L is the longer.

    The token states of the null caption are left out where the captions have none; a null caption without tokens has no
    states to fit.
    """
    width = text.states.shape[2]
    if not width or not null.states.shape[1]:
        null = null._replace(states=null.states.new_zeros(*null.states.shape[:2], width))
    length = max(text.mask.shape[1], null.mask.shape[1])
    text, null = text.pad(length), null.pad(length)
    row = keep[:, None]
    return TextFeatures(
        tokens=torch.where(row, text.tokens, null.tokens),
        states=torch.where(row[..., None], text.states, null.states),
        mask=torch.where(row, text.mask, null.mask),
        embed=torch.where(row, text.embed, null.embed),
    )


class EncodedText(NamedTuple):
    """A text transformer's features of B captions."""

    states: Tensor  # (B, L, W) after the final LayerNorm; readers mask the padding, as they do with CLIP's
    last: Tensor  # (B, W) at the last slot, which has seen the whole caption


class TextTransformer(nn.Module):
    """GLIDE's text encoder, trained with the network that reads it: token ids to states (arXiv 2112.10741, §4.1).

    Padding is a learned embedding per position, and every token attends to every slot. So it always runs over all
    ``context_length`` slots: the cut of a batch must not change its outputs. The defaults are the paper's (Table 3).

    Args:
        width: W, the width of the states.
        layers: number of blocks.
        heads: number of attention heads, which divides ``width``.
        context_length: number of slots, at least as many as CLIP's: the token ids are those of its tokenizer.
        vocab_size: number of token ids, those of CLIP's BPE.
    """

    def __init__(
        self,
        width: int = 2048,
        layers: int = 24,
        heads: int = 32,
        context_length: int = 256,
        vocab_size: int = 49_408,
    ) -> None:
        super().__init__()
        self.width = width
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.padding_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.final_ln = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.01)

    def forward(self, tokens: Tensor, mask: Tensor) -> EncodedText:
        """Return the states of B captions.

        Args:
            tokens: (B, L) int64, L at most ``context_length``.
            mask: (B, L) bool, False on padding.

        Raises:
            InputError: L exceeds ``context_length``.
        """
        length = tokens.shape[1]
        room = self.context_length - length
        if room < 0:
            raise InputError(
                f"Expected at most context_length={self.context_length} tokens. Got {length}: shorten the captions."
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = torch.where(F.pad(mask, (0, room))[..., None], F.pad(x, (0, 0, 0, room)), self.padding_embedding)
        keys = 0 if x.device.type == "cuda" else self.context_length  # a mask in memory keeps flash attention away
        everywhere = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=x.device)
        x, _ = self.transformer(x, everywhere)
        x = self.final_ln(x)
        return EncodedText(x[:, :length], x[:, -1])
