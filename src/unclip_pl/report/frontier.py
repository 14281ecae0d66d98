"""Fidelity against diversity: every setting of every contender, and contenders compared where they are as concentrated.

Guidance, a lower temperature and more candidates buy match with diversity, so a single setting of each contender
compares how far they went along that road. Concentration is the gap of the cosines (cos to true less cos between
samples). Each contender's settings, sorted by it, make a line for each training seed and resample. Two lines are read
off at the gap that both reach and that lies nearest to the perfect prior's, or else to 0.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip_pl.evaluation.measures import plain
from unclip_pl.evaluation.scores import resampled_means
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.report.study import Arm, Key, metrics, stacked, whole

#: Curves whose points are settings of a contender's sampling.
CURVES = ("prior guidance", "candidates", "temperature")
#: Measures of fidelity, and that of concentration.
FIDELITY = ("probe_match", "embed_kid", "embed_fd_corrected")
CONCENTRATION = "calibration_gap"
#: The perfect prior's row.
PERFECT = "true posterior"
#: Sides of an ablation, in a table of claims.
SIDES = ("paper", "other")


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


def at_equal(arms: dict[Key, Arm], named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, in the form of ablations, two lines of a curve compared where one measure is the same for both.

    That is the largest value which both lines reach.

    Args:
        arms: all arms.
        named: ablations as the table of claims lists them; of interest are those with ``at``, the measure.
    """
    found = []
    for line in named:
        first, second = (
            [arm for key, arm in arms.items() if key[:3] == ("curve", line.get("curve"), line[side])] for side in SIDES
        )
        if "at" not in line or min(len(first), len(second)) < 2:
            continue
        compared = _compare(first, second, math.inf, along=line["at"], names=line["measures"]).get("measures", {})
        measures = {
            name: {"paper": {"mean": pair["first"]}, "other": {"mean": pair["second"]}, "difference": pair}
            for name, pair in compared.items()
        }
        sides = {name: line[name] for name in ("title", *SIDES)}
        seeds = sorted(set.intersection(*(set(arm) for arm in first + second)))
        found.append({**sides, "seeds": seeds, "one_space": True, "measures": measures})
    return found


def _compare(
    first: list[Arm],
    second: list[Arm],
    wanted: float,
    *,
    along: str = CONCENTRATION,
    names: Sequence[str] = FIDELITY,
) -> dict[str, Any]:
    """Return the paired difference of some measures where another one is equal, over the seeds that all settings share.

    Args:
        first: settings of one side.
        second: settings of the other.
        wanted: value of ``along`` at which to compare, or the nearest one that both sides reach.
        along: measure that is to be equal.
        names: measures to compare.
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in first + second)))
    if not seeds:
        return {}
    gaps = [_lines(own, along, seeds) for own in (first, second)]  # (P, K, 1 + R) each
    means = [gap[:, :, 0].mean(1) for gap in gaps]
    low, high = (float(end(*(float(getattr(x, name)()) for x in means))) for end, name in ((max, "min"), (min, "max")))
    if low > high:
        return {}
    at, measures = min(max(wanted, low), high), {}
    for name in names:
        if all(name in _numbers(arm) for arm in first + second):
            ours, theirs = (
                _read_off(gap, _lines(own, name, seeds), at) for gap, own in zip(gaps, (first, second), strict=True)
            )
            sides = {"first": ours[:, 0].mean().item(), "second": theirs[:, 0].mean().item()}
            measures[name] = plain(crossed_resamples(ours - theirs)) | sides | {"seeds": len(seeds)}
    return {"at": at, "measures": measures}


def _lines(arms: list[Arm], name: str, seeds: list[int]) -> Tensor:
    return torch.stack([_resamples({seed: arm[seed] for seed in seeds}, name) for arm in arms])


def _numbers(arm: Arm) -> set[str]:
    """Return the measures of an arm."""
    cell = next(iter(arm.values()))
    return cell["resamples"].keys() | cell["values"].keys()


def _resamples(arm: Arm, name: str) -> Tensor:
    """Return (K, 1 + R): a measure of each seed and its bootstrap resamples, the same captions for every arm."""
    cell = next(iter(arm.values()))
    if name in cell["resamples"]:
        return stacked(arm, "resamples", name)
    means = [
        resampled_means(row, cell["counts"]["resamples"], generator=torch.Generator().manual_seed(0))
        for row in whole(stacked(arm, "values", name))
    ]
    return torch.stack(means)


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
