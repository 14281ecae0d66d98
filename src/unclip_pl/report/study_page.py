"""A study's report on disk, drawn from its cells: ``report.json``, ``.md``, ``.html``, ``plots/`` and TensorBoard."""

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.evaluation.study import CELLS, Study, read_study, study_report
from unclip_pl.report.page import document, html_figure, html_notes, html_pictures, html_table
from unclip_pl.report.plots import colors
from unclip_pl.report.report import Atlas, markdown_table, write_whole
from unclip_pl.report.study_plots import curve_file, study_plots
from unclip_pl.report.study_tables import (
    COSINE,
    LIMITS,
    RULE,
    STATISTICS,
    ablation_table,
    choice_table,
    duel_table,
    need_table,
    study_claim_table,
    study_costs,
    study_summary,
)
from unclip_pl.report.tables import Table, metric_tables

TITLE = "The rematch: diffusion prior against AR prior"
CAPTIONS = {
    "head_to_head": "Share of captions whose image the diffusion prior draws better; ties count half.",
    "metrics": "Dots are means, bars 95 % intervals over training seeds and captions; the ceiling is hollow.",
    "calibration": "On the dashed line, samples are as unlike each other as they are unlike the truth.",
    "ablations": "The paper's choice less the other, in percent of the other's distance, with 95 % intervals.",
}
#: Columns of the grid: group and arm, in order; what a study did not draw is left out.
GRID = (
    ("best", "diffusion"), ("best", "ar"), ("reference", "linear"), ("reference", "text"), ("reference", "ceiling"),
    ("need/caption only", ""), ("need/decoder trained on z_t", ""), ("need/generated z_i", ""),
)  # fmt: skip
GRID_NOTE = (
    "First training seed. Left to right: the true image; through one decoder, each prior at its best, a linear map, "
    "z_t in place of z_i, the true z_i; through decoders of one budget, the arms without a prior and with one."
)


def render_study(folder: Path) -> dict[str, Any]:
    """Draw everything from the cells; nothing is sampled.

    Returns:
        The report.
    """
    study = read_study(folder)
    report = study_report(study)
    report["meta"]["name"] = folder.resolve().name
    figures, atlas = study_plots(report), _grid(folder, study)
    pictures = folder / "plots"
    pictures.mkdir(exist_ok=True)
    for name, data in figures.items():
        (pictures / f"{name}.png").write_bytes(data)
    if atlas:
        atlas.save(pictures / "grid.png")
        report["pictures"] = {"grid": {"rows": atlas.rows, "columns": atlas.columns}}
    write_whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_whole(folder / "report.md", _markdown(report, figures))
    write_whole(folder / "report.html", _page(report, figures, atlas))
    return report


def print_study(folder: Path, report: dict[str, Any]) -> None:
    """The findings, to the terminal."""
    console = Console()
    for sentence in study_summary(report):
        console.print(f"· {sentence}", highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)


def log_study(report: dict[str, Any], folder: Path) -> None:
    """Every row's means as scalars, and its settings as hparams, for TensorBoard."""
    for name, row in report["priors"].items():
        found = {f"study/{m}": v["mean"] for m, v in row["metrics"].items() if v["mean"] is not None}
        settings = {key: value for key, value in row["sampling"].items() if isinstance(value, bool | int | float | str)}
        with SummaryWriter(str(folder / name.replace(" ", "-"))) as writer:
            writer.add_hparams({"prior": name, "lr": row["lr"] or 0.0, **settings}, found, run_name=".")
    for title, series in report["curves"].items():
        for label, measures in series.items():
            with SummaryWriter(str(folder / "curves" / f"{title}-{label}".replace(" ", "-"))) as writer:
                for measure, points in measures.items():
                    for point in points:
                        if point["mean"] is not None and math.isfinite(point["mean"]):
                            # TensorBoard counts steps: guidance and temperature stand there times 100.
                            writer.add_scalar(f"{title}/{measure}", point["mean"], round(100 * point["x"]))


def _grid(folder: Path, study: Study) -> Atlas | None:
    """Captions x arms, from the pictures of each group's first seed."""
    found: dict[tuple[str, str], Atlas] = {}
    for cell in study.cells:
        path = (folder / CELLS / cell["file"]).with_suffix(".png")
        if cell["pictures"] and path.is_file():
            atlas = Atlas.load(path, **cell["pictures"])
            for name in atlas.columns:
                found.setdefault((cell["group"], "" if cell["group"].startswith("need/") else name), atlas)
    columns: dict[str, Tensor] = {}
    for group, name in GRID:
        there = found.get((group, name)) or found.get((group.replace("best", "matched"), name))
        if there is not None:
            captions = there.rows
            columns.setdefault("real", there.images[:, 0])
            columns[name or group.partition("/")[2]] = there.images[:, there.columns.index(name) if name else 1]
    rows = {len(images) for images in columns.values()}
    return Atlas(torch.stack(list(columns.values()), dim=1), captions, list(columns)) if len(rows) == 1 else None


