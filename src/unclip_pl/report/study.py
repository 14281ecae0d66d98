"""Reduce a study's cells to the plain data of ``report.json``. Pure arithmetic: no network is asked again.

A cell holds what one training seed of some arms scored, caption by caption. Arms are compared seed by seed and caption
by caption: seed k of every prior saw the data in the same order, and its images start from the same noise. A comparison
is a study of one cell and one training seed. Intervals: see :mod:`unclip_pl.metrics.crossed`.
"""

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.evaluation.measures import ASKED, MEASURES, OF_ASKED, plain, within_shares
from unclip_pl.evaluation.sheet import FORMAT
from unclip_pl.metrics.crossed import crossed_interval, crossed_resamples
from unclip_pl.metrics.frechet import without_bias
from unclip_pl.metrics.interval import Interval, mean_interval, sign_test

#: Below a study's folder: its cells, and what was chosen on validation data.
CELLS, BEST = "cells", "best"
#: Sides of a paired difference, whose means stand beside it.
SIDES = ("first", "second")
#: What a matched row adds to the name of its prior.
MATCHED = " (matched)"
COSTS = (
    "parameters", "training_steps", "training_samples", "training_seconds", "training_flops", "evaluations",
    "flops_per_embedding", "seconds_per_embedding",
)  # fmt: skip
#: Fréchet distances, which stand in reports without their bias as well.
BIASED = ("fd_judge", "embed_fd")
#: What the name of such a distance ends with.
CORRECTED = "_corrected"
#: Shares of those pictures that have what they ask of.
SWAPPED = ("swapped", "colors_swapped")
#: Measures of pictures that are no means over captions.
PICTURED = ("fd_judge", "kid_judge", "told_apart", *SWAPPED)
#: Scores that are this near to each other, in parts of them, are a tie: float32 holds no more.
TIE = 1e-6
#: Measures whose paired differences are reported.
DIFFERENCES = (
    "fd_judge", "fd_judge_corrected", "kid_judge", "told_apart", "precision", "density", "embed_fd",
    "embed_fd_corrected", "embed_kid", "probe_match", "stated_match", "clip_score", "retrieval_r10", "residual",
    "diversity_gap", "vendi", "recall", "cos_true", "text_cos", "nats", "parts_right", "swapped",
    "colors_swapped", "class_share",
)  # fmt: skip

Arm = dict[int, dict[str, Any]]  # training seed → what its cell says of the arm


class Key(NamedTuple):
    """The place of an arm in the report."""

    kind: str  # see Cell
    title: str  # the table, curve or ablation that it belongs to
    name: str  # its row, line or side
    x: float | None = None  # where on the curve


class Study(NamedTuple):
    """All that was measured."""

    arms: dict[Key, Arm]
    cells: list[dict[str, Any]]
    choices: list[dict[str, Any]]


def read_study(folder: Path, order: list[str], beside: Sequence[str] = ()) -> Study:
    """Read all cells of a study.

    Args:
        folder: folder with ``cells/`` and, perhaps, ``best/``.
        order: names of arms that come first in tables, in this order.
        beside: patterns of other studies' cells on the same base, relative to ``folder``. What they have measured is
            measured here.

    Raises:
        MissingFileError: there are no cells, or none of another study.
        InputError: a file is broken, two cells measured the same arm and seed, cells have different bases, or the seeds
            of an arm were not measured alike.
    """
    paths = sorted((folder / CELLS).glob("[!.]*.json"))
    if not paths:
        raise MissingFileError(
            f"Expected cells in {folder / CELLS}. Got none: run `unclip test` with a config of configs/compare, or "
            "`unclip reproduce`, to measure them."
        )
    for pattern in beside:
        found = sorted(folder.glob(pattern))
        if not found:
            raise MissingFileError(
                f"Expected cells of another study in {folder / pattern}. Got none: measure them first."
            )
        paths += found
    cells = [read_cell(path) | {"file": os.path.relpath(path, folder / CELLS)} for path in paths]
    arms: dict[Key, Arm] = defaultdict(dict)
    source: dict[tuple[Key, int], str] = {}
    for cell in cells:
        for name, arm in cell["arms"].items():
            key, seed = key_of(cell, name), cell["seed"]
            if (key, seed) in source:
                raise InputError(
                    f"Expected one cell for each arm and seed. Got seed {seed} of {name!r} ({cell['kind']}) in "
                    f"{source[key, seed]} and {cell['file']}: delete one of them."
                )
            source[key, seed] = cell["file"]
            of_cell = {name: cell.get(name) for name in ("base", "counts", "file", "heldout")}
            arms[key][seed] = arm | of_cell
    _check_bases(cells)
    for key, arm in arms.items():
        _check_seeds(key, arm)
    known = {name: place for place, name in enumerate(order)}
    ordered = sorted(arms, key=lambda key: (key.kind, known.get(key.name, len(known))))
    choices = [_read(path) | {"file": path.stem} for path in sorted((folder / BEST).glob("[!.]*.json"))]
    return Study({key: arms[key] for key in ordered}, cells, choices)


