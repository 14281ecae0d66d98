"""A study's report from its cells' measurements: pure arithmetic, no network is asked again.

A cell is one training seed of one prior. What is compared is compared seed by seed and caption by caption: seed k of
either prior saw the data in the same order, and its images start from the same noise. Intervals: see
:mod:`unclip_pl.metrics.crossed`.
"""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.evaluation.assemble import plain
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.evaluation.study_claims import study_claims
from unclip_pl.metrics.crossed import crossed_interval, crossed_resamples
from unclip_pl.metrics.interval import Interval, mean_interval, share_interval, sign_test

#: Where a study's cells lie, and what was chosen on validation data, below its folder.
CELLS, BEST = "cells", "best"
RIVALS = ("diffusion", "ar")
#: What sampling alone decides, read off the curves: (title, curve, series, the paper's x, another x).
SAMPLED_ABLATIONS = (
    ("best of 2", "candidates", "diffusion", "2", "1"),
    ("dot token", "dot quantile", "ar", "0.5", "0"),
    ("dot token above 50 or 70 %", "dot quantile", "ar", "0.5", "0.7"),
    ("dot token above 50 or 85 %", "dot quantile", "ar", "0.5", "0.85"),
    ("dot token above 50 or 95 %", "dot quantile", "ar", "0.5", "0.95"),
    ("prior guidance, diffusion", "prior guidance", "diffusion", "1", "2"),
    ("prior guidance, ar", "prior guidance", "ar", "1", "2"),
    ("analytic variance, 2 steps", "sampling steps", ("analytic", "fixed"), "2", "2"),
    ("analytic variance, 8 steps", "sampling steps", ("analytic", "fixed"), "8", "8"),
)
#: What training decides: cells of a group ``ablation/TITLE/ARM``, the paper's arm and another.
TRAINED_ABLATIONS = (
    ("prediction", "x0", "eps"),
    ("text tokens", "tokens and z_t", "z_t alone"),
    ("SAM", "with SAM", "without SAM"),
)
#: Arms in spaces of different CLIPs: distances and cosines there have different units, so what attributes say is left.
COMPARABLE = {"SAM": ("probe_match",)}
COSTS = (
    "parameters", "training_steps", "training_samples", "training_seconds", "training_flops", "evaluations",
    "flops_per_embedding", "seconds_per_embedding",
)  # fmt: skip

Arms = dict[int, dict[str, Any]]  # training seed → what its cell says of one arm


class Study(NamedTuple):
    """Everything that was measured."""

    arms: dict[str, Arms]  # "GROUP/ARM" → seeds
    cells: list[dict[str, Any]]
    choices: list[dict[str, Any]]


def read_study(folder: Path) -> Study:
    """All cells of a study.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is broken.
    """
    paths = sorted((folder / CELLS).glob("*.json"))
    if not paths:
        raise MissingFileError(f"No cells in {folder / CELLS}: `unclip reproduce` of a rematch measures them.")
    cells = [_read(path) | {"file": path.name} for path in paths]
    arms: dict[str, Arms] = defaultdict(dict)
    for cell in cells:
        for name, arm in cell["arms"].items():
            arms[label(cell["group"], name)][cell["seed"]] = arm
    return Study(dict(arms), cells, [_read(path) for path in sorted((folder / BEST).glob("*.json"))])


def label(group: str, arm: str) -> str:
    """A group that names its arm (``need/ARM``, ``ablation/TITLE/ARM``, ``curve/TITLE/SERIES/X``) overrules the arm's
    own name.
    """
    own = group.startswith(("need/", "ablation/")) or (group.startswith("curve/") and group.count("/") == 3)
    return group if own else f"{group}/{arm}"


def study_report(study: Study) -> dict[str, Any]:
    """``report.json`` without its pictures."""
    arms = study.arms
    best = {name: arms.get(f"best/{name}") or arms.get(f"matched/{name}") for name in RIVALS}
    rows = {name: found for name, found in best.items() if found}
    rows |= {f"{name} (matched)": arms[f"matched/{name}"] for name in RIVALS if f"matched/{name}" in arms}
    own = ("matched", "best", "reference")
    rows |= {
        name.partition("/")[2]: found
        for name, found in arms.items()
        if name.partition("/")[0] in own and name.partition("/")[2] not in RIVALS
    }
    report: dict[str, Any] = {
        "priors": {name: entry(found) for name, found in rows.items()},
        "head_to_head": duel(*(rows.get(name, {}) for name in RIVALS)),
        "head_to_head_matched": duel(*(rows.get(f"{name} (matched)", {}) for name in RIVALS)),
        "need": {name.partition("/")[2]: entry(found) for name, found in arms.items() if name.startswith("need/")},
        "differences": differences({**rows, **{n: a for n, a in arms.items() if n.startswith("need/")}}),
        "curves": curves(arms),
        "ablations": ablations(arms),
        "spaces": spaces(study.cells),
        "choices": study.choices,
    }
    report["meta"] = meta(study, report)
    report["claims"] = study_claims(report)
    return report


