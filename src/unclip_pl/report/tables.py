"""Arrange a report's numbers in tables and sentences, before anybody decides between Markdown and HTML."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from unclip_pl.evaluation.measures import GROUPS, MEASURES, end_of_grid
from unclip_pl.report.claims import UNMEASURED
from unclip_pl.report.compute import EXCESS
from unclip_pl.report.study import MATCHED, distinct, row_named

Report = dict[str, Any]
#: What a study chooses on validation data, in words.
SETTINGS = {"lr": "learning rate", "muon_lr": "learning rate of Muon", "guidance": "guidance"}


class Field(NamedTuple):
    """A number, or words."""

    text: str
    interval: str = ""
    best: bool = False
    tone: str = ""  # the CSS class of a verdict


class Table(NamedTuple):
    """Rows of cells under a heading; ``notes`` explain the columns."""

    title: str
    head: list[str]
    rows: list[list[Field]]
    notes: list[tuple[str, str]] = []
    words: bool = False  # sentences, not numbers


def metric_tables(report: Report) -> list[Table]:
    """Return a table of priors × measures for each group of measures that was measured."""
    priors = report["priors"]
    tables: list[Table] = []
    for group in GROUPS:
        names = [name for name in measured(priors) if MEASURES[name].group == group]
        best = {name: _best(name, priors) for name in names}
        rows = [
            [Field(prior), *(metric_cell(name, entry, best=prior in best[name]) for name in names)]
            for prior, entry in priors.items()
        ]
        notes = [(MEASURES[name].label, MEASURES[name].what) for name in names]
        if any(best.values()) and not tables:
            bold = "of the priors that see the caption alone, those whose interval reaches the best mean"
            notes.append(("bold", bold))
        if names:
            tables.append(Table(group, ["prior", *(MEASURES[name].heading for name in names)], rows, notes))
    return tables


def measured(entries: dict[str, Any]) -> list[str]:
    """Return the measures that any of some rows has, in the order of the tables."""
    return [name for name in MEASURES if any(name in entry["metrics"] for entry in entries.values())]


def _best(name: str, priors: dict[str, Any]) -> set[str]:
    """Return the priors that see the caption alone and whose interval reaches the best mean."""
    sign = {"higher": 1, "lower": -1, "neither": 0}[MEASURES[name].better]
    contenders = {
        prior: entry["metrics"][name]
        for prior, entry in priors.items()
        if not entry["reference"] and entry["metrics"].get(name, {}).get("low") is not None
    }
    if not sign or len(contenders) < 2:
        return set()
    top = max(sign * value["mean"] for value in contenders.values())
    return {prior for prior, value in contenders.items() if sign * value["high" if sign > 0 else "low"] >= top}


def metric_cell(name: str, entry: dict[str, Any], *, best: bool = False) -> Field:
    """Return a row's mean with its interval; a dash where it was not measured."""
    value, measure = entry["metrics"].get(name), MEASURES[name]
    if value is None:
        return Field("–")
    return Field(measure.show(value["mean"]), measure.interval(value), best)


def duel_table(report: Report) -> Table | None:
    """Return win rates: measures × pairs of contenders."""
    duels = {
        f"{duel['first']} : {duel['second']}{MATCHED if duel['matched'] else ''}": duel["win_rates"]
        for duel in report["duels"]
    }
    rows = [
        [Field(MEASURES[name].label), *(_share(rates.get(name)) for rates in duels.values())]
        for name in MEASURES
        if any(name in rates for rates in duels.values())
    ]
    notes = [
        ("%", "share of the captions on which the first of a pair scores better; a tie is half a win"),
        ("bold", "50 % lies outside the interval"),
        ("report.json", "has captions won, lost and tied, the exact sign test, and the paper's normal approximation"),
    ]
    return Table("Head to head", ["% won", *duels], rows, notes) if rows else None


def ablation_table(report: Report) -> Table | None:
    """Return a line for each ablation."""
    shown = (
        "embed_fd_corrected", "probe_match", "text_cos", "calibration_gap", "kid_judge", "diversity_gap", "vendi",
        "recall",
    )  # fmt: skip
    there = [name for name in shown if any(name in line["measures"] for line in report["ablations"])]
    rows = [
        [
            Field(line["title"], f"{line['paper']} against {line['other']}, {len(line['seeds'])} seeds"),
            *(_change(line["measures"].get(name), name, bold=line["one_space"]) for name in there),
        ]
        for line in report["ablations"]
    ]
    head = ["ablation", *(f"Δ {MEASURES[name].heading}" for name in there)]
    notes = [
        ("Δ", "the first choice less the other, paired by training seed and caption; bold where 0 lies outside"),
        (
            "never bold",
            "two CLIPs, of which each was trained once: what another training would change is in no interval",
        ),
        ("–", "not measured, or two CLIPs: distances and cosines in different spaces are not compared"),
    ]
    return Table("Ablations", head, rows, notes) if rows else None


