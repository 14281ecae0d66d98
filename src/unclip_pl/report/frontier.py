"""Fidelity against diversity: every setting of every contender, and contenders compared where they are as concentrated.

Guidance, a lower temperature and more candidates buy match with diversity, so a single setting of each contender
compares how far they went along that road. Concentration is the gap of the cosines (cos to true less cos between
samples). Each contender's settings, sorted by it, make a line for each training seed and resample. Two lines are read
off at the gap that both reach and that lies nearest to the perfect prior's, or else to 0.
"""

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip_pl.evaluation.measures import plain
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.report.study import Arm, Key, metrics, stacked

#: Curves whose points are settings of a contender's sampling.
CURVES = ("prior guidance", "candidates", "temperature")
#: Measures of fidelity, and that of concentration.
FIDELITY = ("probe_match", "embed_kid", "embed_fd_corrected")
CONCENTRATION = "calibration_gap"
#: The perfect prior's row.
PERFECT = "true posterior"


def frontier(arms: dict[Key, Arm], rows: dict[str, Arm]) -> dict[str, Any]:
    """Return the points of every contender, where lines are read off, and the paired differences there.

    Args:
        arms: all arms.
        rows: arms of the main tables.

    Returns:
        ``reference``, the perfect prior's point, or None; ``points``, contender → points; ``differences``, those of
        every two contenders where they are as concentrated, with that gap as ``at``.
    """
    found: dict[str, list[Arm]] = {}
    for key, arm in arms.items():
        if key.kind == "frontier" or (key.kind == "curve" and key.title in CURVES):
            found.setdefault(key.title if key.kind == "frontier" else key.name, []).append(arm)
    perfect = _point(rows[PERFECT]) if PERFECT in rows else None
    wanted = perfect[CONCENTRATION]["mean"] if perfect else 0.0
    order = sorted(found, key=lambda name: list(rows).index(name) if name in rows else len(rows))
    lines = {name: found[name] for name in order if len(found[name]) > 1}
    pairs = [
        {"first": a, "second": b, **compared}
        for a, b in combinations(lines, 2)
        if (compared := _compare(lines[a], lines[b], wanted))
    ]
    points = {
        name: sorted(map(_point, own), key=lambda point: point[CONCENTRATION]["mean"]) for name, own in lines.items()
    }
    return {"reference": perfect, "points": points, "differences": pairs}


def _point(arm: Arm) -> dict[str, Any]:
    return {name: plain(value) for name, value in metrics(arm).items() if name in (CONCENTRATION, *FIDELITY)}


def _compare(first: list[Arm], second: list[Arm], wanted: float) -> dict[str, Any]:
    """Return the paired difference of each measure of fidelity at one gap, over the seeds that all settings share."""
    seeds = sorted(set.intersection(*(set(arm) for arm in first + second)))
    if not seeds:
        return {}
    gaps = [_lines(own, CONCENTRATION, seeds) for own in (first, second)]  # (P, K, 1 + R) each
    means = [gap[:, :, 0].mean(1) for gap in gaps]
    low, high = (float(end(*(float(getattr(x, name)()) for x in means))) for end, name in ((max, "min"), (min, "max")))
    if low > high:
        return {}
    at, measures = min(max(wanted, low), high), {}
    for name in FIDELITY:
        if all(name in next(iter(arm.values()))["resamples"] for arm in first + second):
            ours, theirs = (
                _read_off(gap, _lines(own, name, seeds), at) for gap, own in zip(gaps, (first, second), strict=True)
            )
            sides = {"first": ours[:, 0].mean().item(), "second": theirs[:, 0].mean().item()}
            measures[name] = plain(crossed_resamples(ours - theirs)) | sides | {"seeds": len(seeds)}
    return {"at": at, "measures": measures}


def _lines(arms: list[Arm], name: str, seeds: list[int]) -> Tensor:
    return torch.stack([stacked({seed: arm[seed] for seed in seeds}, "resamples", name) for arm in arms])


def _read_off(gaps: Tensor, values: Tensor, at: float) -> Tensor:
    """Return (K, 1 + R): the line through P settings of each seed and resample, at a gap.

    Args:
        gaps: (P, K, 1 + R) concentration.
        values: (P, K, 1 + R) fidelity.
        at: gap to read off at; beyond a line's ends its end counts.
    """
    order = gaps[:, :, 0].mean(1).argsort()
    xs, ys = (part[order].flatten(1).T.numpy() for part in (gaps, values))
    # Gaps of a resample may cross where two settings lie close: its line follows the order of the means.
    lines = [np.interp(at, np.maximum.accumulate(x), y) for x, y in zip(xs, ys, strict=True)]
    return torch.tensor(np.array(lines)).view(gaps.shape[1], -1)
