"""Draw the report's figures, as PNG bytes."""

import io
import re
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.report.compute import AXES, EXCESS
from unclip_pl.report.frontier import CONCENTRATION
from unclip_pl.report.study import MATCHED, distinct

Report = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart, and two of Tol's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
REFERENCE, INK, FAINT = "#555555", "#222222", "#d5d8dc"
DPI = 170
#: What is seen at a glance.
GLANCE = (
    "stated_match", "clip_score", "residual", "fd_judge_corrected", "diversity_gap", "vendi", "recall",
    "embed_fd_corrected",
)  # fmt: skip
#: What a curve shows, the first of these that it has.
CURVED = (
    "stated_match", "diversity_gap", "kid_judge", "clip_score", "fd_judge_corrected", "embed_fd_corrected",
    "probe_match", "text_cos", "calibration_gap", "cos_true",
)  # fmt: skip
PANELS = 3
#: What an ablation is drawn by, the Fréchet distance of embeddings.
ABLATED = "embed_fd_corrected"
#: More stages than these are not drawn: those of a study are its cells.
BARS = 24
#: Curves whose x grows by factors.
LOG = ("sampling steps", "axes", "candidates", *AXES)


def colors(report: Report) -> dict[str, str]:
    """Return a colour for each row; those that look at the true embedding are grey."""
    names = [name for name, entry in report["priors"].items() if not entry["reference"]]
    # Matched rows last: the others keep their colours where those are not drawn.
    names.sort(key=lambda name: name.endswith(MATCHED))
    own = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return {name: own.get(name, REFERENCE) for name in report["priors"]}


def draw_plots(report: Report) -> dict[str, bytes]:
    """Return every figure that the report has numbers for, by file name without suffix."""
    rows = distinct(report)
    drawn: dict[str, Figure] = {}
    if rows["priors"]:
        drawn = {"metrics": draw_metrics(rows), "calibration": draw_calibration(rows), "cost": draw_cost(rows)}
    if report.get("frontier", {}).get("points"):
        drawn["frontier"] = draw_frontier(report)
    if report.get("compute"):
        drawn["compute"] = draw_compute(report)
    if report["duels"]:
        drawn["head_to_head"] = draw_duels(report)
    if any(ABLATED in line["measures"] for line in report["ablations"]):
        drawn["ablations"] = draw_ablations(report)
    if report["oracle"]:
        drawn["attributes"] = draw_attributes(report)
    if 0 < len(report["meta"]["stages"]) <= BARS:
        drawn["stages"] = draw_stages(report)
    for title, series in report["curves"].items():
        drawn[curve_file(title)] = draw_curve(title, series, colors(report))
    return {name: to_png(figure) for name, figure in drawn.items()}


def curve_file(title: str) -> str:
    """Return the name of a curve's picture."""
    return f"curve-{file_name(title)}"


