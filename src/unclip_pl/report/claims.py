"""Set each claim of a table beside what a study measured.

The claims are data: ``paper.yaml`` beside this file, or a study's own ``claims.yaml``. A verdict comes from a 95 %
interval over training seeds and captions. A claim holds, or does not hold, where the interval leaves the balance point
out; else it cannot be told at this scale.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from unclip_pl.errors import InputError
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.settings import read_yaml

HOLDS, FAILS, OPEN, UNMEASURED = "holds", "does not hold", "cannot be told", "not measured"
#: A study's own table of claims, in its folder.
OWN = "claims.yaml"

Report = dict[str, Any]


class Finding(NamedTuple):
    """What a rule says of a claim."""

    verdict: str
    ours: str = ""  # the numbers, in words


def claims_table(folder: Path) -> dict[str, Any]:
    """Read the table of claims: a study's own, or else the paper's.

    Args:
        folder: folder of the study.

    Raises:
        InputError: a claim names a test that there is not.
    """
    own = folder / OWN
    path = own if own.is_file() else Path(__file__).with_name("paper.yaml")
    table = {"order": [], "ablations": [], "claims": []} | read_yaml(path)
    for row in table["claims"]:
        if row.get("test") not in TESTS:
            raise InputError(f"Expected a test of {', '.join(TESTS)} in {path}. Got {row.get('test')!r}: correct it.")
    return table


def judge(report: Report, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return every claim with what was found.

    Args:
        report: all numbers, see :func:`unclip_pl.report.study.study_report`.
        rows: the table's claims.
    """
    told = ("claim", "source", "paper", "why")
    return [{name: row[name] for name in told} | TESTS[row["test"]](report, row)._asdict() for row in rows]


def verdict(interval: dict[str, Any] | None, *, above: bool, balance: float = 0.0) -> str:
    """Return whether the interval lies wholly on the claimed side of the balance point."""
    if not interval or interval.get("low") is None:
        return UNMEASURED if not interval or interval.get("mean") is None else OPEN
    if interval["low"] > balance:
        return HOLDS if above else FAILS
    if interval["high"] < balance:
        return FAILS if above else HOLDS
    return OPEN


def difference(report: Report, measure: str, first: str, second: str) -> dict[str, Any] | None:
    """Return the paired difference of two rows, first less second; None where it was not measured."""
    pairs = report["differences"].get(measure, {})
    if f"{first} - {second}" in pairs:
        found = pairs[f"{first} - {second}"]
    elif f"{second} - {first}" in pairs:
        turned = pairs[f"{second} - {first}"]
        ends = {end: None if turned[other] is None else -turned[other] for end, other in TURNED.items()}
        found = {**ends, "first": turned["second"], "second": turned["first"]}
    else:
        return None
    return found if found["mean"] is not None else None


TURNED = {"mean": "mean", "low": "high", "high": "low"}


