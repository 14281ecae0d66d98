"""The report's tables and sentences, before anybody decides between Markdown and HTML."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from unclip_pl.evaluation.measures import GROUPS, MEASURES, Measure


class Cell(NamedTuple):
    """A number, or words."""

    text: str
    interval: str = ""
    best: bool = False
    tone: str = ""  # a verdict's, for its colour


class Table(NamedTuple):
    """Rows of cells under a heading; ``notes`` explain the columns."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    notes: list[tuple[str, str]] = []


def metric_tables(report: dict[str, Any]) -> list[Table]:
    """One table for each group of measures that was measured: priors × measures."""
    priors = report["priors"]
    tables: list[Table] = []
    for group in GROUPS:
        names = [
            name
            for name, measure in MEASURES.items()
            if measure.group == group and any(name in prior["metrics"] for prior in priors.values())
        ]
        best = {name: _best(name, priors) for name in names}
        rows = [
            [
                Cell(prior),
                *(metric_cell(MEASURES[name], entry["metrics"].get(name), prior in best[name]) for name in names),
            ]
            for prior, entry in priors.items()
        ]
        notes = [(MEASURES[name].label, MEASURES[name].what) for name in names]
        if any(best.values()) and not tables:
            notes.append(
                ("bold", "of the priors that see the caption alone, those whose interval reaches the best mean")
            )
        if names:
            tables.append(Table(group, ["prior", *(MEASURES[name].heading for name in names)], rows, notes))
    return tables


def _best(name: str, priors: dict[str, Any]) -> set[str]:
    """Priors that see the caption alone and whose interval reaches the best mean."""
    sign = {"higher": 1, "lower": -1, "neither": 0}[MEASURES[name].better]
    rivals = {
        prior: entry["metrics"][name]
        for prior, entry in priors.items()
        if not entry["reference"] and entry["metrics"].get(name, {}).get("low") is not None
    }
    if not sign or len(rivals) < 2:
        return set()
    top = max(sign * value["mean"] for value in rivals.values())
    return {prior for prior, value in rivals.items() if sign * value["high" if sign > 0 else "low"] >= top}


def metric_cell(measure: Measure, value: dict[str, Any] | None, best: bool) -> Cell:
    """A mean with its interval."""
    if value is None or value["mean"] is None:
        return Cell("–")
    interval = f"[{measure.show(value['low'])}, {measure.show(value['high'])}]" if value["low"] is not None else ""
    return Cell(measure.show(value["mean"]), interval, best)


def cost_table(report: dict[str, Any]) -> Table:
    """What each prior took."""
    rows = [
        [
            Cell(name),
            Cell(sampled_by(report["meta"]["config"].get("priors", {}).get(name, {}))),
            Cell(short_count(entry["parameters"])),
            Cell(f"{entry['training_steps']:,}"),
            Cell(f"{entry['training_seconds']:.0f}"),
            Cell(f"{entry['evaluations']:,}"),
            Cell(f"{entry['flops_per_embedding'] / 1e6:,.1f}"),
            Cell(f"{1e3 * entry['seconds_per_embedding']:.2f}"),
        ]
        for name, entry in report["priors"].items()
    ]
    head = ["prior", "sampled with", "parameters", "training steps", "training s", "evaluations", "MFLOP", "ms"]
    notes = [
        ("sampled with", "guidance 1 is off; of several candidates the one nearest to its caption is kept"),
        ("evaluations", "of the network for one embedding, candidates and guidance included"),
        ("MFLOP, ms", "for one embedding, on this machine in batches of the data's size; a multiply-add is two"),
    ]
    return Table("Cost", head, rows, notes)


def sampled_by(settings: dict[str, Any]) -> str:
    """How a prior's samples were drawn, from its settings; a dash where nothing is drawn."""
    sampler = settings.get("sampler", {})
    variance = f" {sampler['variance']}" if "variance" in sampler else ""
    parts = [f"{sampler['class']} {sampler['steps']}{variance}"] if sampler else []
    parts += [f"guidance {settings['guidance']:g}"] if "guidance" in settings else []
    parts += [f"best of {settings['candidates']}"] if settings.get("candidates", 1) > 1 else []
    parts += [f"dot token above {settings['dot_quantile']:.0%}"] if settings.get("dot_quantile") else []
    parts += [f"temperature {settings['temperature']:g}"] if settings.get("temperature", 1) != 1 else []
    return ", ".join(parts) or "–"


def attribute_table(report: dict[str, Any]) -> Table | None:
    """Accuracy by attribute along the chain, from the oracle itself to each prior; None without an oracle."""
    if report["oracle"] is None:
        return None
    rows = {
        "oracle on real images": report["oracle"]["real"],
        "CLIP, zero-shot": report["clip"]["zero_shot"],
        "decoder, from the true embedding alone": report["decoder"]["reconstruction"],
        **{f"{name} prior, where stated": entry["attributes"] for name, entry in report["priors"].items()},
    }
    names = list(report["oracle"]["real"])
    cells = [[Cell(label), *(_share(values.get(name)) for name in names)] for label, values in rows.items()]
    return Table("Accuracy by attribute, %", ["", *names], cells)


def _share(value: float | None) -> Cell:
    return Cell("–" if value is None or value != value else f"{100 * value:.1f}")


