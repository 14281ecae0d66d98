"""The words the layers speak: batches as NamedTuples of tensors, with no optional fields.

Legend: B batch, L text tokens (cut to the longest caption of the batch), W width of CLIP's text tower, d CLIP embedding
dimension, H side of a square image. Pixels are float in [-1, 1]; embeddings are raw, as CLIP gave them (scaling is the
business of :mod:`unclip_pl.nn.space`).
"""

from typing import Any, NamedTuple

from torch import Tensor


class TextFeatures(NamedTuple):
    """What frozen CLIP says of B captions. Padding (``mask`` False) stands at the end and must change no output."""

    tokens: Tensor  # (B, L) int64, BPE ids; 0 where padded
    states: Tensor  # (B, L, W) token states after the final LayerNorm
    mask: Tensor  # (B, L) bool, True on real tokens
    embed: Tensor  # (B, d) z_t


class PriorBatch(NamedTuple):
    """Captions and the embeddings of their images: all that a prior sees."""

    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures


class DecoderBatch(NamedTuple):
    """Images beside their own embedding and caption."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures


class UpsamplerBatch(NamedTuple):
    """Images alone: the upsampler makes its own low-resolution input from them."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]


class ClipBatch(NamedTuple):
    """Pairs for the contrastive loss."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    tokens: Tensor  # (B, context) int64


class EvaluationBatch(NamedTuple):
    """A decoder's batch with its captions as text: another CLIP (the judge) has another tokenizer."""

    image: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) z_i
    text: TextFeatures
    captions: list[str]
    metadata: list[dict[str, Any]]  # the sample's json; empty where it has none
