"""Set each claim of a table beside what a study measured.

The claims are data: ``paper.yaml`` beside this file, or a study's own ``claims.yaml``. One rule decides all of them, on
a 95 % interval over training seeds and captions; ``docs/comparison.md`` states it. Where the whole interval lies within
±δ, there is no difference. Else a claim holds, or does not hold, where the interval leaves 0 out. Else it is open, and
the verdict says what would close it. The first measure that the data can have decides; where another one says the
opposite, they disagree. A measure of the judge that ranks the mean of all answers above the truth decides nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from unclip_pl.errors import InputError
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.generation.provenance import CLAIMS
from unclip_pl.report.frontier import PERFECT
from unclip_pl.report.study import row_named
from unclip_pl.settings import read_yaml

HOLDS, FAILS, EQUAL, DISAGREE = "holds", "does not hold", "no difference", "measures disagree"
OPEN, UNTOLD, UNMEASURED = "open", "cannot be told", "not measured"
#: Largest difference of a win rate from a half that makes none.
WIN_DELTA = 0.03
#: Rows between which a distance's δ is a tenth of the way: the perfect prior, or else the true embedding, and z_t.
TRUE, TEXT = "ceiling", "text"
#: The row that answers with the mean.
MEAN = "linear"
Report = dict[str, Any]


class Finding(NamedTuple):
    """What a rule says of a claim."""

    verdict: str
    ours: str = ""  # the numbers, in words: a line for each measure


class Answer(NamedTuple):
    """What one measure says of a claim."""

    verdict: str  # empty where the measure may not decide
    told: str  # its numbers, in words
    remark: str = ""  # what would close it, or why it is no difference


def claims_table(folder: Path) -> dict[str, Any]:
    """Read the table of claims: a study's own, or else the paper's.

    Args:
        folder: folder of the study.

    Raises:
        InputError: a claim names a test that there is not.
    """
    own = folder / CLAIMS
    path = own if own.is_file() else Path(__file__).with_name("paper.yaml")
    table: dict[str, Any] = {"order": [], "beside": [], "words": {}, "ablations": [], "baselines": [], "claims": []}
    table["gate"] = None
    table |= read_yaml(path)
    for row in table["claims"]:
        if row.get("test") not in TESTS:
            raise InputError(f"Expected a test of {', '.join(TESTS)} in {path}. Got {row.get('test')!r}: correct it.")
    return table


def judge(report: Report, rows: list[dict[str, Any]], gate: dict[str, Any] | None = None) -> list[dict[str, str]]:
    """Return every claim with what was found.

    Args:
        report: all numbers, see :func:`unclip_pl.report.study.study_report`.
        rows: the table's claims.
        gate: what a line of a curve or a row of a table has to reach before any claim is decided; None asks nothing.
    """
    told, shut = ("claim", "source", "paper", "why"), _shut(report, gate)
    found = [TESTS[row["test"]](report, row) for row in rows]
    if shut:
        found = [one if one.verdict == UNMEASURED else Finding(UNTOLD, f"{one.ours}\n{shut}") for one in found]
    return [{name: row[name] for name in told} | one._asdict() for row, one in zip(rows, found, strict=True)]


def _shut(report: Report, gate: dict[str, Any] | None) -> str:
    """Return why no claim can be told; empty where the gate's line reaches what it has to."""
    if gate is None:
        return ""
    name, line, least = gate["measure"], gate["line"], "at_least" in gate
    if "table" in gate:
        row = report["tables"].get(gate["table"], {}).get(line, {"metrics": {}})
        points = [row["metrics"].get(name, {"mean": None})]
    else:
        points = report["curves"].get(gate["curve"], {}).get(line, {}).get(name, [])
    means = [point["mean"] for point in points if point["mean"] is not None]
    best, bound = (max if least else min)(means, default=None), gate["at_least" if least else "at_most"]
    if best is not None and (best >= bound if least else best <= bound):
        return ""
    measure = MEASURES[name]
    unit = " %" if measure.percent else ""
    reached = "not measured" if best is None else f"{measure.show(best)}{unit} at best"
    needed = f"{measure.show(bound)}{unit}{'' if least else ' or less'}"
    return f"{measure.label} of {line}: {reached}, {needed} needed; {gate['else']}"


