"""Fidelity against diversity: every setting of every contender, and contenders compared where they are as concentrated.

Guidance, a lower temperature and more candidates buy match with diversity, so a single setting of each contender
compares how far they went along that road. Concentration is the gap of the cosines (cos to true less cos between
samples). A contender's frontier is the convex hull of its settings, on the side where a measure is better. It can be
reached: a contender that draws each caption's setting by lot has the mean of the match and of the gap, and at most the
mean of a kernel or Fréchet distance, which is convex in the distribution of the samples. Two frontiers are read off at
the gap that both reach and that lies nearest to the perfect prior's, or else to 0.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip_pl.evaluation.measures import MEASURES, plain
from unclip_pl.evaluation.scores import resampled_means, resampler
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.report.study import Arm, Key, captions_of, metrics, same_captions, stacked, whole

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
    """Return the points and the frontier of every contender, and paired differences where two are as concentrated.

    Args:
        arms: all arms.
        rows: arms of the main tables.

    Returns:
        ``reference``, the perfect prior's point, or None; ``points``, contender → points by their gap; ``hulls``,
        contender → measure → the places of those points that its frontier joins; ``differences``, those of every
        two contenders where they are as concentrated, with that gap as ``at``.
    """
    found: dict[str, list[Arm]] = {}
    for key, arm in arms.items():
        if (key.kind == "frontier" or (key.kind == "curve" and key.title in CURVES)) and _is_finite(arm):
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
    hulls = {name: {measure: _joined(own, measure) for measure in FIDELITY} for name, own in points.items()}
    return {"reference": perfect, "points": points, "hulls": hulls, "differences": pairs}


def _is_finite(arm: Arm) -> bool:
    """Return whether an arm has its numbers: one that diverged is on no frontier."""
    return all(math.isfinite(_mean(arm, name)) for name in (CONCENTRATION, *FIDELITY) if name in _numbers(arm))


def _point(arm: Arm) -> dict[str, Any]:
    return {name: plain(value) for name, value in metrics(arm).items() if name in (CONCENTRATION, *FIDELITY)}


def _joined(points: list[dict[str, Any]], name: str) -> list[int]:
    """Return the places of the points that the frontier of a measure joins; none where a point lacks the measure."""
    if not all(name in point for point in points):
        return []
    x, y = ([point[of]["mean"] for point in points] for of in (CONCENTRATION, name))
    return _vertices(x, y, name)


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
        if not measures:
            continue
        sides = {name: line[name] for name in ("title", *SIDES)}
        seeds = sorted(set.intersection(*(set(arm) for arm in first + second)))
        found.append({**sides, "seeds": seeds, "one_space": True, "measures": measures})
    return found


def never_equal(arms: dict[Key, Arm], named: list[dict[str, Any]]) -> dict[str, str]:
    """Return title → what keeps two lines of a curve from being compared where one measure is the same for both.

    Args:
        arms: all arms.
        named: ablations as for :func:`at_equal`.
    """
    found = {}
    for line in (line for line in named if "at" in line):
        measure, reached = MEASURES[line["at"]], {}
        for side in (line[name] for name in SIDES):
            own = [_mean(arm, line["at"]) for key, arm in arms.items() if key[:3] == ("curve", line["curve"], side)]
            reached[side] = [mean for mean in own if math.isfinite(mean)]
        if all(reached.values()) and max(map(min, reached.values())) > min(map(max, reached.values())):
            shown = ", ".join(
                f"{side} from {measure.show(min(own))} to {measure.show(max(own))}" for side, own in reached.items()
            )
            found[line["title"]] = f"{measure.title}: {shown}; at no setting are the two equal"
    return found


def _compare(
    first: list[Arm],
    second: list[Arm],
    wanted: float,
    *,
    along: str = CONCENTRATION,
    names: Sequence[str] = FIDELITY,
) -> dict[str, Any]:
    """Return the paired difference of some measures where another one is equal.

    It is taken over the training seeds of the settings that are mixed there. Nothing is compared that was measured on
    different captions.

    Args:
        first: settings of one side.
        second: settings of the other.
        wanted: value of ``along`` at which to compare, or the nearest one that both sides reach.
        along: measure that is to be equal.
        names: measures to compare.
    """
    reached = [[_mean(arm, along) for arm in side] for side in (first, second)]
    low, high = max(map(min, reached)), min(map(max, reached))
    if low > high or not _as_many(first + second, along):
        return {}
    at, measures = min(max(wanted, low), high), {}
    for name in names:
        if not all(name in _numbers(arm) for arm in first + second) or not _as_many(first + second, name):
            continue
        mixtures = [_mixture(side, along, name, at) for side in (first, second)]
        seeds = sorted(set.intersection(*(set(arm) for mixture in mixtures for arm in mixture.settings)))
        if seeds:
            ours, theirs = (mixture.read_off(along, name, at, seeds) for mixture in mixtures)
            sides = {"first": ours[:, 0].mean().item(), "second": theirs[:, 0].mean().item()}
            behind = {"seeds": len(seeds), "captions": captions_of(first[0], name)}
            measures[name] = plain(crossed_resamples(ours - theirs)) | sides | behind
    return {"at": at, "measures": measures} if measures else {}


def _as_many(arms: list[Arm], name: str) -> bool:
    """Return whether a measure of all arms is over the same captions, or at least as many."""
    return len({captions_of(arm, name) for arm in arms}) == 1 and same_captions(*arms)


class _Mixture(NamedTuple):
    """Two settings next to each other on a frontier, of which every caption draws one by lot."""

    settings: tuple[Arm, Arm]
    weight: float  # of the second
    slope: float  # of the frontier between them

    def read_off(self, along: str, name: str, at: float, seeds: list[int]) -> Tensor:
        """Return (K, 1 + R): a measure of each seed and resample where ``along`` has a given value.

        A seed or resample counts to first order: it moves along the frontier from its own mixture to that value. So
        nothing is cut off at a frontier's ends.
        """
        ends = [{seed: arm[seed] for seed in seeds} for arm in self.settings]
        x, y = (_resamples(ends[0], of).lerp(_resamples(ends[1], of), self.weight) for of in (along, name))
        return y - self.slope * (x - at)


def _mixture(settings: list[Arm], along: str, name: str, at: float) -> _Mixture:
    x, y = ([_mean(arm, of) for arm in settings] for of in (along, name))
    hull = _vertices(x, y, name)
    if len(hull) == 1:
        return _Mixture((settings[hull[0]],) * 2, 0.0, 0.0)
    right = next((i for i in range(1, len(hull)) if x[hull[i]] >= at), len(hull) - 1)
    a, b = hull[right - 1], hull[right]
    return _Mixture((settings[a], settings[b]), (at - x[a]) / (x[b] - x[a]), (y[b] - y[a]) / (x[b] - x[a]))


def _mean(arm: Arm, name: str) -> float:
    return _resamples(arm, name)[:, 0].mean().item()


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
        resampled_means(row, cell["counts"]["resamples"], generator=resampler())
        for row in whole(stacked(arm, "values", name))
    ]
    return torch.stack(means)


def _vertices(x: Sequence[float], y: Sequence[float], name: str) -> list[int]:
    """Return the points, by rising x, that no mixture of two others beats: the hull on the better side of a measure."""
    sign = 1 if MEASURES[name].better == "higher" else -1
    found: list[int] = []
    for i in sorted(range(len(x)), key=lambda i: (x[i], -sign * y[i])):
        if found and x[found[-1]] == x[i]:
            continue  # of two at one place the better one came first
        slopes = [sign * (y[i] - y[a]) / (x[i] - x[a]) for a in found]  # from each vertex to this point
        while len(found) > 1 and slopes[-2] <= slopes[-1]:  # the last vertex lies under the line past it
            found.pop()
            slopes.pop()
        found.append(i)
    return found