def key_of(cell: dict[str, Any], arm: str) -> Key:
    """Return where an arm of a cell stands: its series names it, except on a curve whose arms are named by their x."""
    kind, title, series = cell["kind"], cell["title"], cell["series"]
    if kind == "curve":
        return Key(kind, title, series or arm, float(arm) if cell["x"] is None else cell["x"])
    if kind == "frontier":
        return Key(kind, series, arm)  # many settings of one contender
    return Key(kind, title, series or arm)


def with_baselines(study: Study, named: list[dict[str, Any]]) -> Study:
    """Add to a study the sides of ablations that are a point of a curve or a row of a table, and so need no own cell.

    Args:
        study: all cells.
        named: baselines as the table of claims lists them. A side that has a cell of its own stays as it is.
    """
    arms = dict(study.arms)
    for line in named:
        kind, x = ("curve", float(line["x"])) if "curve" in line else ("table", None)
        point = Key(kind, line[kind], line["series"], x)
        if point in arms:
            arms.setdefault(Key("ablation", line["ablation"], line["side"]), arms[point])
    return study._replace(arms=arms)


def _check_bases(cells: list[dict[str, Any]]) -> None:
    """Refuse cells of several bases or judges. Ablations alone may compare bases, such as two CLIPs."""
    for name, what in (("base", "base (CLIP, judge, decoder)"), ("judge", "judge")):
        # Cells that were written before 2026-11-29 name no judge, and those of embeddings alone have none.
        files = {cell[name]: cell["file"] for cell in cells if cell["kind"] != "ablation" and cell.get(name)}
        if len(files) > 1:
            told = ", ".join(f"{found} ({file})" for found, file in files.items())
            raise InputError(f"Expected cells of one {what}. Got {told}: measure the cells of one of them again.")


def _check_seeds(key: Key, arm: Arm) -> None:
    """Refuse training seeds of an arm that were not made and measured alike: their mean would mix two things."""
    first, *others = arm.values()
    for other in others:
        for name in ("counts", "sampling", "lr"):
            _require_equal(key, name, first, other, first[name], other[name])
        if first["heldout"] and other["heldout"]:  # old cells do not say
            _require_equal(key, "held-out captions", first, other, first["heldout"], other["heldout"])
        _require_equal(key, "measures", first, other, *(sorted(x["values"] | x["resamples"]) for x in (first, other)))


