"""95 % intervals over captions: the unit that is drawn anew when somebody repeats a comparison.

Several samples of one caption are not independent, so they are averaged first (clustering by caption). An interval here
says nothing of training seeds: that takes several trained priors, see :mod:`unclip_pl.metrics.crossed`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.errors import InputError

NORMAL_975 = 1.959964  # 97.5 % quantile of the standard normal


class Interval(NamedTuple):
    """An estimate and the two ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Tensor) -> Interval:
    """Normal-approximation interval of the mean over captions.

    Args:
        values: (N,) one number (or bool) per caption, or (S, N) for S sampling seeds of the same N captions.

    Raises:
        ValueError: for another shape, or fewer than two captions.
    """
    if values.ndim not in (1, 2) or values.shape[-1] < 2:
        raise InputError(f"Expected values of shape (N,) or (S, N) with N >= 2 captions. Got {tuple(values.shape)}.")
    per_caption = values.double().reshape(-1, values.shape[-1]).mean(0)  # (N,)
    mean = per_caption.mean().item()
    half = NORMAL_975 * per_caption.std().item() / math.sqrt(len(per_caption))
    return Interval(mean, mean - half, mean + half)


def share_interval(share: float, n: int) -> Interval:
    """Wilson's interval of a share of n, which stays inside [0, 1] and does not vanish at its ends."""
    z2 = NORMAL_975**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return Interval(share, min(share, centre - half), max(share, centre + half))


def win_rate(ours: Tensor, theirs: Tensor) -> Interval:
    """How often ``ours`` is the larger of two scores of one caption, ties half a win each (GLIDE, app. A.1).

    Args:
        ours, theirs: (N,) or (S, N) scores of the same captions, larger is better.
    """
    return mean_interval((ours > theirs).double() + 0.5 * (ours == theirs).double())


class SignTest(NamedTuple):
    """Captions that either side won, and how surprising such an uneven split would be among equals."""

    wins: int
    losses: int
    ties: int
    p: float  # two-sided, exact


def sign_test(ours: Tensor, theirs: Tensor) -> SignTest:
    """Two-sided exact sign test over captions; ties are set aside. It assumes nothing of the scores but their order.

    Args:
        ours, theirs: (N,) or (S, N) scores of the same captions, larger is better; several samples of a caption are
            averaged first.
    """
    difference = (ours.double() - theirs.double()).reshape(-1, ours.shape[-1]).mean(0)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    n = wins + losses
    tail = range(min(wins, losses) + 1)
    log_half = n * math.log(0.5)
    p = 2 * sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in tail)
    return SignTest(wins, losses, len(difference) - n, min(1.0, p))


def recentred_interval(estimate: float, resampled: Tensor) -> Interval:
    """Percentile interval of a bootstrap, moved so that its mean lies on the full estimate.

    A resample repeats captions, which biases a Fréchet distance upward: the plain percentiles may miss the very
    estimate that they should surround.

    Args:
        estimate: the statistic on all captions.
        resampled: (R,) the statistic on R resamples.
    """
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64, device=resampled.device)
    low, high = torch.quantile(resampled.double() - resampled.double().mean(), quantiles).tolist()
    return Interval(estimate, estimate + low, estimate + high)