def file_name(title: str) -> str:
    """Return a name that any file system takes."""
    return re.sub(r"[^\w.()-]+", "-", title)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; the size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def clean(axes: Axes, *, grid: str = "x") -> None:
    """Leave no more ink than the numbers need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def dot(axes: Axes, y: float, value: dict[str, Any], color: str, *, scale: float = 1, hollow: bool = False) -> None:
    """Draw a mean with its interval; nothing where there is no mean."""
    if value["mean"] is None:
        return
    mean = scale * value["mean"]
    if value["low"] is not None:
        ends = [scale * value["low"], scale * value["high"]]
        axes.plot(ends, [y, y], color=color, linewidth=2.2, alpha=0.55, solid_capstyle="round")
    axes.plot(mean, y, "o", color=color, markersize=5, markerfacecolor="white" if hollow else color)


def draw_metrics(report: Report) -> Figure:
    """Draw a row of dots with intervals for each measure."""
    priors, palette = report["priors"], colors(report)
    names = [name for name in GLANCE if any(name in entry["metrics"] for entry in priors.values())]
    rows = -(-len(names) // 4)
    figure = new_figure(9.6, 0.6 + rows * (0.62 + 0.2 * len(priors)))
    for place, name in enumerate(names):
        axes, measure = figure.add_subplot(rows, 4, place + 1), MEASURES[name]
        for y, (prior, entry) in enumerate(priors.items()):
            if name in entry["metrics"]:
                scale = 100 if measure.percent else 1
                dot(axes, y, entry["metrics"][name], palette[prior], scale=scale, hollow=entry["reference"])
        axes.set_yticks(range(len(priors)), list(priors) if place % 4 == 0 else [""] * len(priors))
        axes.set_ylim(len(priors) - 0.5, -0.5)
        axes.set_title(measure.heading, fontsize=9, color=INK, loc="left")
        axes.locator_params(axis="x", nbins=4)
        clean(axes)
    return figure


def draw_duels(report: Report) -> Figure:
    """Draw win rates about one half: a panel for each pair, at their own settings and, where measured, matched."""
    pairs = list(dict.fromkeys((duel["first"], duel["second"]) for duel in report["duels"]))
    names = [name for name in MEASURES if any(name in duel["win_rates"] for duel in report["duels"])]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = new_figure(1.6 + 2.6 * columns, 0.5 + rows * (0.6 + 0.24 * len(names)))
    both = {duel["matched"] for duel in report["duels"]} == {True, False}
    handles: dict[str, Any] = {}
    for place, pair in enumerate(pairs):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.axvline(50, color=INK, linewidth=0.8)
        for duel in report["duels"]:
            if (duel["first"], duel["second"]) != pair:
                continue
            color, shift = PALETTE[duel["matched"]], (0.13 if duel["matched"] else -0.13) * both
            for y, name in enumerate(names):
                if name in duel["win_rates"]:
                    dot(axes, y + shift, duel["win_rates"][name], color, scale=100)
            # Named once for each kind of duel, whichever measures it has.
            label = "matched settings" if duel["matched"] else "own settings"
            handles.setdefault(label, axes.plot([], [], "o", color=color, markersize=5)[0])
        axes.set_xlim(-3, 103)
        axes.set_xticks([0, 50, 100])
        axes.set_ylim(len(names) - 0.4, -0.6)
        labels = [MEASURES[name].label for name in names]
        axes.set_yticks(range(len(names)), labels if place % columns == 0 else [""] * len(names))
        axes.set_title(f"← {pair[1]}  |  {pair[0]} →", fontsize=9, color=INK)
        clean(axes)
    figure.supxlabel("% of captions on which the one on the right scores better", fontsize=8.5)
    if both:
        figure.legend(
            handles.values(), handles.keys(), fontsize=7.5, frameon=False, loc="outside upper center", ncols=2
        )
    return figure


def draw_frontier(report: Report) -> Figure:
    """Draw fidelity against concentration, every setting of every contender; the perfect prior is a star."""
    found, palette = report["frontier"], colors(report)
    every = [point for points in found["points"].values() for point in points]
    distance = next(
        (name for name in ("embed_kid", "embed_fd_corrected") if all(name in point for point in every)), None
    )
    names = [name for name in ("probe_match", distance) if name and all(name in point for point in every)]
    figure = new_figure(4.6 * len(names), 3.4)
    for place, name in enumerate(names):
        axes, measure = figure.add_subplot(1, len(names), place + 1), MEASURES[name]
        scale = 100 if measure.percent else 1
        for label, points in found["points"].items():
            x, y = [p[CONCENTRATION]["mean"] for p in points], [scale * p[name]["mean"] for p in points]
            color, joined = palette.get(label, INK), found["hulls"][label][name]
            axes.plot(x, y, "o", color=color, markersize=4, alpha=0.85, label=label)
            axes.plot([x[i] for i in joined], [y[i] for i in joined], color=color, linewidth=0.8)
            for point, left in zip(points, x, strict=True):
                if point[name]["low"] is not None:
                    ends = [scale * point[name][end] for end in ("low", "high")]
                    axes.plot([left, left], ends, color=color, linewidth=1.6, alpha=0.3)
        if found["reference"] and name in found["reference"]:
            own = found["reference"]
            axes.plot(own[CONCENTRATION]["mean"], scale * own[name]["mean"], "*", color=REFERENCE, markersize=12)
            axes.annotate(
                "perfect prior", (own[CONCENTRATION]["mean"], scale * own[name]["mean"]), (8, -3),
                textcoords="offset points", fontsize=8, color=REFERENCE,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(measure.heading, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("← surer than right    gap of the cosines    too spread →", fontsize=8.5)
        clean(axes, grid="both")
        if place == 0:
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def draw_compute(report: Report) -> Figure:
    """Draw the excess over the perfect prior against FLOPs, log-log, with fitted power laws."""
    found, priors = report["compute"], colors(report)
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    free = _unused(priors.values() if priors.keys() & set(names) else [])
    palette = {name: priors.get(name) or next(free) for name in names}
    figure = new_figure(3.3 * len(EXCESS), 0.3 + 2.7 * len(found))
    for row, (title, lines) in enumerate(found.items()):
        for column, (name, label) in enumerate(EXCESS.items()):
            axes = figure.add_subplot(len(found), len(EXCESS), row * len(EXCESS) + column + 1)
            for prior, line in lines.items():
                _excess_line(axes, line, name, palette[prior], prior)
            reachable = next(iter(lines.values()))["reachable"].get(name, {"mean": None})["mean"]
            if reachable is not None and reachable > 0:
                axes.axhline(reachable, color=REFERENCE, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"excess {label} ↓", fontsize=9, color=INK, loc="left")
            axes.set_xlabel(f"FLOPs: {title}", fontsize=8.5)
            clean(axes, grid="both")
            axes.tick_params(which="minor", length=0, labelsize=6, labelbottom=False)
            if row == column == 0:
                axes.legend(fontsize=7.5, frameon=False)
    return figure


def _excess_line(axes: Axes, line: dict[str, Any], name: str, color: str, label: str) -> None:
    """Draw a contender's points with their intervals, and its power law; what no log axis holds points downwards."""
    points = [(point["flops"], point["excess"][name]) for point in line["points"]]
    points = [(x, value) for x, value in points if value["mean"] is not None]  # None where training diverged
    above = [(x, value) for x, value in points if value["mean"] > 0]
    axes.plot([x for x, _ in above], [value["mean"] for _, value in above], "o", color=color, markersize=4, label=label)
    for x, value in above:
        if value["low"] is not None:
            ends = [max(value["low"], value["mean"] / 10), value["high"]]
            axes.plot([x, x], ends, color=color, linewidth=1.6, alpha=0.3)
    for x, value in points:
        if value["mean"] <= 0:
            axes.plot(x, 0.03, "v", color=color, markerfacecolor="white", transform=axes.get_xaxis_transform())
    slope = line["slopes"].get(name, {"mean": None})
    if slope["mean"] is not None:
        ends = [points[0][0], points[-1][0]]
        fitted = [slope["start"], slope["start"] * (ends[1] / ends[0]) ** slope["mean"]]
        axes.plot(ends, fitted, color=color, linewidth=1.0)


