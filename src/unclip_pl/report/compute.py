"""Quality for compute: how far each contender lies from the perfect prior, against what training or drawing takes.

The excess of a measure is a contender's value less the perfect prior's, paired by seed and by bootstrap resample of the
captions. All three measures are unbiased, so an excess may come out below 0 where it is small. Lines are power laws,
excess = a · FLOPs^slope, fitted by Poisson pseudo-maximum likelihood (Santos Silva & Tenreyro 2006, "The log of
gravity"), which takes an excess of any sign as it is: no point is dropped, moved or clipped.
"""

from typing import Any

import torch
from torch import Tensor

from unclip_pl.errors import InputError
from unclip_pl.evaluation.measures import plain
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.report.frontier import PERFECT
from unclip_pl.report.study import Arm, Key, same_captions, stacked

#: Curves that are drawn against FLOPs, by title, and the cost that their points differ by.
AXES = {"training budget": "training_flops", "work for an embedding": "flops_per_embedding"}
#: Measures of the excess in words. That of the mean is |E[sample] - E[z_i]|² given the caption.
EXCESS = {
    "embed_fd_corrected": "FD without bias",
    "embed_kid": "kernel distance",
    "mean_error": "squared error of the mean",
}
#: Row of the perfect prior of the training pictures, which lacks what training never shows.
REACHABLE = "seen posterior"
#: Steepest slope that a fit may find.
STEEPEST = 20.0


def compute(arms: dict[Key, Arm]) -> dict[str, Any]:
    """Return title → contender → its points, and the slope of each measure, for the curves of :data:`AXES`.

    Args:
        arms: all arms.

    Returns:
        ``points``, by FLOPs: ``x``, ``flops``, ``seeds`` and the ``excess`` of each measure. ``slopes``, measure →
        interval over the ``seeds`` that all points share and captions, and ``start``, the fitted excess at the first
        point; all None where no power law fits. ``reducible``, the same of the excess over the perfect prior of the
        training pictures, and ``reachable``, that prior's own excess; both empty where it was not measured. Empty
        without a perfect prior.

    Raises:
        InputError: a point and the perfect prior were measured on different captions.
    """
    floor, best = (arms.get(Key("prior", "", name), {}) for name in (PERFECT, REACHABLE))
    reachable = _excesses(best, floor) if best.keys() & floor.keys() else {}
    found: dict[str, Any] = {}
    for title, cost in AXES.items():
        lines: dict[str, list[tuple[Key, Arm]]] = {}
        for key, arm in arms.items():
            if (key.kind, key.title) == ("curve", title) and arm.keys() & floor.keys():
                lines.setdefault(key.name, []).append((key, arm))
        for name, line in lines.items():
            line.sort(key=lambda point: _flops(point[1], cost))
            found.setdefault(title, {})[name] = {
                "points": [_point(key, arm, floor, cost) for key, arm in line],
                "slopes": _slopes([arm for _, arm in line], floor, cost),
                "reducible": _slopes([arm for _, arm in line], best, cost),
                "reachable": reachable,
            }
    return found


def _point(key: Key, arm: Arm, floor: Arm, cost: str) -> dict[str, Any]:
    seeds = sorted(arm.keys() & floor.keys())
    return {"x": key.x, "flops": _flops(arm, cost), "seeds": seeds, "excess": _excesses(arm, floor)}


def _excesses(arm: Arm, floor: Arm) -> dict[str, Any]:
    seeds = sorted(arm.keys() & floor.keys())
    return {name: plain(crossed_resamples(_excess(arm, floor, name, seeds))) for name in EXCESS}


def _flops(arm: Arm, cost: str) -> float:
    return float(next(iter(arm.values()))[cost])


def _slopes(line: list[Arm], floor: Arm, cost: str) -> dict[str, Any]:
    seeds = sorted(set(floor).intersection(*line))
    flops = torch.tensor([_flops(arm, cost) for arm in line], dtype=torch.float64)
    found: dict[str, Any] = {}
    for name in EXCESS if seeds and len(flops.unique()) > 1 else ():
        excess = torch.stack([_excess(arm, floor, name, seeds) for arm in line], dim=-1)  # (K, 1 + R, P)
        slopes = exponent(flops, excess)
        share = torch.softmax(slopes[:, 0].mean() * flops.log(), dim=0)[0]
        start = (excess[:, 0].mean(0).sum() * share).item()
        interval = plain(crossed_resamples(slopes))
        found[name] = {**interval, "start": start if interval["mean"] is not None else None, "seeds": seeds}
    return found


def exponent(flops: Tensor, excess: Tensor) -> Tensor:
    """Return the slope b of excess = a · flops^b by Poisson pseudo-maximum likelihood.

    Its equations say that the fit keeps the sum of the excess and that of excess · log flops. So b is the one for which
    the mean of log flops, weighted by flops^b, is that weighted by the excess.

    Args:
        flops: (P,) positive numbers, not all equal.
        excess: (..., P) numbers of any sign.

    Returns:
        (...); NaN where no slope within :data:`STEEPEST` fits, as where the excess sums to 0 or less.
    """
    x = flops.double().log()
    wanted = (excess * x).sum(-1) / excess.sum(-1)
    low, high = torch.full_like(wanted, -STEEPEST), torch.full_like(wanted, STEEPEST)

    def mean(slope: Tensor) -> Tensor:
        return (torch.softmax(slope[..., None] * x, dim=-1) * x).sum(-1)

    fits = (excess.sum(-1) > 0) & (mean(low) < wanted) & (wanted < mean(high))
    for _ in range(60):
        middle = (low + high) / 2
        below = mean(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(fits, low, torch.nan)


def _excess(arm: Arm, floor: Arm, name: str, seeds: list[int]) -> Tensor:
    """Return (K, 1 + R): a measure less the perfect prior's, for each seed and resample.

    Raises:
        InputError: they were measured on different captions.
    """
    ours, theirs = ({seed: side[seed] for seed in seeds} for side in (arm, floor))
    rows = [[side[seed]["counts"]["rows"] for seed in seeds] for side in (ours, theirs)]
    if rows[0] != rows[1] or not same_captions(ours, theirs):
        raise InputError(
            f"Expected curves on the perfect prior's captions. Got {rows[0]} and {rows[1]}: measure again."
        )
    return _estimates(ours, name) - _estimates(theirs, name)


def _estimates(arm: Arm, name: str) -> Tensor:
    """Return (K, 1 + R).

    With two samples s, s' of a caption and the truth z, E[s·s'] - 2 E[s·z] is |E[s] - E[z]|² less |E[z]|², which is the
    same for every prior.
    """
    if name == "mean_error":
        return stacked(arm, "resamples", "cos_samples") - 2 * stacked(arm, "resamples", "cos_true")
    return stacked(arm, "resamples", name)