def _require_equal(key: Key, name: str, a: dict[str, Any], b: dict[str, Any], ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise InputError(
            f"Expected the same {name} at every training seed of {key.name!r} ({key.kind}). Got {ours} in {a['file']}, "
            f"{theirs} in {b['file']}: measure one of them again."
        )


def study_report(study: Study, paper: dict[str, Any]) -> dict[str, Any]:
    """Return ``report.json`` without claims, pictures and times.

    Args:
        study: all cells.
        paper: the table of claims, whose ``ablations`` name the pairs of arms that are compared.
    """
    rows = rows_of(study.arms)
    tables: dict[str, dict[str, Arm]] = defaultdict(dict)
    for key, arm in study.arms.items():
        if key.kind == "table":
            tables[key.title][key.name] = arm
    compared = [rows, *({f"{title}: {name}": arm for name, arm in t.items()} for title, t in tables.items())]
    report: dict[str, Any] = {
        "priors": {name: entry(arm) for name, arm in rows.items()},
        "duels": duels(rows),
        "tables": {title: {name: entry(arm) for name, arm in table.items()} for title, table in tables.items()},
        "differences": differences(compared),
        "curves": curves(study.arms),
        "ablations": ablations(study.arms, paper["ablations"]),
        "spaces": spaces(study.cells),
        "choices": study.choices,
        **foundations(study.cells),
    }
    report["meta"] = meta(study, report)
    return report


def rows_of(arms: dict[Key, Arm]) -> dict[str, Arm]:
    """Return the rows of the main tables: each prior, then what was measured of it at matched settings.

    A prior that was measured at matched settings alone has both rows all the same.
    """
    matched = {key.name: arm for key, arm in arms.items() if key.kind == "matched"}
    rows = {key.name: arm for key, arm in arms.items() if key.kind == "prior"}
    names = [name for name in matched if name not in rows]
    return {name: matched[name] for name in names} | rows | {name + MATCHED: arm for name, arm in matched.items()}


def distinct(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report without rows that repeat another: a prior whose best guidance is 1 is the matched one."""
    rows: dict[str, Any] = {}
    for name, row in report["priors"].items():
        if all(row["metrics"] != other["metrics"] for other in rows.values()):
            rows[name] = row
    return {**report, "priors": rows}


def row_named(report: dict[str, Any], name: str) -> str:
    """Return the row of that name; of a prior at matched settings its own, where that has no guidance either."""
    rows, own = report["priors"], name.removesuffix(MATCHED)
    unguided = own in rows and rows[own]["sampling"].get("guidance") == 1
    return own if unguided and name not in rows else name


def entry(arm: Arm) -> dict[str, Any]:
    """Return one row of the tables."""
    first = next(iter(arm.values()))
    # Seconds of several runs: one that had to wait for other work on the machine moves their mean, and no median.
    costs = {name: statistics.median(cell[name] for cell in arm.values()) for name in COSTS}
    seconds = [cell["training_seconds"] for cell in arm.values()]
    return {
        **{name: first.get(name) for name in ("class", "reference", "lr", "sampling")},
        "attributes": _averaged([cell.get("attributes") for cell in arm.values()]),
        "seeds": sorted(arm),
        "metrics": {name: plain(value) for name, value in metrics(arm).items()},
        "training_seconds_range": [min(seconds), max(seconds)],
        **costs,
    }


def _averaged(seeds: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Return the mean over training seeds of each attribute's accuracy; None where no oracle read it."""
    known = [seed for seed in seeds if seed]
    return {name: statistics.fmean(seed[name] for seed in known) for name in known[0]} if known else None


def metrics(arm: Arm, *, change: bool = False) -> dict[str, Interval]:
    """Return every measure with its interval over training seeds and captions.

    Args:
        arm: an arm.
        change: the numbers are changes, so that shares may lie below 0.
    """
    first = next(iter(arm.values()))
    values = {name: whole(stacked(arm, "values", name)) for name in first["values"]}
    found = {name: crossed_interval(numbers) for name, numbers in values.items()}
    found |= {name: crossed_resamples(stacked(arm, "resamples", name)) for name in first["resamples"]}
    for name in found:
        if MEASURES[name].percent and not change:
            # What is measured once, beside all arms, does not say of how many captions.
            count = values[name].shape[1] if name in values else pictures_of(arm, name) if "counts" in first else 0
            found[name] = within_shares(found[name], count)
    return {name: found[name] for name in MEASURES if name in found}


def stacked(arm: Arm, kind: str, name: str) -> Tensor:
    """Return (K, …) numbers of a measure, a row for each training seed.

    Raises:
        InputError: the seeds were measured on different numbers of captions.
    """
    rows = [arm[seed][kind][name] for seed in sorted(arm)]
    if len({len(row) for row in rows}) > 1:
        counts = ", ".join(str(len(row)) for row in rows)
        raise InputError(f"Expected {name} of as many captions at every seed. Got {counts}: measure the cells again.")
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)


def whole(values: Tensor) -> Tensor:
    """Return the captions of which every seed has a number."""
    kept = values[:, ~values.isnan().any(0)]
    return kept if kept.shape[1] > 1 else values.new_full((len(values), 2), torch.nan)


def shared(a: Arm, b: Arm) -> tuple[Arm, Arm]:
    """Return both arms at the training seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return {seed: a[seed] for seed in seeds}, {seed: b[seed] for seed in seeds}


def paired(a: Arm, b: Arm, name: str) -> dict[str, float | None] | None:
    """Return the difference of two arms in a measure, and both means; None where they share no seed or number.

    It is paired by training seed and caption, and the means are over nothing but what is compared. Arms that were
    measured on different captions cannot be paired: None, too.
    """
    a, b = shared(a, b)
    for kind, interval in (("values", crossed_interval), ("resamples", crossed_resamples)):
        if a and all(name in next(iter(arm.values()))[kind] for arm in (a, b)):
            ours, theirs = stacked(a, kind, name), stacked(b, kind, name)
            if ours.shape != theirs.shape or captions_of(a, name) != captions_of(b, name) or not same_captions(a, b):
                return None
            both = torch.cat([ours, theirs])
            both = whole(both) if kind == "values" else both
            first, second = both[: len(a)], both[len(a) :]
            means = [(x if kind == "values" else x[:, 0]).mean().item() for x in (first, second)]
            sides = {side: mean if math.isfinite(mean) else None for side, mean in zip(SIDES, means, strict=True)}
            size = first.shape[1] if kind == "values" else captions_of(a, name)
            seeds = 1 if _one_network(a) and _one_network(b) else len(a)
            return plain(interval(first - second)) | sides | {"seeds": seeds, "captions": size}
    return None


def _one_network(arm: Arm) -> bool:
    """Return whether every seed has the same numbers, as of the study's CLIP: then an arm varies by caption alone."""
    first, *others = arm.values()
    return all(cell[kind] == first[kind] for cell in others for kind in ("values", "resamples"))


def same_captions(*arms: Arm) -> bool:
    """Return whether arms answered the same held-out captions, as far as their cells say which."""
    return len({cell["heldout"] for arm in arms for cell in arm.values() if cell.get("heldout")}) < 2


def captions_of(arm: Arm, name: str) -> int:
    """Return the number of captions behind a measure of an arm."""
    cell = next(iter(arm.values()))
    if name in cell["values"]:
        return len(cell["values"][name])
    if name in OF_ASKED:
        return min(ASKED, int(cell["counts"]["rows"]))
    return int(cell["counts"]["captions" if name.removesuffix(CORRECTED) in PICTURED else "rows"])


def pictures_of(arm: Arm, name: str) -> int:
    """Return the number of captions or pictures that a share is taken of, at the seed that has the fewest.

    What is swapped is asked of pictures with all parts; there are at least as many with both colours.
    """
    if name in SWAPPED:
        return min(round(sum(cell["values"]["parts_right"])) for cell in arm.values())
    return captions_of(arm, name)


def differences(groups: list[dict[str, Arm]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the paired differences of every two rows of a group: measure → "a - b" → interval and both means."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in DIFFERENCES:
        pairs = {f"{a} - {b}": paired(rows[a], rows[b], name) for rows in groups for a, b in combinations(rows, 2)}
        found[name] = {label: pair for label, pair in pairs.items() if pair}
    return found


def duels(rows: dict[str, Arm]) -> list[dict[str, Any]]:
    """Return the head to head of every two contenders, at their own settings and at matched ones.

    A contender sees the caption alone: the true embedding is none.
    """
    names = [name for name, arm in rows.items() if not next(iter(arm.values()))["reference"]]
    pairs = [(a, b) for a, b in combinations(names, 2) if a.endswith(MATCHED) == b.endswith(MATCHED)]
    found = [(a, b, duel(rows[a], rows[b])) for a, b in pairs]
    return [
        {"first": a.removesuffix(MATCHED), "second": b.removesuffix(MATCHED), "matched": a.endswith(MATCHED), **won}
        for a, b, won in found
        if won["win_rates"]
    ]


def duel(first: Arm, second: Arm) -> dict[str, Any]:
    """Return win rates on every per-caption measure that has a direction; a tie is half a win.

    What the two have measured on different captions is no duel.
    """
    first, second = shared(first, second)
    names = [
        name
        for name, ours in _values(first).items()
        if len(_values(second).get(name, ())) == len(ours) and MEASURES[name].better != "neither"
    ]
    names = names if same_captions(first, second) else []
    rates = {}
    for name in names:
        sign = 1 if MEASURES[name].better == "higher" else -1
        ours, theirs = sign * stacked(first, "values", name), sign * stacked(second, "values", name)
        there = ~(ours + theirs).isnan().any(0)
        ours, theirs = ours[:, there], theirs[:, there]
        theirs = torch.where((ours - theirs).abs() <= TIE * torch.maximum(ours.abs(), theirs.abs()), ours, theirs)
        if ours.shape[1] > 1:
            wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
            intervals = crossed_interval(wins), mean_interval(wins)
            inside, normal = (plain(within_shares(interval, wins.shape[1])) for interval in intervals)
            rates[name] = inside | {"normal": normal, "captions": wins.shape[1], **sign_test(ours, theirs)._asdict()}
    return {"seeds": len(first), "win_rates": rates}


def _values(arm: Arm) -> dict[str, Any]:
    return next(iter(arm.values()))["values"] if arm else {}


def curves(arms: dict[Key, Arm]) -> dict[str, Any]:
    """Return title → series → measure → [{x, mean, low, high}], x ascending."""
    found: dict[str, Any] = {}
    for key in sorted((key for key in arms if key.x is not None), key=lambda key: key.x or 0.0):
        points = found.setdefault(key.title, {}).setdefault(key.name, {})
        for measure, interval in metrics(arms[key]).items():
            points.setdefault(measure, []).append({"x": key.x, **plain(interval)})
    return found


def ablations(arms: dict[Key, Arm], named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return two arms and their paired difference for every ablation that was measured.

    Args:
        arms: all arms.
        named: ablations as the table of claims lists them. Cells of kind ``ablation`` with another title are compared
            side by side in the order in which they come.
    """
    pairs = list(_named_pairs(arms, [line for line in named if "from" not in line]))
    known = {key.title for *_, first, second in pairs for key in (first, second)}
    trained = [key for key in arms if key.kind == "ablation" and key.title not in known]
    pairs += [(a.title, a.name, b.name, a, b) for a, b in combinations(trained, 2) if a.title == b.title]
    found = [ablation(title, ours, theirs, arms[a], arms[b]) for title, ours, theirs, a, b in pairs]
    found += _of_changes(arms, [line for line in named if "from" in line])
    told = {line["title"]: line["measures"] for line in named if "measures" in line}
    for line in found:
        wanted = told.get(line["title"], line["measures"])
        line["measures"] = {name: value for name, value in line["measures"].items() if name in wanted}
    return found


def _of_changes(arms: dict[Key, Arm], named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ablations of how far either side of a curve moves from where ``from`` says."""
    found = []
    for line in named:
        for title, ours, theirs, a, b in _named_pairs(arms, [line]):
            starts = [key._replace(x=float(line["from"])) for key in (a, b)]
            if all(start in arms for start in starts):
                changes = [change(arms[key], arms[start]) for key, start in zip((a, b), starts, strict=True)]
                found.append(ablation(title, ours, theirs, *changes, changes=True))
    return found


def change(arm: Arm, start: Arm) -> Arm:
    """Return an arm less another one, number by number, at the training seeds that both have."""
    arm, start = shared(arm, start)

    def less(seed: int, kind: str) -> dict[str, Any]:
        ours, theirs = arm[seed][kind], start[seed][kind]
        return {
            name: [None if None in pair else pair[0] - pair[1] for pair in zip(values, theirs[name], strict=True)]
            for name, values in ours.items()
            if len(theirs.get(name, ())) == len(values)
        }

    return {seed: cell | {kind: less(seed, kind) for kind in ("values", "resamples")} for seed, cell in arm.items()}


def _named_pairs(arms: dict[Key, Arm], named: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, Key, Key]]:
    for line in named:
        if "at" in line:
            continue  # see report.frontier
        sides = line["paper"], line["other"]
        if "curve" in line:  # both sides are points of one curve: series and x
            first, second = (Key("curve", line["curve"], side[0], float(side[1])) for side in sides)
            by = "x" if first.name == second.name else "name"
            ours, theirs = (f"{x:g}" if isinstance(x := getattr(key, by), float) else x for key in (first, second))
        else:
            ours, theirs = sides
            first, second = (Key("ablation", line.get("ablation", line["title"]), side) for side in sides)
        if first in arms and second in arms:
            yield line["title"], ours, theirs, first, second


def ablation(title: str, ours: str, theirs: str, a: Arm, b: Arm, *, changes: bool = False) -> dict[str, Any]:
    """Return both arms and their paired difference for every measure that they share.

    Of arms on different bases only measures of what a sample shows are compared: distances and cosines in the spaces
    of two CLIPs have different units.
    """
    a, b = shared(a, b)
    first, second = (metrics(arm, change=changes) if arm else {} for arm in (a, b))
    one_space = {cell["base"] for cell in a.values()} == {cell["base"] for cell in b.values()}
    names = [name for name in first if name in second and (one_space or MEASURES[name].any_space)]
    measures = {
        name: {"paper": plain(first[name]), "other": plain(second[name]), "difference": pair}
        for name in names
        if (pair := paired(a, b, name))
    }
    sides = {"title": title, "paper": ours, "other": theirs}
    return {**sides, "seeds": sorted(a), "one_space": one_space, "measures": measures}


def spaces(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many directions each CLIP's embeddings use: the study's own, and those of ablations of the CLIP."""
    own = [cell for cell in cells if cell["kind"] != "ablation"] or cells
    most = max(own, key=lambda cell: cell["counts"]["rows"])  # the more embeddings, the better known
    others = [cell for cell in cells if cell["base"] != most["base"]]
    found = {"the study's CLIP": most["space"]} | {cell["series"]: cell["space"] for cell in others}
    return {name: space for name, space in found.items() if space}


def foundations(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the comparison stands on: ``oracle``, ``decoder``, ``clip``, ``judge`` and ``codec``."""
    found = next((cell["foundations"] for cell in cells if cell.get("foundations")), None)
    if found is None:
        return dict.fromkeys(("oracle", "decoder", "clip", "judge", "codec"))
    scores = {
        name: {measure: plain(v) for measure, v in metrics({0: arm}).items()} for name, arm in found["arms"].items()
    }
    oracle = {"real": found["oracle"], "residual": scores["real"]["residual"]} if found["oracle"] else None
    decoder = {"reconstruction": found["reconstruction"], **scores["reconstruction"]}
    return {"oracle": oracle, "decoder": decoder, **{name: found[name] for name in ("clip", "judge", "codec")}}


def meta(study: Study, report: dict[str, Any]) -> dict[str, Any]:
    """Return where the numbers come from."""
    cells = study.cells
    # Of the tables' rows; curves are measured on fewer captions.
    drawn = max(cells, key=lambda cell: (cell["counts"]["captions"], cell["counts"]["many"], cell["counts"]["rows"]))
    trained = {name: row for name, row in report["priors"].items() if row["training_steps"]}
    seeds = [len(row["seeds"]) for name, row in trained.items() if not name.endswith(MATCHED)]
    seeds = seeds or [len(arm) for key, arm in study.arms.items() if key.kind in ("table", "curve")]
    hashes = {name: next(iter(arm.values()))["config_hash"] for name, arm in rows_of(study.arms).items()}
    return {
        "training_seeds": min(seeds, default=1),
        "cells": len(cells),
        "base": drawn["base"],
        "counts": drawn["counts"],
        "commits": sorted({cell["meta"]["commit"] for cell in cells}),
        "hardware": sorted({cell["meta"]["hardware"] for cell in cells}),
        "versions": drawn["meta"]["versions"],
        "config_hashes": {name: value for name, value in hashes.items() if value},
        "config": drawn["settings"] | {"priors": {name: row["sampling"] for name, row in report["priors"].items()}},
        "measuring_seconds": sum(cell["meta"].get("seconds", 0.0) for cell in cells),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is broken ({error}): delete it and run the study again, it measures this alone."
        ) from None


def read_cell(path: Path) -> dict[str, Any]:
    """Return the content of a cell.

    Raises:
        InputError: the file is broken, or of another format.
    """
    cell = _read(path)
    if not isinstance(cell, dict) or cell.get("format") != FORMAT:
        got = cell.get("format") if isinstance(cell, dict) else type(cell).__name__
        raise InputError(
            f"Expected a cell of format {FORMAT} in {path}. Got {got}: measure it again with this version."
        )
    for arm in cell["arms"].values():
        for name in BIASED:
            if name in arm["resamples"]:  # None is what JSON has for NaN, the distance of a prior that diverged
                distances = torch.tensor([torch.nan if x is None else x for x in arm["resamples"][name]])
                arm["resamples"][f"{name}{CORRECTED}"] = without_bias(distances).tolist()
    return cell