def slope_table(report: Report) -> Table | None:
    """Return the slopes of the excess over the perfect prior against FLOPs; None where no curve has any."""
    rows = [
        [
            Field(title),
            Field(name, f"{len(line['points'])} points"),
            Field(over),
            *(_slope(line[slopes].get(measure)) for measure in EXCESS),
        ]
        for title, lines in report["compute"].items()
        for name, line in lines.items()
        for slopes, over in (("slopes", "perfect prior"), ("reducible", "perfect prior of the training pictures"))
        if line[slopes]
    ]
    notes = [
        (
            "slope",
            "b of excess = a · FLOPs^b; 95 % interval over captions and the training seeds that all points share",
        ),
        (
            "of the training pictures",
            "the perfect prior without pairs that training never shows and the caption does not name",
        ),
        ("excess at or below 0", "counts as it is: the fit is Poisson pseudo-maximum likelihood, and drops no point"),
        ("–", "no power law fits, such as where the excess sums to 0 or less; [–]: none fits in one resample or more"),
    ]
    return (
        Table("Slopes", ["FLOPs of", "contender", "excess over the", *EXCESS.values()], rows, notes) if rows else None
    )


def _slope(value: dict[str, Any] | None) -> Field:
    if value is None or value["mean"] is None:
        return Field("–")
    known = f"[{value['low']:+.2f}, {value['high']:+.2f}], " if value["low"] is not None else "[–], "
    return Field(f"{value['mean']:+.2f}", f"{known}{len(value['seeds'])} seeds")


def excess_table(report: Report) -> Table | None:
    """Return every point of the curves against FLOPs."""
    rows = [
        [
            Field(f"{title} {point['x']:g}", name),
            Field(f"{point['flops']:.2e}", f"{len(point['seeds'])} seeds"),
            *(Field(f"{1e3 * value['mean']:.2f}", _thousandths(value)) for value in map(point["excess"].get, EXCESS)),
        ]
        for title, lines in report["compute"].items()
        for name, line in lines.items()
        for point in line["points"]
    ]
    notes = [
        ("excess", "a contender's value less the perfect prior's, paired by seed; noise may take it below 0"),
        (EXCESS["mean_error"], "|E[s] - E[z_i]|² given the caption: E[s·s'] - 2 E[s·z_i], less the perfect prior's"),
    ]
    head = ["curve", "FLOPs", *(f"{label} × 1000" for label in EXCESS.values())]
    return Table("Excess over the perfect prior", head, rows, notes) if rows else None


def _thousandths(value: dict[str, Any]) -> str:
    return "" if value["low"] is None else f"[{1e3 * value['low']:.2f}, {1e3 * value['high']:.2f}]"


def further_tables(report: Report) -> list[Table]:
    """Return the tables that a study adds, such as decoders of another budget."""
    shown = (
        "fd_judge", "stated_match", "parts_right", "swapped", "colors_swapped", "clip_score", "recall", "diversity_gap",
        "vendi",
    )  # fmt: skip
    tables = []
    for title, entries in report["tables"].items():
        there = [name for name in measured(entries) if name in shown] or measured(entries)
        rows = [[Field(row), *(metric_cell(name, entry) for name in there)] for row, entry in entries.items()]
        notes = [("rows", "compare them with each other alone: another decoder may have drawn them than the one above")]
        tables.append(Table(title, ["", *(MEASURES[name].heading for name in there)], rows, notes))
    return tables