def _head(report: dict[str, Any]) -> str:
    meta, counts = report["meta"], report["meta"]["counts"]
    drawn = f"{counts['captions']:,} of them drawn, " if counts["captions"] else ""
    return (
        f"{meta['name']}: {meta['training_seeds']} training seeds of either prior, {meta['cells']} cells; "
        f"{counts['rows']:,} held-out captions, {drawn}{counts['many_samples']} images of each of {counts['many']} for "
        f"diversity. "
        f"{'; '.join(meta['hardware'])}. Commit {', '.join(meta['commits'])}."
    )


def _tables(report: dict[str, Any]) -> list[tuple[str, Table]]:
    """(what stands before it, table) for everything after the claims."""
    parts: list[tuple[str, Table | None]] = [
        ("", duel_table(report)),
        *(("" if table.title != "Embeddings" else COSINE, table) for table in metric_tables(report)),
        ("", need_table(report)),
        ("", ablation_table(report)),
        ("", study_costs(report)),
        ("", choice_table(report)),
    ]
    return [(before, table) for before, table in parts if table]


def _markdown(report: dict[str, Any], figures: dict[str, bytes]) -> str:
    parts = [f"# {TITLE}", _head(report), "\n".join(f"- {sentence}" for sentence in study_summary(report)), LIMITS]
    if "pictures" in report:
        grid = report["pictures"]["grid"]
        captions = "\n".join(f"{i}. {caption}" for i, caption in enumerate(grid["rows"], 1))
        parts += [f"![grid](plots/grid.png)\n\nColumns: {', '.join(grid['columns'])}. Rows:\n\n{captions}"]
    parts += ["## What the paper claims, what we find", markdown_table(study_claim_table(report))]
    parts += ["## How to read the intervals", STATISTICS, RULE]
    for before, table in _tables(report):
        notes = "\n".join(f"- *{name}*: {what}" for name, what in table.notes)
        parts += [f"## {table.title}", *([before] if before else []), markdown_table(table), notes]
    parts += [f"![{name}](plots/{name}.png)" for name in figures]
    parts += ["## How it was made", _provenance(report, lambda word: f"`{word}`")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _page(report: dict[str, Any], figures: dict[str, bytes], atlas: Atlas | None) -> str:
    palette = colors(report)
    captions = CAPTIONS | {
        curve_file(title): f"Along {title}; bands are 95 % intervals over training seeds and captions."
        for title in report["curves"]
    }

    def figure(name: str) -> str:
        return html_figure(name, figures, captions)

    body = [
        f"<h1>{escape(TITLE)}</h1>",
        f"<p class=soft>{escape(_head(report))}</p>",
        f"<ul class=findings>{''.join(f'<li>{escape(sentence)}</li>' for sentence in study_summary(report))}</ul>",
        f"<p class=soft>{escape(LIMITS)}</p>",
        html_pictures({"grid": atlas}, GRID_NOTE, side=68) if atlas else "",
        "<h2>What the paper claims, what we find</h2>",
        html_table(study_claim_table(report), palette, "words"),
        "<h2>Every measure at a glance</h2>",
        figure("metrics"),
        f"<details><summary>How to read the intervals</summary><p>{escape(STATISTICS)}</p></details>",
        f"<p class=soft>{escape(RULE)}</p>",
    ]
    for before, table in _tables(report):
        body += [f"<h2>{escape(table.title)}</h2>", f"<p class=soft>{escape(before)}</p>" if before else ""]
        body += [figure("head_to_head")] if table.title.startswith("Head to head") else []
        body += [figure("ablations")] if table.title == "Ablations" else []
        body += [html_table(table, palette), html_notes(table)]
        body += [figure("calibration")] if table.title == "Embeddings" else []
    body += ["<h2>Curves</h2>", *(figure(curve_file(title)) for title in report["curves"])] if report["curves"] else []
    body += ["<h2>How it was made</h2>", f"<p class=soft>{_provenance(report, _code)}</p>"]
    return document(f"{TITLE} ({report['meta']['name']})", body)


def _provenance(report: dict[str, Any], code: Callable[[str], str]) -> str:
    meta = report["meta"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    hashes = ", ".join(f"{name} {code(number)}" for name, number in meta["config_hashes"].items())
    measured = ", ".join(name for name in MEASURES if any(name in row["metrics"] for row in report["priors"].values()))
    return f"{versions}. Training configs by hash: {hashes or 'none'}. Measured: {measured}."


def _code(word: str) -> str:
    return f"<code>{escape(word)}</code>"