def entry(arm: Arms) -> dict[str, Any]:
    """One row of the tables."""
    first = next(iter(arm.values()))
    # Seconds of several runs: one that had to wait for other work on the machine moves their mean, and no median.
    costs = {name: statistics.median(cell[name] for cell in arm.values()) for name in COSTS}
    seconds = [cell["training_seconds"] for cell in arm.values()]
    return {
        "class": first["class"],
        "reference": first["reference"],
        "seeds": sorted(arm),
        "lr": first["lr"],
        "sampling": first["sampling"],
        "metrics": {name: plain(value) for name, value in metrics(arm).items()},
        "training_seconds_range": [min(seconds), max(seconds)],
        **costs,
    }


def metrics(arm: Arms) -> dict[str, Interval]:
    """Every measure with an interval over training seeds and captions."""
    first = next(iter(arm.values()))
    values = {name: _whole(stacked(arm, "values", name)) for name in first["values"]}
    found = {name: crossed_interval(numbers) for name, numbers in values.items()}
    found |= {name: crossed_resamples(stacked(arm, "resamples", name)) for name in first["resamples"]}
    shares = [name for name in found if MEASURES[name].percent]
    found |= {name: of_share(found[name], values[name].shape[1] if name in values else 0) for name in shares}
    return {name: found[name] for name in MEASURES if name in found}


def of_share(interval: Interval, captions: int) -> Interval:
    """Inside [0, 1]; where every caption was answered alike, Wilson's over captions: no spread is no certainty."""
    mean, low, high = interval
    if captions > 1 and low == high and mean in (0.0, 1.0):
        return share_interval(mean, captions)
    return Interval(mean, low if math.isnan(low) else max(0.0, low), high if math.isnan(high) else min(1.0, high))


def stacked(arm: Arms, kind: str, name: str) -> Tensor:
    """(K, …) numbers of a measure, by training seed.

    Raises:
        ValueError: the seeds were measured on different numbers of captions.
    """
    rows = [arm[seed][kind][name] for seed in sorted(arm)]
    if len({len(row) for row in rows}) > 1:
        counts = ", ".join(str(len(row)) for row in rows)
        raise InputError(f"Expected {name} of as many captions at every seed. Got {counts}: measure the cells again.")
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)


def _whole(values: Tensor) -> Tensor:
    """The captions of which every seed has a number."""
    kept = values[:, ~values.isnan().any(0)]
    return kept if kept.shape[1] > 1 else values.new_full((len(values), 2), torch.nan)


def shared(a: Arms, b: Arms) -> tuple[Arms, Arms]:
    """The training seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return {seed: a[seed] for seed in seeds}, {seed: b[seed] for seed in seeds}


class Pair(NamedTuple):
    """A measure of two arms, at the training seeds and captions that both have."""

    first: Tensor  # (K, C), or (K, 1 + R) of a bootstrap
    second: Tensor
    resampled: bool

    def difference(self) -> Interval:
        """First less second, paired by training seed and caption."""
        return (crossed_resamples if self.resampled else crossed_interval)(self.first - self.second)

    def means(self) -> dict[str, float | None]:
        """Of either side, of nothing but what is compared: their difference is the difference."""
        sides = {"first": self.first, "second": self.second}
        means = {name: (x[:, 0] if self.resampled else x).mean().item() for name, x in sides.items()}
        return {name: value if math.isfinite(value) else None for name, value in means.items()}


def paired(a: Arms, b: Arms, name: str) -> Pair | None:
    """A measure of both arms; None where they share no seed or number."""
    a, b = shared(a, b)
    if not a:
        return None
    kinds = [kind for kind in ("values", "resamples") if all(name in next(iter(arm.values()))[kind] for arm in (a, b))]
    if not kinds:
        return None
    first, second = stacked(a, kinds[0], name), stacked(b, kinds[0], name)
    if kinds[0] == "resamples":
        return Pair(first, second, resampled=True)
    both = _whole(torch.cat([first, second]))
    return Pair(both[: len(first)], both[len(first) :], resampled=False)


def differences(rows: dict[str, Arms]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Paired differences of every two rows, and both means, of the measures that the claims speak of."""
    wanted = (
        "fd_judge", "embed_fd", "stated_match", "clip_score", "residual", "diversity_gap", "vendi", "recall",
        "cos_true",
    )  # fmt: skip
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in wanted:
        pairs = {f"{a} - {b}": paired(rows[a], rows[b], name) for a in rows for b in rows if a != b}
        found[name] = {label: plain(pair.difference()) | pair.means() for label, pair in pairs.items() if pair}
    return found