def cost_table(report: Report) -> Table | None:
    """Return what training and sampling took, and how each row was trained and sampled; None without rows."""
    rows = []
    for name, row in report["priors"].items():
        trained = bool(row["training_steps"])
        low, high = row["training_seconds_range"]
        spread = f"{low:.0f} to {high:.0f}" if high > low else ""
        cells = [
            Field(f"{row['lr']:g}" if row["lr"] else "–"),
            Field(short_count(row["parameters"])),
            Field(f"{row['training_samples']:,.0f}" if row["training_samples"] else "–"),
            Field(f"{row['training_seconds']:.0f}" if trained else "–", spread),
            Field(f"{row['training_flops'] / 1e12:,.1f}" if row["training_flops"] else "–"),
            Field(f"{row['evaluations']:,.0f}"),
            Field(f"{row['flops_per_embedding'] / 1e6:,.1f}"),
            Field(f"{1e3 * row['seconds_per_embedding']:.2f}"),
        ]
        seeds = f"{len(row['seeds'])} training seeds" if trained and len(row["seeds"]) > 1 else ""
        rows.append([Field(name, seeds), Field(sampled_by(row["sampling"])), *cells])
    head = [
        "prior", "sampled with", "learning rate", "parameters", "samples seen", "training s", "training TFLOP",
        "evaluations", "MFLOP", "ms",
    ]  # fmt: skip
    notes = [
        ("sampled with", "guidance 1 is off; of several candidates the one nearest to its caption is kept"),
        ("training s", "median, fastest and slowest of the training seeds: other work may have run beside them"),
        ("–", "a closed form, nothing to train, or not known"),
        (
            "training TFLOP",
            "matrix products of forward and backward, with attention, without the optimizer's; a multiply-add is two",
        ),
        ("evaluations, MFLOP, ms", "for one embedding, candidates and guidance included, on the hardware named above"),
    ]
    return Table("Cost", head, rows, notes) if rows else None


def sampled_by(settings: dict[str, Any]) -> str:
    """Return how a prior's samples were drawn; a dash where nothing is drawn."""
    sampler = settings.get("sampler") or {}
    variance = f" {sampler['variance']}" if "variance" in sampler else ""
    parts = [f"{sampler['class']} {sampler['steps']}{variance}"] if sampler else []
    parts += [f"guidance {settings['guidance']:g}{_levels(settings)}"] if "guidance" in settings else []
    parts += [f"best of {settings['candidates']}"] if settings.get("candidates", 1) > 1 else []
    parts += [f"dot token above {settings['dot_quantile']:.0%}"] if settings.get("dot_quantile") else []
    parts += [f"temperature {settings['temperature']:g}"] if settings.get("temperature", 1) != 1 else []
    return ", ".join(parts) or "–"


def _levels(settings: dict[str, Any]) -> str:
    """Return the noise levels and the guide of a guidance, where there are any."""
    interval, guide = settings.get("guidance_interval"), settings.get("guide")
    away = f" away from {guide['checkpoint']}" if guide else ""
    return away + (f" at σ/α from {interval[0]:g} to {interval[1]:g}" if interval else "")


def choice_table(report: Report) -> Table | None:
    """Return every trial on validation data."""
    rows = []
    notes = [("bold", "what was chosen")]
    for choice in report["choices"]:
        for setting, taken in choice["chosen"].items():  # not every prior has a guidance
            kind, trials = SETTINGS[setting], choice["guidance" if setting == "guidance" else "learning_rates"]
            if end := end_of_grid(trials, taken):
                notes.append((f"{choice['file']}'s {kind}", f"the {end} tried: one beyond might be better still"))
            for value, trial in trials.items():
                error = f"± {trial['joint_fd_error']:.4f}" if trial.get("joint_fd_error") else ""
                loss = "–" if trial.get("val_loss") is None else f"{trial['val_loss']:.4f}"
                numbers = [f"{trial['joint_fd']:.4f}", loss, f"{trial['embed_fd']:.4f}", f"{trial['text_cos']:.3f}"]
                numbers += [f"{100 * trial['retrieval_r10']:.1f}"]
                best = float(value) == taken
                cells = [Field(x, error * (i == 1), best) for i, x in enumerate((value, *numbers))]
                rows.append([Field(choice["file"]), Field(kind), *cells])
    head = ["prior", "setting", "value", "joint_fd ↓", "validation loss ↓", "embed_fd ↓", "mean z_i·z_t", "R@10 % ↑"]
    return Table("Chosen on validation data", head, rows, notes) if rows else None


def attribute_table(report: Report) -> Table | None:
    """Return accuracy by attribute along the chain, from the oracle itself to each prior; None without an oracle."""
    if report["oracle"] is None:
        return None
    rows = {
        "oracle on real pictures": report["oracle"]["real"],
        "CLIP, zero-shot": report["clip"]["zero_shot"],
        "decoder, from the true embedding alone": report["decoder"]["reconstruction"],
        **{f"{name} prior, where stated": e["attributes"] for name, e in report["priors"].items() if e["attributes"]},
    }
    names = list(report["oracle"]["real"])
    cells = [[Field(label), *(Field(_percent(values.get(name))) for name in names)] for label, values in rows.items()]
    return Table("Accuracy by attribute, %", ["", *names], cells)