def foundation_table(report: dict[str, Any]) -> Table:
    """What the comparison stands on."""
    decoder, clip, judge, codec = (report[name] for name in ("decoder", "clip", "judge", "codec"))
    r10 = MEASURES["retrieval_r10"]
    rows = [
        [
            Cell("decoder, from the embedding alone: R@10 by the judge, %"),
            metric_cell(r10, decoder["judge_r10"], False),
        ],
        [Cell("decoder: Fréchet distance (judge)"), metric_cell(MEASURES["fd_judge"], decoder["fd_judge"], False)],
        [Cell("CLIP finds the true image of a caption: R@1 / R@10, %"), _retrieval(clip)],
        [Cell("judge, the same: R@1 / R@10, %"), _retrieval(judge)],
    ]
    if codec:
        rows += [
            [Cell("codec: round-trip cosine"), Cell(f"{codec['roundtrip_cosine']:.4f}")],
            [
                Cell(f"codec: variance lost by keeping {codec['code_length']} of {codec['embed_dim']} axes, %"),
                Cell(f"{100 * codec['pca_error']:.2f}"),
            ],
            [
                Cell(f"codec: variance lost by {codec['buckets']} buckets, %"),
                Cell(f"{100 * codec['quantisation_error']:.3f}"),
            ],
        ]
    return Table("Foundations", ["", ""], rows)


def _retrieval(scores: dict[str, Any]) -> Cell:
    return Cell(" / ".join(f"{100 * scores[key]:.1f}" for key in ("retrieval_r1", "retrieval_r10")))


def claim_table(report: dict[str, Any]) -> Table:
    """The paper's claims beside ours."""
    rows = [
        [
            Cell(claim["claim"], f"({claim['source']})"),
            Cell(claim["paper"]),
            Cell(claim["ours"]),
            Cell(claim["verdict"], tone=claim["verdict"].replace(" ", "-")),
        ]
        for claim in report["paper"]
    ]
    return Table("Claims", ["claim", "paper", "here", "verdict"], rows)


def summary(report: dict[str, Any]) -> list[str]:
    """The findings in a few sentences."""
    return [
        sentence for sentence in (_rivals(report), _floor(report), _calibration(report), _verdicts(report)) if sentence
    ]


def _rivals(report: dict[str, Any]) -> str:
    duel = report["head_to_head"]
    if not duel:
        return ""
    name = next((key for key in ("stated_match", "clip_score") if key in duel["win_rates"]), "")
    first, second = (report["priors"][duel[side]]["metrics"][name] for side in ("first", "second"))
    measure, rate = MEASURES[name], duel["win_rates"][name]
    return (
        f"On {measure.label}, {duel['first']} scores {_with_interval(measure, first)} and {duel['second']} "
        f"{_with_interval(measure, second)}; head to head {duel['first']} wins {100 * rate['mean']:.1f} % "
        f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] of the captions, ties counted half."
    )


def _floor(report: dict[str, Any]) -> str:
    """How far every prior lies from floor and ceiling."""
    name = next(
        key for key in ("stated_match", "clip_score") if any(key in p["metrics"] for p in report["priors"].values())
    )
    measure = MEASURES[name]
    values = {prior: entry["metrics"][name]["mean"] for prior, entry in report["priors"].items()}
    listed = ", ".join(f"{prior} {measure.show(value)}" for prior, value in sorted(values.items(), key=lambda x: -x[1]))
    return f"From best to worst on {measure.label}{' (%)' if measure.percent else ''}: {listed}."


def _calibration(report: dict[str, Any]) -> str:
    gaps = {
        name: entry["metrics"]["calibration_gap"]["mean"]
        for name, entry in report["priors"].items()
        if not entry["reference"] and entry["metrics"]["cos_samples"]["mean"] < 0.9999
    }
    if not gaps:
        return ""
    name = min(gaps, key=lambda key: abs(gaps[key]))
    listed = ", ".join(f"{prior} {gap:+.3f}" for prior, gap in gaps.items())
    return f"The best calibrated prior is {name} (cos to true less cos between samples: {listed}; 0 is calibrated)."


def _verdicts(report: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for claim in report["paper"]:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    listed = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items(), key=lambda x: -x[1]))
    return f"Verdicts on {len(report['paper'])} claims set beside these numbers: {listed}." if counts else ""


def sample_sizes(report: dict[str, Any]) -> str:
    """One line of sample counts."""
    counts = report["meta"]["counts"]
    many = f", {counts['diversity_samples']} images of each of {counts['diversity_captions']} for diversity"
    return (
        f"{counts['heldout_rows']:,} held-out captions × {counts['seeds']} seeds for embeddings, "
        f"{counts['decoded_captions']:,} of them decoded{many if counts['diversity_captions'] else ''}"
    )


def lines_of(settings: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (dotted key, value)."""
    if not isinstance(settings, dict):
        yield prefix, str(settings)
        return
    for key, value in settings.items():
        yield from lines_of(value, f"{prefix}.{key}" if prefix else key)


def _with_interval(measure: Measure, value: dict[str, Any]) -> str:
    unit = " %" if measure.percent else ""
    return f"{measure.show(value['mean'])}{unit} [{measure.show(value['low'])}, {measure.show(value['high'])}]"


def short_count(number: float) -> str:
    """1.9 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"