def duel(first: Arms, second: Arms) -> dict[str, Any] | None:
    """Head to head on every measure that captions have: ties half; None where one side is missing."""
    first, second = shared(first, second)
    if not first:
        return None
    rates = {}
    for name in next(iter(first.values()))["values"]:
        better = MEASURES[name].better
        if better == "neither" or name not in next(iter(second.values()))["values"]:
            continue
        sign = 1 if better == "higher" else -1
        ours, theirs = sign * stacked(first, "values", name), sign * stacked(second, "values", name)
        there = ~(ours + theirs).isnan().any(0)
        ours, theirs = ours[:, there], theirs[:, there]
        if ours.shape[1] < 2:
            continue
        wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
        test = sign_test(ours, theirs)
        rates[name] = plain(of_share(crossed_interval(wins), wins.shape[1])) | {
            "normal": plain(mean_interval(wins)),
            **test._asdict(),
        }
    return {"first": RIVALS[0], "second": RIVALS[1], "seeds": len(first), "win_rates": rates}


def curves(arms: dict[str, Arms]) -> dict[str, Any]:
    """title → series → measure → [{x, mean, low, high}], x ascending."""
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        if name.startswith("curve/"):
            _, title, series, x = name.split("/")
            points = found.setdefault(title, {}).setdefault(series, {})
            for measure, interval in metrics(arm).items():
                points.setdefault(measure, []).append({"x": float(x), **plain(interval)})
    for series in found.values():
        for measures in series.values():
            for points in measures.values():
                points.sort(key=lambda point: point["x"])
    return found


def ablations(arms: dict[str, Arms]) -> list[dict[str, Any]]:
    """What the paper does beside what it does not, one line each; those that were measured."""
    pairs = [
        (title, ours, theirs, arms.get(f"ablation/{title}/{ours}"), arms.get(f"ablation/{title}/{theirs}"))
        for title, ours, theirs in TRAINED_ABLATIONS
    ]
    for title, curve, series, x, other in SAMPLED_ABLATIONS:
        a, b = (series, series) if isinstance(series, str) else series
        ours, theirs = (x, other) if isinstance(series, str) else (a, b)
        pairs.append((title, ours, theirs, arms.get(f"curve/{curve}/{a}/{x}"), arms.get(f"curve/{curve}/{b}/{other}")))
    return [ablation(title, ours, theirs, a, b) for title, ours, theirs, a, b in pairs if a and b]


def ablation(title: str, ours: str, theirs: str, a: Arms, b: Arms) -> dict[str, Any]:
    """The two arms and their paired difference, for every measure that both have."""
    a, b = shared(a, b)
    first, second = (metrics(arm) if arm else {} for arm in (a, b))
    measures = {
        name: {"paper": plain(first[name]), "other": plain(second[name]), "difference": plain(pair.difference())}
        for name in COMPARABLE.get(title, tuple(MEASURES))
        if name in first and name in second and (pair := paired(a, b, name))
    }
    return {"title": title, "paper": ours, "other": theirs, "seeds": sorted(a), "measures": measures}


def spaces(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many directions each CLIP's embeddings use: the study's own, and those of the SAM ablation."""
    own = [cell for cell in cells if not _of_sam(cell)]
    most = max(own, key=lambda cell: cell["counts"]["rows"], default=None)  # embeddings: the more, the better known
    found = {"the study's CLIP": most and most["space"]}
    found |= {cell["group"].rpartition("/")[2]: cell["space"] for cell in cells if _of_sam(cell)}
    return {name: space for name, space in found.items() if space}


def _of_sam(cell: dict[str, Any]) -> bool:
    return cell["group"].startswith("ablation/SAM/")


def meta(study: Study, report: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers come from."""
    cells = study.cells
    # Of the tables' rows; curves are measured on fewer captions.
    drawn = max(cells, key=lambda cell: (cell["counts"]["captions"], cell["counts"]["many"]))
    hashes = {name: next(iter(arm.values()))["config_hash"] for name, arm in study.arms.items()}
    return {
        "training_seeds": min(len(report["priors"].get(name, {"seeds": []})["seeds"]) for name in RIVALS),
        "cells": len(cells),
        "counts": drawn["counts"],
        "commits": sorted({cell["meta"]["commit"] for cell in cells}),
        "hardware": sorted({cell["meta"]["hardware"] for cell in cells}),
        "versions": drawn["meta"]["versions"],
        "config_hashes": {name: value for name, value in hashes.items() if value},
        "decoder": drawn["decoder"],
        "config": {"priors": {name: row["sampling"] for name, row in report["priors"].items()}},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is broken ({error}): delete it and run the study again, it measures this alone."
        ) from None
