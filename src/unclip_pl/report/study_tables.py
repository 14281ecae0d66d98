"""A study's tables and sentences, before anybody decides between Markdown and HTML."""

from typing import Any

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.evaluation.study_claims import UNMEASURED
from unclip_pl.report.tables import Cell, Table, metric_cell, sampled_by, short_count

#: How to read the report's intervals; it stands in the report itself.
STATISTICS = (
    "Every interval is 95 % and covers both what another training seed and what other captions would change. Captions "
    "are crossed with training seeds (every trained prior answers the same ones), so the variance of a mean is that "
    "of a two-way random-effects analysis: A + B − R, and never less than A or B, with A the variance of the seeds' "
    "means over the number of seeds, B that of the captions' means over the number of captions, R the residual mean "
    "square over both; Student's t with Satterthwaite's degrees of freedom. For Fréchet distances and what is measured "
    "between embeddings, B and R come from bootstrap resamples of the captions, the same for every cell; of a distance "
    "near zero they vary more than the distance does, which makes its intervals rather too wide. Every training seed "
    "is sampled with noise of its own, so another sampling seed's part lies in A and R. What was fitted once (the "
    'linear map, either decoder of "Is a prior needed?", the text and true embeddings) has sampling seeds alone: its '
    "interval holds no other training. Comparisons are paired: seed k of either prior saw the data in the same order, "
    "and their images of a caption start from the same decoder noise. Precision, recall, density and coverage: as "
    "means over images, the nearest-neighbour balls taken as given. Win rates: ties count half; in brackets the "
    "interval over seeds and captions, beside it the paper's normal approximation over captions alone. The sign test "
    "is exact, over captions, of the mean over training seeds; ties are set aside. A share that every caption agrees "
    "on has Wilson's interval over captions. Nothing is corrected for how many comparisons there are."
)
RULE = (
    "Matched: the same CLIP, data, decoder, samples seen, batch size and schedule, parameters within 10 %, guidance 1; "
    "the peak learning rate is each prior's own, the one of those tried with the lowest joint_fd at guidance 1. "
    "Ablations of training keep the learning rate of the prior that they ablate. As in the paper, and tuned for "
    "neither, are the better of two samples of the diffusion prior, its 64 steps, and the AR prior's dot-product token "
    "from the top half; the diffusion prior's loss draws several noise levels a caption, which its FLOPs hold. At its "
    "best: the same networks at the guidance with the lowest joint_fd. joint_fd is the Fréchet distance of pairs "
    "(z_i, z_t), on validation embeddings, of a network of another training seed than the study's, for either prior "
    "alike; embed_fd, of z_i alone, does not see captions. Out of the running is a setting whose samples find their "
    "captions' true embeddings (R@10) less than half as often as another's: a rule added when, on emoji, a network "
    "blind to captions had the lowest joint_fd. No test data, judge or oracle has a say."
)
COSINE = (
    "A cosine to the true embedding rewards collapse: for unit-norm z with m = E[z | caption], a sample of the truth "
    "reaches ‖m‖² on average, the mean itself ‖m‖. So it is read beside the cosine between two samples of a caption, "
    "which is ‖m‖² for a calibrated prior: cos to true = cos between samples, and less of it than that is a prior "
    "surer than right. Such a prior may read better than the ceiling: its samples say what captions say more plainly "
    "than true embeddings do."
)
LIMITS = (
    "Limits: small pictures and data, small networks trained on few samples, an oracle or a judge CLIP in place of "
    "human raters, one CLIP and one decoder for all priors. What scale would change is not in any interval here."
)


def duel_table(report: dict[str, Any]) -> Table | None:
    """Win rates of the first rival, at its best and matched."""
    best, matched = report["head_to_head"], report["head_to_head_matched"]
    if not best:
        return None
    rows = []
    for name in (name for name in MEASURES if name in best["win_rates"]):
        rate = best["win_rates"][name]
        other = matched["win_rates"].get(name) if matched else None
        rows.append(
            [
                Cell(MEASURES[name].label, MEASURES[name].group.lower()),
                _share(rate),
                _share(rate["normal"]),
                Cell(f"{rate['wins']} : {rate['losses']}", f"{rate['ties']} ties"),
                Cell(f"{rate['p']:.2g}"),
                _share(other) if other else Cell("–"),
            ]
        )
    head = [
        "measure", "diffusion wins, %", "paper's interval", "captions won : lost", "sign test p", "matched, %",
    ]  # fmt: skip
    return Table(f"Head to head: {best['first']} against {best['second']}", head, rows)


