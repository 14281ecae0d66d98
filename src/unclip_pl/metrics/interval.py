"""95 % intervals over captions: the unit of which somebody who repeats a comparison draws other ones.

Several samples of one caption are not independent, so they are averaged first (clustering by caption). An interval here
says nothing of training seeds: that takes several trained priors, see :mod:`unclip_pl.metrics.crossed`.
"""

import math
from typing import NamedTuple

import torch
from scipy.special import bdtr, ndtri
from torch import Tensor

from unclip_pl.errors import InputError

NORMAL_975 = float(ndtri(0.975))  # quantile of the standard normal, 1.96


class Interval(NamedTuple):
    """Estimate and the two ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Tensor) -> Interval:
    """Compute the normal-approximation interval of the mean over captions.

    Args:
        values: (N,) numbers or bools, one a caption, or (S, N) for S sampling seeds of the same N captions.

    Raises:
        InputError: another shape, or fewer than two captions.
    """
    if values.ndim not in (1, 2) or values.shape[-1] < 2:
        raise InputError(
            f"Expected values of shape (N,) or (S, N) with N >= 2 captions. Got {tuple(values.shape)}: add some."
        )
    per_caption = values.double().reshape(-1, values.shape[-1]).mean(0)  # (N,)
    mean = per_caption.mean().item()
    half = NORMAL_975 * per_caption.std().item() / math.sqrt(len(per_caption))
    return Interval(mean, mean - half, mean + half)


def share_interval(share: float, n: int) -> Interval:
    """Compute Wilson's interval of a share of n, which stays inside [0, 1] and does not vanish at its ends."""
    from scipy.stats import binomtest  # takes a second to import

    low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return Interval(share, min(share, float(low)), max(share, float(high)))


class SignTest(NamedTuple):
    """Captions that either side won, and the probability of a split at least as uneven among equals."""

    wins: int
    losses: int
    ties: int
    p: float  # two-sided, exact


def sign_test(ours: Tensor, theirs: Tensor) -> SignTest:
    """Run the two-sided exact sign test over captions; ties are set aside. It looks at the scores' order alone.

    Args:
        ours: (N,) or (S, N) scores, larger is better; several samples of a caption are averaged first.
        theirs: scores of the same captions, of the same shape.
    """
    difference = (ours.double() - theirs.double()).reshape(-1, ours.shape[-1]).mean(0)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    n = wins + losses
    p = 2 * float(bdtr(min(wins, losses), n, 0.5)) if n else 1.0
    return SignTest(wins, losses, len(difference) - n, min(1.0, p))


def recentred_interval(estimate: float, resampled: Tensor) -> Interval:
    """Compute the percentile interval of a bootstrap, moved so that its mean lies on the full estimate.

    A resample repeats captions, which biases a Fréchet distance upward: the plain percentiles may miss the very
    estimate that they should surround.

    Args:
        estimate: statistic on all captions.
        resampled: (R,) statistic on R resamples.
    """
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64, device=resampled.device)
    low, high = torch.quantile(resampled.double() - resampled.double().mean(), quantiles).tolist()
    return Interval(estimate, estimate + low, estimate + high)
