"""The report's figures, as PNG bytes."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unclip_pl.evaluation.measures import MEASURES

# Okabe and Ito's colours, which the colour-blind can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE, INK, FAINT = "#555555", "#222222", "#d5d8dc"
DPI = 170


def colors(report: dict[str, Any]) -> dict[str, str]:
    """One for each prior; the ceiling is grey."""
    names = [name for name, entry in report["priors"].items() if not entry["reference"]]
    # A study's matched rows last: the others keep their colours where those are not drawn.
    names.sort(key=lambda name: name.endswith("(matched)"))
    own = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return {name: own.get(name, REFERENCE) for name in report["priors"]}


def plots(report: dict[str, Any]) -> dict[str, bytes]:
    """Every figure that the report has numbers for, by file name without suffix."""
    drawn = {"metrics": draw_metrics(report), "calibration": draw_calibration(report), "cost": _cost(report)}
    if report["head_to_head"]:
        drawn["head_to_head"] = _head_to_head(report)
    if report["oracle"]:
        drawn["attributes"] = _attributes(report)
    if report["meta"]["stages"]:
        drawn["stages"] = _stages(report)
    return {name: to_png(figure) for name, figure in drawn.items()}


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display
    return figure


def to_png(figure: Figure) -> bytes:
    """As a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def clean(axes: Axes, *, grid: str = "x") -> None:
    """No more ink than the numbers need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def draw_metrics(report: dict[str, Any]) -> Figure:
    """A row of dots with intervals for each measure."""
    priors, palette = report["priors"], colors(report)
    wanted = ("stated_match", "clip_score", "residual", "fd_judge", "diversity_gap", "vendi", "recall", "embed_fd")
    names = [name for name in wanted if any(name in entry["metrics"] for entry in priors.values())]
    rows = -(-len(names) // 4)
    figure = new_figure(9.6, 0.6 + rows * (0.62 + 0.2 * len(priors)))
    for place, name in enumerate(names):
        axes, measure = figure.add_subplot(rows, 4, place + 1), MEASURES[name]
        scale = 100 if measure.percent else 1
        for y, (prior, entry) in enumerate(priors.items()):
            value = entry["metrics"].get(name)
            if value is None or value["mean"] is None:
                continue
            low, mean, high = (scale * value[key] for key in ("low", "mean", "high"))
            axes.plot([low, high], [y, y], color=palette[prior], linewidth=2, alpha=0.55, solid_capstyle="round")
            face = "white" if entry["reference"] else palette[prior]
            axes.plot(mean, y, "o", color=palette[prior], markersize=5, markerfacecolor=face)
        axes.set_yticks(range(len(priors)), list(priors) if place % 4 == 0 else [""] * len(priors))
        axes.set_ylim(len(priors) - 0.5, -0.5)
        axes.set_title(measure.heading, fontsize=9, color=INK, loc="left")
        axes.locator_params(axis="x", nbins=4)
        clean(axes)
    return figure


def _head_to_head(report: dict[str, Any]) -> Figure:
    """Win rates about one half."""
    duel = report["head_to_head"]
    names = [name for name in MEASURES if name in duel["win_rates"]]
    color = colors(report)[duel["first"]]
    figure = new_figure(6.4, 0.9 + 0.34 * len(names))
    axes = figure.add_subplot()
    axes.axvline(50, color=INK, linewidth=0.8)
    for y, name in enumerate(names):
        low, mean, high = (100 * duel["win_rates"][name][key] for key in ("low", "mean", "high"))
        axes.plot([low, high], [y, y], color=color, linewidth=2.5, alpha=0.5, solid_capstyle="round")
        axes.plot(mean, y, "o", color=color, markersize=6)
        axes.annotate(
            f"{mean:.1f}", (mean, y), (0, 6), textcoords="offset points", ha="center", fontsize=7.5, color=INK
        )
    reach = max(12.0, *(abs(100 * duel["win_rates"][n][k] - 50) + 3 for n in names for k in ("low", "high")))
    axes.set_xlim(50 - reach, 50 + reach)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_yticks(range(len(names)), [f"{MEASURES[name].label} ({MEASURES[name].group.lower()})" for name in names])
    axes.set_xlabel(
        f"← {duel['second']} better     % of captions won by {duel['first']}     {duel['first']} better →", fontsize=8.5
    )
    clean(axes)
    return figure


def draw_calibration(report: dict[str, Any]) -> Figure:
    """cos(sample, true) against cos(sample, sample'): calibrated priors lie on the diagonal."""
    palette = colors(report)
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    points = {
        name: (entry["metrics"]["cos_samples"]["mean"], entry["metrics"]["cos_true"]["mean"])
        for name, entry in report["priors"].items()
    }
    low = min(min(point) for point in points.values()) - 0.06
    axes.plot([low, 1.02], [low, 1.02], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate("calibrated", (low + 0.02, low + 0.03), rotation=45, fontsize=8, color=INK, rotation_mode="anchor")
    for name, (x, y) in points.items():
        face = "white" if report["priors"][name]["reference"] else palette[name]
        axes.plot(x, y, "o", color=palette[name], markersize=8, markerfacecolor=face)
        left = x > 0.9
        axes.annotate(
            name, (x, y), (-9 if left else 9, -3), textcoords="offset points", fontsize=9,
            color=palette[name], ha="right" if left else "left",
        )  # fmt: skip
    axes.set(xlim=(low, 1.03), ylim=(low, 1.03), aspect="equal")
    axes.set_xlabel("cos between two samples of a caption", fontsize=8.5)
    axes.set_ylabel("cos to the true embedding", fontsize=8.5)
    axes.text(1.0, low + 0.01, "too sure ↘", fontsize=8, color="#888888", ha="right")
    axes.text(low + 0.01, 1.0, "↖ too spread", fontsize=8, color="#888888", va="top")
    clean(axes, grid="both")
    return figure


def _cost(report: dict[str, Any]) -> Figure:
    """Seconds for an embedding against its Fréchet distance; down and left is better."""
    palette = colors(report)
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    for name, entry in report["priors"].items():
        if entry["reference"]:
            continue
        value, x = entry["metrics"]["embed_fd"], 1e3 * max(entry["seconds_per_embedding"], 1e-7)
        axes.plot([x, x], [value["low"], value["high"]], color=palette[name], linewidth=2, alpha=0.5)
        axes.plot(x, value["mean"], "o", color=palette[name], markersize=8)
        axes.annotate(name, (x, value["mean"]), (9, -3), textcoords="offset points", fontsize=9, color=palette[name])
    axes.set(xscale="log", yscale="log")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel("milliseconds for one embedding", fontsize=8.5)
    axes.set_ylabel("Fréchet distance between embeddings", fontsize=8.5)
    clean(axes, grid="both")
    axes.tick_params(which="minor", length=0, labelsize=7)
    return figure


def _attributes(report: dict[str, Any]) -> Figure:
    """What survives from picture to embedding to picture."""
    rows = {
        "oracle, real image": (report["oracle"]["real"], "#bbbbbb"),
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


def _stages(report: dict[str, Any]) -> Figure:
    """Where the time went."""
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
