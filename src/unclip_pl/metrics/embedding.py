"""Sampled embeddings beside the true one, without a decoder.

Cosine to the truth alone rewards collapse onto the mean: with m = E[z | caption] of unit-norm z, a true sample reaches
‖m‖² on average, and the mean itself ‖m‖ > ‖m‖². What tells them apart is cos(sample, sample′), which is ‖m‖² for true
samples too. So a calibrated prior has cos(sample, true) = cos(sample, sample′) = ‖m‖² = cos(m, true)².
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from unclip_pl.metrics.diversity import intra_caption_cosine


class Calibration(NamedTuple):
    """Cosines per caption (N,), or scalars once averaged."""

    to_true: Tensor  # cos(sample, true), mean over the samples
    between_samples: Tensor  # cos(sample, sample′), mean over pairs
    gap: Tensor  # to_true − between_samples: 0 calibrated, below 0 too sure (collapsed, guided), above 0 too spread
    mean_norm: Tensor  # ‖mean of the unit-norm samples‖, without the 1 / S that S samples add to its square;
    # the root of few samples' noisy square lies a little low
    mean_to_true: Tensor  # cos(mean of the samples, true): the score of collapse onto the mean


def cosine_to_true(samples: Tensor, true: Tensor) -> Tensor:
    """Average the cosine of a caption's samples to its true embedding.

    Args:
        samples: (N, d) or (N, S, d) at any scale.
        true: (N, d).

    Returns:
        (N,) float in [-1, 1].
    """
    samples = samples.float().reshape(len(true), -1, true.shape[-1])  # (N, S, d)
    return F.cosine_similarity(samples, true.float().unsqueeze(1), dim=-1).mean(1)


def calibration(samples: Tensor, true: Tensor) -> Calibration:
    """Compute all cosines of the calibration identity, per caption.

    Args:
        samples: (N, S, d) at any scale, S ≥ 2.
        true: (N, d).

    Returns:
        Calibration of (N,) tensors. Read ``gap`` as a mean over captions: one caption has one truth.
    """
    to_true, between = cosine_to_true(samples, true), intra_caption_cosine(samples)
    mean = F.normalize(samples.float(), dim=-1).mean(1)
    return Calibration(
        to_true=to_true,
        between_samples=between,
        gap=to_true - between,
        mean_norm=between.clamp_min(0).sqrt(),  # ‖mean of S‖² = between + (1 − between) / S
        mean_to_true=F.cosine_similarity(mean, true.float(), dim=-1),
    )