def verdict(interval: dict[str, Any] | None, *, above: bool, balance: float = 0.0, delta: float | None = None) -> str:
    """Return what an interval says of a claim.

    Args:
        interval: mean and ends; None where nothing was measured.
        above: whether the claim says that the truth lies above the balance point.
        balance: value at which there is no difference.
        delta: largest difference that counts as none; None where the measure has no such limit.
    """
    if not interval or interval.get("low") is None:
        return UNMEASURED if not interval or interval.get("mean") is None else OPEN
    low, high = interval["low"] - balance, interval["high"] - balance
    if delta is not None and -delta <= low and high <= delta:
        return EQUAL
    if low > 0:
        return HOLDS if above else FAILS
    if high < 0:
        return FAILS if above else HOLDS
    return OPEN


def together(verdicts: list[str]) -> str:
    """Return the verdict of several measures: the first one's, unless another one says the opposite."""
    first = verdicts[0] if verdicts else UNMEASURED
    return DISAGREE if first in (HOLDS, FAILS) and {HOLDS, FAILS} <= set(verdicts) else first


def delta_of(report: Report, name: str) -> float | None:
    """Return the largest difference of a measure that makes none; None where that is not known.

    Of a distance it is a tenth of the way from the perfect prior's to that of z_t; without a perfect prior, from that
    of the true embedding.
    """
    measure = MEASURES[name]
    if not measure.distance:
        return measure.delta
    near, true, far = (_mean_of(report, row, name) for row in (PERFECT, TRUE, TEXT))
    near = true if near is None else near
    return None if near is None or far is None else abs(far - near) / 10


def _mean_of(report: Report, row: str, name: str) -> float | None:
    """Return a measure of a row of the main table; None where it was not measured."""
    found = report["priors"].get(row, {"metrics": {}})["metrics"].get(name)
    return found["mean"] if found else None


def measures_of(report: Report, row: dict[str, Any]) -> list[str]:
    """Return a claim's measures that its data can have: all, or without an oracle those that ask none."""
    rows = [*report["priors"].values(), *(entry for table in report["tables"].values() for entry in table.values())]
    there = {name for entry in rows for name in entry["metrics"]}
    there |= {name for lines in report["curves"].values() for points in lines.values() for name in points}
    known = any(MEASURES[name].oracle for name in there)
    return [name for name in row["measures"] if known or not MEASURES[name].oracle]


def _answer(
    report: Report,
    name: str,
    interval: dict[str, Any],
    told: str,
    *,
    above: bool,
    balance: float = 0.0,
    delta: float | None = None,
) -> Answer:
    """Return what a measure's interval says, unless it is one that rewards the mean."""
    if _rewards_the_mean(report, name):
        why = f"it ranks {MEAN}, which answers with the mean, above the truth, and so decides nothing"
        return Answer("", f"{told}; {why}")
    found = verdict(interval, above=above, balance=balance, delta=delta)
    return Answer(found, told, _remark(found, interval, delta, balance=balance))


def _of_pair(report: Report, row: dict[str, Any], name: str, pair: dict[str, Any], told: str) -> Answer:
    """Return what a measure's paired difference says of a claim."""
    return _answer(report, name, pair, told, above=_above(row, name), delta=delta_of(report, name))


def _rewards_the_mean(report: Report, name: str) -> bool:
    """Return whether a measure of the judge ranks a prior that answers with the mean above the true embedding."""
    mean, true = (_mean_of(report, row, name) for row in (MEAN, TRUE))
    if not MEASURES[name].judge or mean is None or true is None:
        return False
    return mean < true if MEASURES[name].better == "lower" else mean > true


