"""Diversity of the samples that share one caption, beside the diversity of the truth.

Functions return one number for each caption: average it with :func:`unclip_pl.metrics.interval.mean_interval`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_pl.errors import InputError


def vendi(features: Tensor) -> Tensor:
    """Compute the Vendi score, the effective number of distinct samples (Friedman & Dieng 2023), with cosine kernel.

    exp(−Σ λ ln λ) over the eigenvalues λ of K / n. n equal samples give 1, n orthogonal ones n.

    Args:
        features: (..., n, d) at any scale.

    Returns:
        (...) float64 in [1, n]; below 1 only if a feature is zero.
    """
    samples, width = features.shape[-2:]
    unit = F.normalize(features.double(), dim=-1)
    gram = unit @ unit.mT if samples <= width else unit.mT @ unit  # both have the same eigenvalues, save zeros
    eigenvalues = torch.linalg.eigvalsh(gram / samples).clamp_min(0)
    return (-torch.xlogy(eigenvalues, eigenvalues).sum(-1)).exp()


def intra_caption_cosine(samples: Tensor) -> Tensor:
    """Average the cosine of two different samples of one caption: an unbiased estimate of E cos(sample, sample′).

    Args:
        samples: (N, S, d) at any scale, S ≥ 2 samples for each of N captions.

    Returns:
        (N,) float in [-1 / (S − 1), 1].

    Raises:
        InputError: fewer than two samples per caption.
    """
    count = samples.shape[1]
    if count < 2:
        raise InputError(f"Expected at least 2 samples per caption. Got shape {tuple(samples.shape)}: draw more.")
    unit = F.normalize(samples.float(), dim=-1)
    squared_sum = unit.sum(1).square().sum(-1)  # Σ over all pairs, each sample with itself included
    return (squared_sum - count) / (count * (count - 1))


def total_variation(counts: Tensor, p: Tensor) -> Tensor:
    """Compute the total variation ½ Σ |counts / n − p|, with n the row's own sum.

    Args:
        counts: (..., V) draws of each of V values.
        p: (..., V) probabilities.

    Returns:
        (...) float64 in [0, 1]; NaN where nothing was drawn.
    """
    frequency = counts.double() / counts.double().sum(-1, keepdim=True)
    return 0.5 * (frequency - p.double()).abs().sum(-1)


def expected_total_variation(p: Tensor, draws: Tensor) -> Tensor:
    """Compute the exact mean of :func:`total_variation` over ``draws`` true draws from p.

    Each count is binomial, and its mean absolute deviation has a closed form (De Moivre 1730; Diaconis & Zabell 1991):
    E |k − np| = 2 (1 − p) m C(n, m) pᵐ (1 − p)ⁿ⁻ᵐ, m = ⌊np⌋ + 1.

    Args:
        p: (..., V) probabilities.
        draws: (...) number n of draws, at least 1.

    Returns:
        (...) float64.
    """
    p, n = p.double(), draws.double().unsqueeze(-1)
    m = (n * p).floor() + 1
    # m C(n, m) = n! / ((m − 1)! (n − m)!); at p = 1, m = n + 1 and lgamma(0) = ∞ makes the term 0, as it should be.
    log_choose = torch.lgamma(n + 1) - torch.lgamma(m) - torch.lgamma(n - m + 1)
    deviation = 2 * (log_choose + torch.xlogy(m, p) + torch.xlogy(n - m + 1, 1 - p)).exp()
    return 0.5 * (deviation / n).sum(-1)


def diversity_gap(counts: Tensor, conditional: Tensor) -> Tensor:
    """Return how much further the drawn values lie from the truth than as many true draws would.

    Args:
        counts: (N, V) draws of each value of an unstated attribute for each caption.
        conditional: (N, V) the renderer's true distribution of that attribute given the caption.

    Returns:
        (N,) float64 in (-1, 1); 0 is as diverse as the truth. One caption may lie below 0; the mean over captions of a
        perfect prior is 0. NaN where nothing was drawn.
    """
    return total_variation(counts, conditional) - expected_total_variation(conditional, counts.sum(-1))
