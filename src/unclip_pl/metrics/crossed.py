"""95 % intervals over training seeds and captions at once, for numbers that several trained priors gave on one set of
captions.

Captions are crossed with training seeds: every trained prior answers the same ones. So the model is the two-way
random-effects analysis of variance without replication (Searle, Casella & McCulloch 1992, §4.3),

    value[k, c] = mean + seed[k] + caption[c] + rest[k, c],

whose grand mean over K seeds and C captions has the variance σ²_seed / K + σ²_caption / C + σ²_rest / (K C), estimated
without bias by A + B − R: A is the variance of the seeds' means over K, B that of the captions' means over C, R the
residual mean square over K C (both A and B hold one R). Each trained prior is sampled with noise of its own, so what
another sampling seed would change lies in the rest. The interval is Student's with Satterthwaite's degrees of freedom:
with few training seeds and much difference between them, close to K − 1.
"""

import math

from scipy.special import stdtrit
from torch import Tensor

from unclip_pl.errors import InputError
from unclip_pl.metrics.interval import NORMAL_975, Interval


def crossed_interval(values: Tensor) -> Interval:
    """Compute the interval of the grand mean over K training seeds and C captions; K = 1 leaves the captions alone.

    Args:
        values: (K, C) numbers.

    Raises:
        InputError: another shape, or fewer than two captions.
    """
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise InputError(
            f"Expected values of K seeds x C >= 2 captions, (K, C). Got {tuple(values.shape)}: add captions."
        )
    values = values.double()
    seeds, captions = values.shape
    by_seed, by_caption, mean = values.mean(1), values.mean(0), values.mean()
    rest = values - by_seed[:, None] - by_caption + mean
    freedom = max(1, (seeds - 1) * (captions - 1))
    return _interval(
        mean.item(),
        seed=_variance_of_mean(by_seed),
        caption=_variance_of_mean(by_caption),
        rest=(rest.square().sum() / (freedom * seeds * captions)).item() if seeds > 1 else 0.0,
        shape=(seeds, captions),
    )


def crossed_resamples(values: Tensor) -> Interval:
    """Compute the same interval of a number that is no mean over captions, such as a Fréchet distance.

    The variance over captions comes from the bootstrap instead, which draws the same captions for all K seeds.

    Args:
        values: (K, 1 + R) estimates on all captions, then on R resamples of them, the same for every seed.

    Raises:
        InputError: another shape, or fewer than two resamples.
    """
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 3:
        raise InputError(
            f"Expected an estimate and R >= 2 resamples of K seeds, (K, 1 + R). Got {tuple(values.shape)}: draw more."
        )
    values = values.double()
    seeds = len(values)
    estimates, resamples = values[:, 0], values[:, 1:]
    apart = resamples - resamples.mean(0)  # (K, R): effect of a draw of captions on one seed and not on all
    rest = apart.var(1).sum().item() / (seeds * max(1, seeds - 1))
    return _interval(
        estimates.mean().item(),
        seed=_variance_of_mean(estimates),
        caption=resamples.mean(0).var().item(),
        rest=rest if seeds > 1 else 0.0,
        shape=(seeds, resamples.shape[1]),
    )


def _variance_of_mean(values: Tensor) -> float:
    return values.var().item() / len(values) if len(values) > 1 else 0.0


def _interval(mean: float, *, seed: float, caption: float, rest: float, shape: tuple[int, int]) -> Interval:
    """Combine the parts A, B and R of the variance, which rest on some seeds and captions (or resamples)."""
    variance = max(seed + caption - rest, seed, caption)  # the difference may be negative by chance: σ² may not
    seeds, captions = shape
    parts = ((seed, seeds - 1), (caption, captions - 1), (rest, (seeds - 1) * (captions - 1)))
    uncertainty = sum(part**2 / freedom for part, freedom in parts if freedom > 0)
    freedom = max(1.0, variance**2 / uncertainty) if uncertainty > 0 else math.inf
    # One training seed tells nothing of others: then only the captions vary, and there are many of those.
    quantile = float(stdtrit(freedom, 0.975)) if seeds > 1 else NORMAL_975
    half = quantile * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)