def foundation_table(report: Report) -> Table | None:
    """Return what the comparison stands on; None where it was not measured."""
    decoder, clip, judge, codec = (report[name] for name in ("decoder", "clip", "judge", "codec"))
    if not decoder:
        return None
    entry = {"metrics": decoder}
    rows = [
        [Field("decoder, from the embedding alone: R@10 by the judge, %"), metric_cell("retrieval_r10", entry)],
        [Field("decoder, from the embedding alone: Fréchet distance (judge)"), metric_cell("fd_judge", entry)],
        [Field("CLIP finds the true picture of a caption: R@1 / R@10, %"), _retrieval(clip)],
        [Field("judge, the same: R@1 / R@10, %"), _retrieval(judge)],
    ]
    if codec:
        lost = f"codec: variance lost by keeping {codec['code_length']} of {codec['embed_dim']} axes, %"
        rows += [
            [Field("codec: round-trip cosine"), Field(f"{codec['roundtrip_cosine']:.4f}")],
            [Field(lost), Field(f"{100 * codec['pca_error']:.2f}")],
            [
                Field(f"codec: variance lost by {codec['buckets']} buckets, %"),
                Field(f"{100 * codec['quantisation_error']:.3f}"),
            ],
        ]
    return Table("Foundations", ["", ""], rows)


def profile_table(report: Report) -> Table | None:
    """Return how fast each training was, and how busy its GPU; None where no stage wrote a profile."""
    profiles = report["meta"].get("profiles")
    if not profiles:
        return None
    rows = [
        [
            Field(name),
            Field(profile["device"]),
            Field(f"{profile['steps_per_second']:.1f}"),
            Field(f"{profile['flops_per_second'] / 1e12:.1f}"),
            Field(_percent(profile["mfu"])),
            Field(_percent(profile["gpu_busy"])),
            Field("–" if profile["peak_memory_bytes"] is None else f"{profile['peak_memory_bytes'] / 2**30:.1f}"),
        ]
        for name, profile in profiles.items()
    ]
    head = ["training", "on", "steps/s", "TFLOP/s", "MFU, %", "GPU busy, %", "peak memory, GiB"]
    notes = [
        ("steps/s, TFLOP/s", "from the warm-up to the end of training, validation and checkpoints included"),
        ("MFU", "that arithmetic, as a share of the bfloat16 peak in the card's datasheet"),
        ("GPU busy", "share of the last steps in which a kernel of this training ran; others may have run beside it"),
    ]
    return Table("Trainings", head, rows, notes=notes)


def claim_table(report: Report) -> Table | None:
    """Return the claims that were measured, beside what was found."""
    rows = [
        [
            Field(claim["claim"], f"({claim['source']})"),
            Field(claim["paper"]),
            Field(claim["ours"]),
            Field(claim["verdict"], tone=claim["verdict"].replace(" ", "-")),
            Field(claim["why"]),
        ]
        for claim in report["claims"]
        if claim["verdict"] != UNMEASURED
    ]
    title = "What is claimed, what we find"
    return Table(title, ["claim", "paper", "here", "verdict", "why"], rows, words=True) if rows else None


def summary(report: Report) -> list[str]:
    """Return what a tired reader takes away in a minute."""
    sentences = [_quality(report), _duels(report), _cost(report), _calibration(report), _verdicts(report)]
    return [sentence for sentence in sentences if sentence]


def _quality(report: Report) -> str:
    """Rank the rows by the measure that says most of those that the first contender has."""
    rows = distinct(report)["priors"]
    there = next(iter(rows.values()))["metrics"] if rows else {}
    name = next((m for m in ("stated_match", "clip_score", "embed_fd_corrected", "embed_fd") if m in there), None)
    if name is None:
        return ""
    measure = MEASURES[name]
    found = {prior: row["metrics"][name] for prior, row in rows.items() if name in row["metrics"]}
    sign = -1 if measure.better == "higher" else 1
    listed = ", ".join(
        f"{prior} {measure.show(value['mean'])} {measure.interval(value)}".rstrip()
        for prior, value in sorted(found.items(), key=lambda item: sign * (item[1]["mean"] or 0))
        if value["mean"] is not None
    )
    title = measure.title[0].upper() + measure.title[1:]  # CLIP stays CLIP
    return f"{title}, best first: {listed}."