def _decided(answers: list[Answer], *notes: str) -> Finding:
    """Return what a claim's measures say together; it cannot be told where none of them may decide.

    What would close an open answer is said of the measure that decides.
    """
    deciding = next((answer for answer in answers if answer.verdict), None)
    told = [
        answer.told + (answer.remark if answer is deciding or answer.verdict == EQUAL else "") for answer in answers
    ]
    verdicts = [answer.verdict for answer in answers if answer.verdict]
    return Finding(together(verdicts) if verdicts else UNTOLD, "\n".join(filter(None, [*told, *notes])))


def cost_of(interval: dict[str, Any], delta: float | None) -> str:
    """Return what would bring the half-width of an open interval down to δ; empty where that is unknown.

    That is the least: an interval as wide as δ lies within it only around a difference of 0.
    """
    if delta is None or interval.get("low") is None:
        return ""
    half = (interval["high"] - interval["low"]) / 2
    if half <= delta:
        return "open although the half-width is within δ: more seeds and captions move the ends"
    width = half / delta
    more = f"{width**2:.0f}" if width**2 >= 1.95 else f"{width**2:.1f}"
    return f"open: the half-width is {width:.1f} δ, so it takes at least {more} times the seeds and captions"


def varied(pair: dict[str, Any]) -> str:
    """Return what a paired interval is over."""
    if not pair.get("seeds"):
        return ""
    seeds = f"{pair['seeds']} seeds and " if pair["seeds"] > 1 else ""
    return f"varied: {seeds}{pair['captions']:,} captions"


def difference(report: Report, measure: str, first: str, second: str) -> dict[str, Any] | None:
    """Return the paired difference of two rows, first less second; None where it was not measured."""
    pairs = report["differences"].get(measure, {})
    if f"{first} - {second}" in pairs:
        found = pairs[f"{first} - {second}"]
    elif f"{second} - {first}" in pairs:
        found = _turned(pairs[f"{second} - {first}"])
    else:
        return None
    return found if found["mean"] is not None else None


def _turned(pair: dict[str, Any], total: float = 0.0) -> dict[str, Any]:
    """Return a paired interval from the other side: the two sides' numbers add up to ``total``."""
    ends = {end: None if pair[other] is None else total - pair[other] for end, other in TURNED.items()}
    return {**pair, **ends, **({"first": pair["second"], "second": pair["first"]} if "first" in pair else {})}


TURNED = {"mean": "mean", "low": "high", "high": "low"}


def _found(pairs: list[dict[str, Any]], row: dict[str, Any], inside: str, total: float = 0.0) -> list[dict[str, Any]]:
    """Return those pairs that are a claim's, with its first side first.

    Args:
        pairs: pairs of contenders.
        row: a claim.
        inside: where a pair has its intervals.
        total: what the two sides' numbers add up to.
    """
    found = [pair for pair in pairs if {pair["first"], pair["second"]} == set(_names(row))]
    return [
        pair
        if pair["first"] == row["first"]
        else pair | {inside: {name: _turned(interval, total) for name, interval in pair[inside].items()}}
        for pair in found
    ]