def _duel(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by win rates head to head: the first measure that there is decides, others are shown."""
    found = {duel["matched"]: duel for duel in report["duels"] if (duel["first"], duel["second"]) == _names(row)}
    best, matched = found.get(False), found.get(True)
    names = [name for name in row["measures"] if best and name in best["win_rates"]]
    if best is None or not names:
        return Finding(UNMEASURED)
    told = []
    for name in names:
        rate = best["win_rates"][name]
        ours = f"{MEASURES[name].label}: {row['first']} wins {_percent(rate)} of the captions"
        ours += f" (sign test p = {rate['p']:.2g})"
        told.append(f"{ours}; {_percent(matched['win_rates'][name])} matched" if matched else ours)
    return Finding(verdict(best["win_rates"][names[0]], above=True, balance=0.5), ". ".join(told))


def _difference(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by the paired difference of two rows; further ones are shown."""
    found = difference(report, row["measure"], *_names(row))
    if found is None:
        return Finding(UNMEASURED)
    lines = [row, *({**{"first": row["first"], "second": row["second"]}, **also} for also in row.get("also", []))]
    told = [text for line in lines if (text := _told(report, line["measure"], *_names(line)))]
    higher = {"higher": True, "lower": False}.get(row.get("claimed", ""), MEASURES[row["measure"]].better == "higher")
    return Finding(verdict(found, above=higher), ". ".join(told))


def _ablation(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by the paired difference of an ablation, or of all of several, on the first measure that there is."""
    lines = {line["title"]: line for line in report["ablations"]}
    there = [lines[title] for title in row["titles"] if title in lines]
    name = next((name for name in row["measures"] if any(name in line["measures"] for line in there)), None)
    decisive = [line for line in there if name in line["measures"]]
    if name is None or not decisive:
        return Finding(UNMEASURED)
    above = MEASURES[name].better == "higher"
    found = {verdict(line["measures"][name]["difference"], above=above) for line in decisive}
    shown = decisive + [
        lines[title] for title in row.get("also", []) if name in lines.get(title, {}).get("measures", {})
    ]
    told = [_of_ablation(line, name, titled=len(shown) > 1) for line in shown]
    decided = HOLDS if found == {HOLDS} else FAILS if FAILS in found else OPEN
    return Finding(decided, f"{MEASURES[name].label}: " + "; ".join(told))


def _of_ablation(line: dict[str, Any], name: str, *, titled: bool) -> str:
    values, show = line["measures"][name], MEASURES[name].show
    sides = ", ".join(f"{line[side]} {show(values[side]['mean'])}" for side in ("paper", "other"))
    told = f"{sides}, difference {_signed(name, values['difference'])} over {len(line['seeds'])} training seeds"
    return f"{line['title']}, {told}" if titled else told


def _compute(report: Report, row: dict[str, Any]) -> Finding:
    """Judge at equally many samples: less arithmetic, nothing clearly worse and something clearly better."""
    ours, theirs = (report["priors"].get(name) for name in _names(row))
    if not ours or not theirs or not theirs["training_flops"]:
        return Finding(UNMEASURED)
    pairs = {name: pair for name in row["measures"] if (pair := difference(report, name, *_names(row)))}
    found = {verdict(pair, above=MEASURES[name].better == "higher") for name, pair in pairs.items()}
    ratio = ours["training_flops"] / theirs["training_flops"]
    sides = ours, theirs
    samples, teraflops, seconds, megaflops = (
        " against ".join(f"{side[cost] / unit:,.{digits}f}" for side in sides)
        for cost, unit, digits in (
            ("training_samples", 1, 0), ("training_flops", 1e12, 1), ("training_seconds", 1, 0),
            ("flops_per_embedding", 1e6, 0),
        )
    )  # fmt: skip
    text = (
        f"{samples} samples cost {teraflops} TFLOP ({ratio:.2f}×), {seconds} s. "
        + ", ".join(f"{MEASURES[name].label} {_signed(name, pair)}" for name, pair in pairs.items())
        + f". A sample costs {megaflops} MFLOP"
    )
    better, worse = HOLDS in found, FAILS in found
    one_way = better != worse and better == (ratio < 1)  # cheaper and better, or dearer and worse
    return Finding((HOLDS if better else FAILS) if one_way else OPEN, text)


def _axes(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by the spectrum alone: without an interval only a clear answer counts."""
    space = report["spaces"].get(row["space"])
    if not space:
        return Finding(UNMEASURED)
    share = space["axes_for_99"] / space["embed_dim"]
    ours = f"{space['axes_for_99']} of {space['embed_dim']} axes ({share:.0%})"
    ours += f"; effective rank {space['effective_rank']:.1f}"
    return Finding(HOLDS if share <= row["at_most"] else FAILS if share >= row["fails_from"] else OPEN, ours)


def _rank(report: Report, row: dict[str, Any]) -> Finding:
    """Show one space on either side: without an interval there is no verdict."""
    found = {name: report["spaces"].get(name) for name in row["spaces"]}
    if not all(found.values()):
        return Finding(UNMEASURED)
    told = [
        f"{name}: effective rank {space['effective_rank']:.1f}, {space['axes_for_99']} axes for 99 %"
        for name, space in found.items()
        if space
    ]
    return Finding(OPEN, "; ".join(told))


TESTS: dict[str, Callable[[Report, dict[str, Any]], Finding]] = {
    "duel": _duel, "difference": _difference, "ablation": _ablation, "compute": _compute, "axes": _axes, "rank": _rank,
}  # fmt: skip


def _names(row: dict[str, Any]) -> tuple[str, str]:
    return row["first"], row["second"]


def _told(report: Report, measure: str, first: str, second: str) -> str:
    """Return both means, at the training seeds that both rows have, and their difference."""
    pair = difference(report, measure, first, second)
    if pair is None:
        return ""
    show, names = MEASURES[measure].show, (first.rpartition(": ")[2], second.rpartition(": ")[2])
    sides = ", ".join(f"{name} {show(pair[side])}" for name, side in zip(names, ("first", "second"), strict=True))
    return f"{MEASURES[measure].label}: {sides}, difference {_signed(measure, pair)}"


def _percent(interval: dict[str, Any]) -> str:
    return f"{100 * interval['mean']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _signed(name: str, interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return "unknown"
    low, mean, high = (MEASURES[name].signed(interval[end]) for end in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"