def _duels(report: Report) -> str:
    """Return how the first contender fares against the others, on the measure that says most."""
    first = next(iter(report["priors"]), "")
    duels = [duel for duel in report["duels"] if not duel["matched"] and duel["first"] == first]
    name = next((m for m in ("stated_match", "clip_score") if duels and m in duels[0]["win_rates"]), None)
    if name is None:
        return ""
    against = {duel["second"]: duel["win_rates"].get(name) for duel in duels}
    listed = ", ".join(
        f"{100 * rate['mean']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] against {second}"
        for second, rate in against.items()
        if rate and rate["low"] is not None
    )
    return f"Share of captions that {first} wins head to head on {MEASURES[name].label}, ties counted half: {listed}."


def _cost(report: Report) -> str:
    """Return what training and an embedding cost the first contender, as shares of what they cost other networks."""
    trained = [name for name, row in report["priors"].items() if row["training_flops"] and not name.endswith(MATCHED)]
    at = {name: row_named(report, name + MATCHED) for name in trained}
    rows = {name: report["priors"][row] for name, row in at.items() if row in report["priors"]}
    if len(rows) < 2:
        return ""
    (first, ours), *others = rows.items()
    hashes = report["meta"]["config_hashes"]
    others = [
        (name, row)
        for name, row in others
        if row["training_samples"] == ours["training_samples"] and hashes.get(name, name) != hashes.get(first)
    ]
    listed = "; ".join(
        f"{ours['training_flops'] / row['training_flops']:.2f} times the training FLOPs of {name}, "
        f"{ours['flops_per_embedding'] / max(1, row['flops_per_embedding']):.1f} times its FLOPs for an embedding"
        for name, row in others
    )
    return f"After equally many samples, without guidance, {first} has cost {listed}." if listed else ""


def _calibration(report: Report) -> str:
    gaps = {
        name: row["metrics"]["calibration_gap"]["mean"]
        for name, row in distinct(report)["priors"].items()
        if not row["reference"] and (row["metrics"]["cos_samples"]["mean"] or 1) < 0.9999  # None where it diverged
    }
    listed = ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items())
    return f"Calibration (cos to true less cos between samples, 0 is calibrated): {listed}." if gaps else ""


def _verdicts(report: Report) -> str:
    counts: dict[str, int] = {}
    for claim in report["claims"]:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    listed = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items(), key=lambda x: -x[1]))
    return f"Verdicts on {len(report['claims'])} claims of the paper and about it: {listed}." if counts else ""


def sample_sizes(report: Report) -> str:
    """Return one line of sample counts."""
    meta = report["meta"]
    counts = meta["counts"]
    fewest = meta["training_seeds"]
    most = max([fewest, *(len(row["seeds"]) for row in report["priors"].values() if row["training_flops"])])
    seeds = f"{fewest} training seeds" if most > 1 else "One training seed"
    seeds = f"{fewest} to {most} training seeds" if most > fewest else seeds
    drawn = f", {counts['captions']:,} of them drawn" if counts["captions"] else ""
    many = f", {counts['many_samples']} pictures of each of {counts['many']} for diversity" if counts["many"] else ""
    return f"{seeds}, {counts['rows']:,} held-out captions × {counts['seeds']} samples{drawn}{many}"


def lines_of(settings: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested settings as (dotted key, value)."""
    if not isinstance(settings, dict):
        yield prefix, str(settings)
        return
    for key, value in settings.items():
        yield from lines_of(value, f"{prefix}.{key}" if prefix else key)


def short_count(number: float) -> str:
    """Return a number such as 1.9 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.1f}"


def _share(rate: dict[str, Any] | None) -> Field:
    if rate is None or rate["low"] is None:
        return Field("–")
    clear = rate["low"] > 0.5 or rate["high"] < 0.5
    return Field(f"{100 * rate['mean']:.1f}", f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]", best=clear)


def _change(line: dict[str, Any] | None, name: str, *, bold: bool) -> Field:
    if line is None or line["difference"]["low"] is None:
        return Field("–")
    low, mean, high = (MEASURES[name].signed(line["difference"][key]) for key in ("low", "mean", "high"))
    clear = bold and (line["difference"]["low"] > 0 or line["difference"]["high"] < 0)
    return Field(mean, f"[{low}, {high}]", best=clear)


def _retrieval(scores: dict[str, Any]) -> Field:
    return Field(" / ".join(f"{100 * scores[key]:.1f}" for key in ("retrieval_r1", "retrieval_r10")))