def ablation_table(report: dict[str, Any]) -> Table | None:
    """One line each."""
    shown = ("embed_fd", "probe_match", "text_cos", "calibration_gap")
    there = [name for name in shown if any(name in line["measures"] for line in report["ablations"])]
    rows = [
        [
            Cell(line["title"], f"{line['paper']} against {line['other']}, {len(line['seeds'])} seeds"),
            *(_change(line["measures"].get(name), name) for name in there),
        ]
        for line in report["ablations"]
    ]
    head = ["ablation", *(f"Δ {MEASURES[name].heading}" for name in there)]
    notes = [("Δ", "the paper's choice less the other, paired by training seed and caption; bold where 0 lies outside")]
    if any(line["title"] == "SAM" for line in report["ablations"]):
        notes.append(("SAM", "two CLIPs: distances and cosines in different spaces are not compared"))
    return Table("Ablations", head, rows, notes) if rows else None


def need_table(report: dict[str, Any]) -> Table | None:
    """Is a prior needed at all? (§5.1), on decoders of one budget."""
    shown = ("fd_judge", "stated_match", "clip_score", "recall", "diversity_gap", "vendi")
    arms = report["need"]
    there = [name for name in shown if any(name in arm["metrics"] for arm in arms.values())]
    rows = [
        [Cell(name), *(metric_cell(MEASURES[m], arm["metrics"].get(m), False) for m in there)]
        for name, arm in arms.items()
    ]
    notes = [
        ("arms", "decoders of one budget, perhaps a smaller one than the main decoder's: compare these rows alone")
    ]
    return Table("Is a prior needed?", ["arm", *(MEASURES[m].heading for m in there)], rows, notes) if rows else None


def study_costs(report: dict[str, Any]) -> Table:
    """What training and sampling took; how each row was trained and sampled."""
    rows = []
    for name, row in report["priors"].items():
        low, high = row["training_seconds_range"]
        apart = f"{low:.0f} to {high:.0f}" if high > low else ""
        rows.append(
            [
                Cell(name, f"{len(row['seeds'])} training seeds" if row["training_steps"] else ""),
                Cell(sampled_by(row["sampling"])),
                Cell(f"{row['lr']:g}" if row["lr"] else "–"),
                Cell(short_count(row["parameters"])),
                Cell(f"{row['training_samples']:,.0f}" if row["training_steps"] else "–"),
                Cell(f"{row['training_seconds']:.0f}" if row["training_steps"] else "–", apart),
                Cell(f"{row['training_flops'] / 1e12:,.1f}" if row["training_steps"] else "–"),
                Cell(f"{row['evaluations']:,.0f}"),
                Cell(f"{row['flops_per_embedding'] / 1e6:,.1f}"),
                Cell(f"{1e3 * row['seconds_per_embedding']:.2f}"),
            ]
        )
    head = [
        "prior", "sampled with", "learning rate", "parameters", "samples seen", "training s", "training TFLOP",
        "evaluations", "MFLOP", "ms",
    ]  # fmt: skip
    notes = [
        (
            "training s",
            "median, fastest and slowest of the training seeds: other work may have run beside them",
        ),
        ("–", "a closed form, or nothing to train"),
        ("training TFLOP", "matrix products, attention included, forward and backward; a multiply-add is two"),
        ("evaluations, MFLOP, ms", "for one embedding, candidates and guidance included, on the hardware named above"),
    ]
    return Table("Cost", head, rows, notes)


def choice_table(report: dict[str, Any]) -> Table | None:
    """Every trial on validation data."""
    rows = []
    notes = [("bold", "what was chosen")]
    for choice in report["choices"]:
        chosen = choice["chosen"]
        tried = sorted(map(float, choice["learning_rates"]))
        if len(tried) > 1 and chosen["lr"] in (tried[0], tried[-1]):
            end = "smallest" if chosen["lr"] == tried[0] else "largest"
            notes.append((f"{choice['prior']}'s learning rate", f"the {end} tried: one beyond might be better still"))
        for kind, trials, taken in (
            ("learning rate", choice["learning_rates"], chosen["lr"]),
            ("guidance", choice["guidance"], chosen["guidance"]),
        ):
            for value, trial in trials.items():
                best = float(value) == taken
                numbers = [f"{trial['joint_fd']:.4f}", f"{trial['embed_fd']:.4f}", f"{trial['text_cos']:.3f}"]
                numbers += [f"{100 * trial['retrieval_r10']:.1f}"]
                rows.append([Cell(choice["prior"]), Cell(kind), *(Cell(x, best=best) for x in (value, *numbers))])
    head = ["prior", "setting", "value", "joint_fd ↓", "embed_fd ↓", "mean z_i·z_t", "R@10 % ↑"]
    return Table("Chosen on validation data", head, rows, notes) if rows else None