def _duel(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by win rates head to head; the further measures may object."""
    found = {duel["matched"]: duel for duel in _found(report["duels"], row, "win_rates", total=1.0)}
    best, matched = found.get(False), found.get(True)
    names = measures_of(report, row)
    if best is not None and not names and "untold" in row:
        return Finding(UNTOLD, row["untold"])
    if best is None or not names or names[0] not in best["win_rates"]:
        return Finding(UNMEASURED)
    answers = []
    for name in (name for name in names if name in best["win_rates"]):
        rate = best["win_rates"][name]
        ours = f"{MEASURES[name].label}: {row['first']} wins {_percent(rate)} of the captions"
        ours += f" (sign test p = {rate['p']:.2g})"
        ours += f"; {_percent(matched['win_rates'][name])} matched" if matched else ""
        answers.append(_answer(report, name, rate, ours, above=True, balance=0.5, delta=WIN_DELTA))
    captions = best["win_rates"][names[0]].get("captions", 0)
    return _decided(answers, varied({"seeds": best["seeds"], "captions": captions}))


def _difference(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by the paired difference of two rows; further measures may object, and further rows are shown."""
    names = measures_of(report, row)
    pairs = {name: pair for name in names if (pair := difference(report, name, *_names(row)))}
    if not names or names[0] not in pairs:
        return Finding(UNMEASURED)
    answers = [_of_pair(report, row, name, pair, _told(report, name, *_names(row))) for name, pair in pairs.items()]
    beside = [
        _told(report, also["measure"], also.get("first", row["first"]), also.get("second", row["second"]))
        for also in row.get("also", [])
    ]
    return _decided(answers, *beside, varied(pairs[names[0]]))


def _above(row: dict[str, Any], name: str) -> bool:
    """Return whether a claim is that the first side has the larger number."""
    return {"higher": True, "lower": False}.get(row.get("claimed", ""), MEASURES[name].better == "higher")


def _remark(found: str, interval: dict[str, Any], delta: float | None, *, balance: float = 0.0) -> str:
    """Return what would close an open verdict, or that a difference within δ is one all the same."""
    if found == EQUAL and not interval["low"] <= balance <= interval["high"]:
        return f"; clear of {100 * balance:.0f} %, and within δ" if balance else "; clear of 0, and within δ"
    told = cost_of(interval, delta) if found == OPEN else ""
    return f"; {told}" if told else ""


def _ablation(report: Report, row: dict[str, Any]) -> Finding:
    """Judge by the paired difference of an ablation, or of all of several; further measures may object."""
    lines = {line["title"]: line for line in report["ablations"]}
    if told := [report["never_equal"][title] for title in row["titles"] if title in report.get("never_equal", {})]:
        return Finding(UNTOLD, "\n".join(told))
    if any(title not in lines for title in row["titles"]):
        return Finding(UNMEASURED)
    decisive, also = ([lines[title] for title in row.get(key, []) if title in lines] for key in ("titles", "also"))
    names = measures_of(report, row)
    there = [name for name in names if all(name in line["measures"] for line in decisive)]
    if not names or names[0] not in there:
        return Finding(UNMEASURED)
    if "obeyed" in row and _ignored(report, row["obeyed"]):
        return Finding(UNTOLD, f"{row['obeyed']} does not follow its dot-product token, so no share of it differs")
    answers = [_of_ablations(report, row, name, decisive, also) for name in there]
    return _decided(answers, varied(decisive[0]["measures"][names[0]]["difference"]))


def _of_ablations(
    report: Report, row: dict[str, Any], name: str, decisive: list[dict[str, Any]], also: list[dict[str, Any]]
) -> Answer:
    """Return what a measure says of ablations: of several the answer that is furthest from the claim."""
    above, delta = _above(row, name), delta_of(report, name)
    intervals = [line["measures"][name]["difference"] for line in decisive]
    found = [verdict(interval, above=above, delta=delta) for interval in intervals]
    order = [FAILS, UNMEASURED, OPEN, EQUAL, HOLDS]
    places = sorted(range(len(found)), key=lambda i: (order.index(found[i]), -_width(intervals[i])))
    shown = decisive + [line for line in also if name in line["measures"]]
    told = f"{MEASURES[name].label}: " + "; ".join(_of_ablation(line, name, titled=len(shown) > 1) for line in shown)
    return _of_pair(report, row, name, intervals[places[0]], told)


def _ignored(report: Report, prior: str) -> bool:
    """Return whether a prior was not seen to follow its dot-product token."""
    obedience = report["priors"].get(prior, {"metrics": {}})["metrics"].get("dot_obedience") or {}
    return obedience.get("low") is not None and obedience["low"] <= 0


def _width(interval: dict[str, Any]) -> float:
    return 0.0 if interval["low"] is None else interval["high"] - interval["low"]


def _of_ablation(line: dict[str, Any], name: str, *, titled: bool) -> str:
    values, show = line["measures"][name], MEASURES[name].show
    sides = ", ".join(f"{line[side]} {show(values[side]['mean'])}" for side in ("paper", "other"))
    told = f"{sides}, difference {_signed(name, values['difference'])} over {len(line['seeds'])} training seeds"
    return f"{line['title']}, {told}" if titled else told


def _compute(report: Report, row: dict[str, Any]) -> Finding:
    """Judge at equally many samples: less arithmetic, nothing clearly worse and something clearly better."""
    first, second = (row_named(report, name) for name in _names(row))
    ours, theirs = (report["priors"].get(name) for name in (first, second))
    if not ours or not theirs or not theirs["training_flops"]:
        return Finding(UNMEASURED)
    pairs = {name: pair for name in row["measures"] if (pair := difference(report, name, first, second))}
    if not pairs:
        return Finding(UNMEASURED)
    answers = [
        _of_pair(report, row, name, pair, f"{MEASURES[name].label} {_signed(name, pair)}")
        for name, pair in pairs.items()
    ]
    found = {answer.verdict for answer in answers if answer.verdict}
    ratio = ours["training_flops"] / theirs["training_flops"]
    sides = ours, theirs
    samples, teraflops, seconds, megaflops = (
        " against ".join(f"{side[cost] / unit:,.{digits}f}" for side in sides)
        for cost, unit, digits in (
            ("training_samples", 1, 0), ("training_flops", 1e12, 1), ("training_seconds", 1, 0),
            ("flops_per_embedding", 1e6, 0),
        )
    )  # fmt: skip
    told = [f"{samples} samples cost {teraflops} TFLOP ({ratio:.2f}×), {seconds} s; a sample costs {megaflops} MFLOP"]
    told += [*(answer.told for answer in answers), varied(next(iter(pairs.values())))]
    better, worse = HOLDS in found, FAILS in found
    if not found:
        return Finding(UNTOLD, "\n".join(told))
    if better and worse:
        return Finding(DISAGREE, "\n".join(told))
    if (ratio < 1 and worse) or (ratio > 1 and better):
        told.append(
            f"{'less' if ratio < 1 else 'more'} compute and {'worse' if worse else 'better'}: one budget cannot tell"
        )
        return Finding(UNTOLD, "\n".join(told))
    decided = better or worse or found == {EQUAL}
    return Finding((HOLDS if ratio < 1 else FAILS) if decided else OPEN, "\n".join(told))


def _frontier(report: Report, row: dict[str, Any]) -> Finding:
    """Judge where two contenders are as concentrated; further measures may object."""
    found = _found(report.get("frontier", {}).get("differences", []), row, "measures")
    names = measures_of(report, row)
    if not found or not names or names[0] not in found[0]["measures"]:
        return Finding(UNMEASURED)
    answers = []
    for name in (name for name in names if name in found[0]["measures"]):
        pair = found[0]["measures"][name]
        sides = ", ".join(f"{row[side]} {MEASURES[name].show(pair[side])}" for side in ("first", "second"))
        told = f"{MEASURES[name].label}: {sides}, difference {_signed(name, pair)}"
        answers.append(_of_pair(report, row, name, pair, told))
    decided = _decided(answers, varied(found[0]["measures"][names[0]]))
    return decided._replace(ours=f"At a gap of the cosines of {found[0]['at']:+.3f}\n{decided.ours}")


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
    return Finding(UNTOLD, "; ".join(told))


TESTS: dict[str, Callable[[Report, dict[str, Any]], Finding]] = {
    "duel": _duel, "difference": _difference, "ablation": _ablation, "compute": _compute,
    "frontier": _frontier, "axes": _axes, "rank": _rank,
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
