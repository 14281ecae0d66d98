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

import numpy as np
from torch import Tensor

from unclip_pl.errors import InputError
from unclip_pl.metrics.interval import NORMAL_975, Interval


def crossed_interval(values: Tensor) -> Interval:
    """Interval of the grand mean of (K, C) values: K training seeds, C captions; K = 1 leaves the captions alone.

    Raises:
        ValueError: for another shape, or fewer than two captions.
    """
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise InputError(f"Expected values of K seeds x C >= 2 captions, (K, C). Got {tuple(values.shape)}.")
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
    """As :func:`crossed_interval`, for what is no mean over captions, such as a Fréchet distance.

    The variance over captions comes from the bootstrap instead, which draws the same captions for all K seeds.

    Args:
        values: (K, 1 + R): the estimate on all captions, then R resamples of them, the same for every seed.

    Raises:
        ValueError: for another shape, or fewer than two resamples.
    """
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 3:
        raise InputError(
            f"Expected an estimate and R >= 2 resamples of K seeds, (K, 1 + R). Got {tuple(values.shape)}."
        )
    values = values.double()
    seeds = len(values)
    estimates, resamples = values[:, 0], values[:, 1:]
    apart = resamples - resamples.mean(0)  # (K, R): what a draw of captions does to one seed and not to all
    rest = apart.var(1).sum().item() / (seeds * max(1, seeds - 1))
    return _interval(
        estimates.mean().item(),
        seed=_variance_of_mean(estimates),
        caption=resamples.mean(0).var().item(),
        rest=rest if seeds > 1 else 0.0,
        shape=(seeds, resamples.shape[1]),
    )


def student_975(freedom: float) -> float:
    """97.5 % quantile of Student's t, to 1e-4, for any real degrees of freedom of at least 1.

    With t = √ν tan θ the density is cosᵛ⁻¹ θ: no special function is needed.
    """
    if freedom > 1e4:
        return NORMAL_975
    theta = np.linspace(0, np.pi / 2, 10_001)
    density = np.cos(theta) ** (freedom - 1)
    mass = np.concatenate([[0], (density[1:] + density[:-1]).cumsum()])
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, theta))


def _variance_of_mean(values: Tensor) -> float:
    return values.var().item() / len(values) if len(values) > 1 else 0.0


def _interval(mean: float, *, seed: float, caption: float, rest: float, shape: tuple[int, int]) -> Interval:
    """From the parts A, B and R of the variance, and how many seeds and captions (or resamples) they rest on."""
    variance = max(seed + caption - rest, seed, caption)  # the difference may be negative by chance: σ² may not
    seeds, captions = shape
    parts = ((seed, seeds - 1), (caption, captions - 1), (rest, (seeds - 1) * (captions - 1)))
    uncertainty = sum(part**2 / freedom for part, freedom in parts if freedom > 0)
    freedom = max(1.0, variance**2 / uncertainty) if uncertainty > 0 else math.inf
    # One training seed tells nothing of others: then only the captions vary, and there are many of those.
    half = (student_975(freedom) if seeds > 1 else NORMAL_975) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)