def study_claim_table(report: dict[str, Any]) -> Table:
    """The paper's claims beside ours."""
    rows = [
        [
            Cell(claim["claim"], f"({claim['source']})"),
            Cell(claim["paper"]),
            Cell(claim["ours"]),
            Cell(claim["verdict"], tone=claim["verdict"].replace(" ", "-")),
            Cell(claim["why"]),
        ]
        for claim in report["claims"]
    ]
    return Table("Claims", ["claim", "paper", "here", "verdict", "why"], rows)


def study_summary(report: dict[str, Any]) -> list[str]:
    """What a tired reader takes away in a minute."""
    sentences = [_quality(report), _duel(report), _cost(report), _calibration(report), _verdicts(report)]
    return [sentence for sentence in sentences if sentence]


def _quality(report: dict[str, Any]) -> str:
    rows = report["priors"]
    name = next((m for m in ("stated_match", "clip_score") if any(m in row["metrics"] for row in rows.values())), None)
    if name is None:
        return ""
    measure = MEASURES[name]
    found = {prior: row["metrics"][name] for prior, row in rows.items() if name in row["metrics"]}
    listed = ", ".join(
        f"{prior} {measure.show(value['mean'])} [{measure.show(value['low'])}, {measure.show(value['high'])}]"
        for prior, value in sorted(found.items(), key=lambda item: -item[1]["mean"])
        if value["low"] is not None
    )
    heading = measure.label[0].upper() + measure.label[1:]  # CLIP stays CLIP
    return f"{heading}{', %' if measure.percent else ''}, best first: {listed}."


def _duel(report: dict[str, Any]) -> str:
    duel = report["head_to_head"]
    if not duel:
        return ""
    listed = ", ".join(
        f"{MEASURES[name].label} {100 * rate['mean']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
        for name, rate in duel["win_rates"].items()
        if name in ("residual", "stated_match", "clip_score", "diversity_gap", "vendi") and rate["low"] is not None
    )
    return f"Head to head, each at its best, the diffusion prior wins: {listed} of the captions, ties counted half."


def _cost(report: dict[str, Any]) -> str:
    names = ("diffusion (matched)", "ar (matched)")
    if any(name not in report["priors"] or not report["priors"][name]["training_flops"] for name in names):
        return ""
    ours, theirs = (report["priors"][name] for name in names)
    training = ours["training_flops"] / theirs["training_flops"]
    drawing = ours["flops_per_embedding"] / max(1, theirs["flops_per_embedding"])
    return (
        f"After equally many samples the diffusion prior has cost {training:.2f} times the AR prior's training FLOPs, "
        f"and costs {drawing:.1f} times as many for an embedding, both without guidance."
    )


def _calibration(report: dict[str, Any]) -> str:
    gaps = {
        name: row["metrics"]["calibration_gap"]["mean"]
        for name, row in report["priors"].items()
        if not row["reference"] and row["metrics"]["cos_samples"]["mean"] < 0.9999
    }
    listed = ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items())
    return f"Calibration (cos to true less cos between samples, 0 is calibrated): {listed}." if gaps else ""


def _verdicts(report: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for claim in report["claims"]:
        counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    listed = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items(), key=lambda x: -x[1]))
    unmeasured = sum(claim["ours"] == UNMEASURED for claim in report["claims"])
    aside = f"; {unmeasured} could not be measured" if unmeasured else ""
    return f"Verdicts on {len(report['claims'])} claims, the paper's and two about it: {listed}{aside}."


def _share(rate: dict[str, Any]) -> Cell:
    if rate["low"] is None:
        return Cell("–")
    return Cell(f"{100 * rate['mean']:.1f}", f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]")


def _change(line: dict[str, Any] | None, name: str) -> Cell:
    if line is None or line["difference"]["low"] is None:
        return Cell("–")
    scale, digits = (100, 1) if MEASURES[name].percent else (1, MEASURES[name].digits)
    low, mean, high = (f"{scale * line['difference'][key]:+.{digits}f}" for key in ("low", "mean", "high"))
    clear = line["difference"]["low"] > 0 or line["difference"]["high"] < 0
    return Cell(mean, f"[{low}, {high}]", best=clear)