def draw_calibration(report: Report) -> Figure:
    """Draw cos(sample, true) against cos(sample, sample'): calibrated priors lie on the diagonal."""
    palette = colors(report)
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    points = {
        name: (entry["metrics"]["cos_samples"]["mean"], entry["metrics"]["cos_true"]["mean"])
        for name, entry in report["priors"].items()
        if entry["metrics"]["cos_samples"]["mean"] is not None  # None where training diverged
    }
    low = min(min(point) for point in points.values()) - 0.06
    axes.plot([low, 1.02], [low, 1.02], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate("calibrated", (low + 0.02, low + 0.03), rotation=45, fontsize=8, color=INK, rotation_mode="anchor")
    places = apart({name: y for name, (_, y) in points.items()}, gap=(1.03 - low) / 22)
    for name, (x, y) in points.items():
        face = "white" if report["priors"][name]["reference"] else palette[name]
        axes.plot(x, y, "o", color=palette[name], markersize=8, markerfacecolor=face)
        left = x > low + 0.6 * (1 - low)
        axes.annotate(
            name, (x, places[name]), (-9 if left else 9, -3), textcoords="offset points", fontsize=9,
            color=palette[name], ha="right" if left else "left",
        )  # fmt: skip
    axes.set(xlim=(low, 1.03), ylim=(low, 1.03), aspect="equal")
    axes.set_xlabel("cos between two samples of a caption", fontsize=8.5)
    axes.set_ylabel("cos to the true embedding", fontsize=8.5)
    axes.text(1.0, low + 0.01, "too sure ↘", fontsize=8, color="#888888", ha="right")
    axes.text(low + 0.01, 1.0, "↖ too spread", fontsize=8, color="#888888", va="top")
    clean(axes, grid="both")
    return figure


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Return places of labels, moved upwards where two would lie closer than ``gap``."""
    found: dict[str, float] = {}
    last = -float("inf")
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        found[name] = last = max(place, last + gap)
    return found


def draw_cost(report: Report) -> Figure:
    """Draw seconds for an embedding against its Fréchet distance; down and left is better."""
    palette = colors(report)
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    rows = {name: entry for name, entry in report["priors"].items() if not entry["reference"]}
    for name, entry in rows.items():
        value, x = entry["metrics"]["embed_fd"], 1e3 * max(entry["seconds_per_embedding"], 1e-7)
        if value["mean"] is None:
            continue  # training diverged
        if value["low"] is not None:
            axes.plot([x, x], [max(value["low"], 1e-5), value["high"]], color=palette[name], linewidth=2, alpha=0.5)
        axes.plot(x, value["mean"], "o", color=palette[name], markersize=8)
        axes.annotate(
            name, (x, value["high"] or value["mean"]), (0, 6), textcoords="offset points", fontsize=9,
            color=palette[name], ha="center",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("milliseconds for one embedding", fontsize=8.5)
    axes.set_ylabel("Fréchet distance between embeddings", fontsize=8.5)
    clean(axes, grid="both")
    axes.tick_params(which="minor", length=0, labelsize=7)
    return figure


def draw_attributes(report: Report) -> Figure:
    """Draw what survives from picture to embedding to picture."""
    rows = {
        "oracle, real picture": (report["oracle"]["real"], "#bbbbbb"),
        "CLIP, zero-shot": (report["clip"]["zero_shot"], "#777777"),
        "decoded from the true embedding": (report["decoder"]["reconstruction"], INK),
    }
    names = list(report["oracle"]["real"])
    figure = new_figure(6.4, 2.6)
    axes = figure.add_subplot()
    for place, (label, (values, color)) in enumerate(rows.items()):
        x = [i + 0.27 * (place - 1) for i in range(len(names))]
        heights = [100 * (values.get(name) or 0) for name in names]
        axes.bar(x, heights, 0.24, color=color, label=label)
        for left, height in zip(x, heights, strict=True):
            axes.annotate(f"{height:.0f}", (left, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("% right", fontsize=8.5)
    axes.legend(fontsize=7.5, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    clean(axes, grid="y")
    return figure


def draw_stages(report: Report) -> Figure:
    """Draw where the time went."""
    stages = report["meta"]["stages"]
    figure = new_figure(6.4, 0.7 + 0.26 * len(stages))
    axes = figure.add_subplot()
    minutes = [seconds / 60 for seconds in stages.values()]
    axes.barh(range(len(stages)), minutes, 0.62, color="#7f9fbf")
    for y, value in enumerate(minutes):
        axes.annotate(f"{value:.1f}", (value, y), (3, -3), textcoords="offset points", fontsize=7.5, color=INK)
    axes.set_yticks(range(len(stages)), list(stages))
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("minutes", fontsize=8.5)
    clean(axes)
    return figure


def draw_curve(title: str, series: dict[str, Any], priors: dict[str, str]) -> Figure:
    """Draw a panel for each measure, a line for each series, its interval as a band; priors keep their colours."""
    there = [name for name in CURVED if any(name in measures for measures in series.values())][:PANELS]
    figure = new_figure(3.3 * len(there), 2.7)
    free = _unused(priors.values() if priors.keys() & series.keys() else [])
    palette = {label: priors.get(label) or next(free) for label in series}
    for place, name in enumerate(there):
        axes, measure = figure.add_subplot(1, len(there), place + 1), MEASURES[name]
        scale = 100 if measure.percent else 1
        for label, measures in series.items():
            points = [point for point in measures.get(name, []) if point["mean"] is not None]
            x, mean = [point["x"] for point in points], [scale * point["mean"] for point in points]
            low, high = ([scale * (p[k] if p[k] is not None else p["mean"]) for p in points] for k in ("low", "high"))
            axes.plot(x, mean, "o-", color=palette[label], markersize=3.5, linewidth=1.3, label=label)
            axes.fill_between(x, low, high, color=palette[label], alpha=0.18, linewidth=0)
        if title in LOG:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(measure.heading, fontsize=9, color=INK, loc="left")
        axes.set_xlabel(title, fontsize=8.5)
        clean(axes, grid="both")
        if place == 0 and len(series) > 1:
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def _unused(taken: Iterable[str]) -> Any:
    """Yield colours that no prior has, then all of them again."""
    used = set(taken)
    yield from [color for color in PALETTE if color not in used]
    while True:
        yield from PALETTE


def draw_ablations(report: Report) -> Figure:
    """Draw the difference of one choice less the other, with its interval."""
    lines = [(line, line["measures"][ABLATED]) for line in report["ablations"] if ABLATED in line["measures"]]
    figure = new_figure(6.4, 0.9 + 0.34 * len(lines))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, (_, values) in enumerate(lines):
        dot(axes, y, values["difference"], PALETTE[0], scale=1000)
    axes.set_yticks(range(len(lines)), [f"{line['title']}: {line['paper']} for {line['other']}" for line, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.6)
    axes.set_xscale("symlog", linthresh=1)  # a choice may be a hundred times worse than another
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("← better    1,000 × change of FD without bias    worse →", fontsize=8.5)
    axes.spines["left"].set_color(FAINT)
    clean(axes)
    return figure
