"""The types that all layers share: batches as NamedTuples of tensors, with no optional fields.

Legend: B batch, L text tokens (cut to the longest caption of the batch), W width of CLIP's text tower, d CLIP embedding
dimension, H side of a square image. Pixels are float in [-1, 1]. Embeddings are raw, as CLIP gave them;
:mod:`unclip_pl.nn.space` scales them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError


class TextFeatures(NamedTuple):
    """Frozen CLIP's features of B captions. Padding (``mask`` False) stands at the end and must change no output."""

    tokens: Tensor  # (B, L) int64, BPE ids; 0 where padded
    states: Tensor  # (B, L, W) token states after the final LayerNorm; W is 0 where the data leave them out
    mask: Tensor  # (B, L) bool, True on real tokens
    embed: Tensor  # (B, d) z_t

    def to(self, device: torch.device | str) -> "TextFeatures":
        """Return the features on another device. Lightning calls this for batches too, so a GPU is not waited for."""
        asynchronous = torch.device(device).type == "cuda"
        return TextFeatures(*(part.to(device, non_blocking=asynchronous) for part in self))

    def rows(self, index: Tensor | slice) -> "TextFeatures":
        """Return the captions that ``index`` selects, as it would from a tensor's first dimension."""
        return TextFeatures(*(part[index] for part in self))

    def without_states(self) -> "TextFeatures":
        """Return z_t alone: no tokens, no states, L = 0."""
        return TextFeatures(self.tokens[:, :0], self.states[:, :0], self.mask[:, :0], self.embed)

    def repeat(self, n: int) -> "TextFeatures":
        """Return each caption ``n`` times in a row: B·n captions."""
        return TextFeatures(*(part.repeat_interleave(n, dim=0) for part in self))

    def pad(self, length: int) -> "TextFeatures":
        """Return the captions with masked zeros behind them, ``length`` tokens long.

        Raises:
            InputError: the captions are longer than that.
        """
        room = length - self.mask.shape[1]
        if room < 0:
            raise InputError(f"Expected at most {length} tokens. Got {self.mask.shape[1]}: shorten the captions.")
        if room == 0:
            return self
        return TextFeatures(
            tokens=F.pad(self.tokens, (0, room)),
            states=F.pad(self.states, (0, 0, 0, room)),
            mask=F.pad(self.mask, (0, room)),
            embed=self.embed,
        )

    @staticmethod
    def cat(parts: Sequence["TextFeatures"]) -> "TextFeatures":
        """Return several batches of captions as one; the shorter ones are padded."""
        length = max(part.mask.shape[1] for part in parts)
        padded = [part.pad(length) for part in parts]
        return TextFeatures(*(torch.cat(fields) for fields in zip(*padded, strict=True)))


class PriorBatch(NamedTuple):
    """Captions and the embeddings of their images, for a prior."""

    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures


class DecoderBatch(NamedTuple):
    """Images with their embeddings and captions."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures


class UpsamplerBatch(NamedTuple):
    """Images alone, from which the upsampler makes its own low-resolution input."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]


class ClipBatch(NamedTuple):
    """Pairs for the contrastive loss."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    tokens: Tensor  # (B, context) int64


class EvaluationBatch(NamedTuple):
    """A decoder's batch with its captions as text, since the judge's CLIP has another tokenizer."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures
    captions: list[str]
    metadata: list[dict[str, Any]]  # the sample's json; empty where it has none
