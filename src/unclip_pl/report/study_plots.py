"""Figures of a study, as PNG bytes: curves with their bands, win rates, ablations."""

from typing import Any

from matplotlib.figure import Figure

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.report.plots import (
    FAINT,
    INK,
    PALETTE,
    clean,
    colors,
    draw_calibration,
    draw_metrics,
    new_figure,
    to_png,
)

#: What a curve shows, in the order of its panels; those that it has.
SHOWN = ("stated_match", "clip_score", "fd_judge", "embed_fd", "probe_match", "text_cos", "calibration_gap", "cos_true")
PANELS = 3
#: Curves whose x grows by factors.
LOG = ("sampling steps", "axes", "candidates")


def study_plots(report: dict[str, Any]) -> dict[str, bytes]:
    """Every figure that there are numbers for, by file name without suffix."""
    rows = _distinct(report)
    drawn = {"metrics": draw_metrics(rows), "calibration": draw_calibration(rows)}
    if report["head_to_head"]:
        drawn["head_to_head"] = _duels(report)
    if report["ablations"]:
        drawn["ablations"] = _ablations(report)
    for title, series in report["curves"].items():
        drawn[curve_file(title)] = _curve(title, series, colors(report))
    return {name: to_png(figure) for name, figure in drawn.items()}


def _distinct(report: dict[str, Any]) -> dict[str, Any]:
    """Without the rows that say what one before them says: a prior whose best guidance is 1 is the matched one."""
    rows: dict[str, Any] = {}
    for name, row in report["priors"].items():
        if all(row["metrics"] != other["metrics"] for other in rows.values()):
            rows[name] = row
    return {**report, "priors": rows}


def curve_file(title: str) -> str:
    """Name of a curve's picture."""
    return f"curve-{title.replace(' ', '-')}"


def _duels(report: dict[str, Any]) -> Figure:
    """Win rates about one half: each prior at its best, and matched."""
    rows = {"at their best": report["head_to_head"], "matched": report["head_to_head_matched"]}
    names = [name for name in MEASURES if name in rows["at their best"]["win_rates"]]
    figure = new_figure(6.4, 1.0 + 0.42 * len(names))
    axes = figure.add_subplot()
    axes.axvline(50, color=INK, linewidth=0.8)
    for place, (kind, duel) in enumerate((kind, duel) for kind, duel in rows.items() if duel):
        for y, name in enumerate(names):
            rate = duel["win_rates"].get(name)
            if not rate or rate["low"] is None:
                continue
            low, mean, high = (100 * rate[key] for key in ("low", "mean", "high"))
            at = y - 0.13 + 0.26 * place
            axes.plot([low, high], [at, at], color=PALETTE[place], linewidth=2.2, alpha=0.5, solid_capstyle="round")
            axes.plot(mean, at, "o", color=PALETTE[place], markersize=5, label=kind if y == 0 else None)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_yticks(range(len(names)), [MEASURES[name].label for name in names])
    axes.set_xlabel("← ar better     % of captions won by diffusion     diffusion better →", fontsize=8.5)
    axes.legend(fontsize=7.5, frameon=False, loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1.0))
    clean(axes)
    return figure


def _curve(title: str, series: dict[str, Any], priors: dict[str, str]) -> Figure:
    """A panel for each measure, a line for each series, its interval as a band; priors keep their colours."""
    there = [name for name in SHOWN if any(name in measures for measures in series.values())][:PANELS]
    figure = new_figure(3.3 * len(there), 2.7)
    for place, name in enumerate(there):
        axes, measure = figure.add_subplot(1, len(there), place + 1), MEASURES[name]
        scale = 100 if measure.percent else 1
        for free, (label, measures) in zip(PALETTE, series.items(), strict=False):
            color = priors.get(label, free)
            points = [point for point in measures.get(name, []) if point["mean"] is not None]
            x, mean = [point["x"] for point in points], [scale * point["mean"] for point in points]
            low, high = ([scale * (p[k] if p[k] is not None else p["mean"]) for p in points] for k in ("low", "high"))
            axes.plot(x, mean, "o-", color=color, markersize=3.5, linewidth=1.3, label=label)
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        if title in LOG:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(measure.heading, fontsize=9, color=INK, loc="left")
        axes.set_xlabel(title, fontsize=8.5)
        clean(axes, grid="both")
        if place == 0 and len(series) > 1:
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def _ablations(report: dict[str, Any]) -> Figure:
    """Difference of the paper's choice less the other, in percent of the other, with its interval."""
    lines = [(line, line["measures"]["embed_fd"]) for line in report["ablations"] if "embed_fd" in line["measures"]]
    figure = new_figure(6.4, 0.9 + 0.34 * len(lines))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, (_, values) in enumerate(lines):
        whole = values["other"]["mean"] or 1.0
        low, mean, high = (100 * (values["difference"][key] or 0) / whole for key in ("low", "mean", "high"))
        axes.plot([low, high], [y, y], color=PALETTE[0], linewidth=2.5, alpha=0.5, solid_capstyle="round")
        axes.plot(mean, y, "o", color=PALETTE[0], markersize=6)
    axes.set_yticks(range(len(lines)), [f"{line['title']}: {line['paper']} for {line['other']}" for line, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.6)
    axes.set_xlabel("← better    change of embed_fd, %    worse →", fontsize=8.5)
    axes.spines["left"].set_color(FAINT)
    clean(axes)
    return figure
