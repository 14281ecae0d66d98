"""A comparison's report on disk: ``report.json`` is the truth, ``.md`` and ``.html`` are drawn from it at any time."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.generation.provenance import stage_seconds
from unclip_pl.report.page import page
from unclip_pl.report.plots import plots
from unclip_pl.report.tables import (
    Table,
    attribute_table,
    claim_table,
    cost_table,
    foundation_table,
    lines_of,
    metric_tables,
    sample_sizes,
    summary,
)

INTERVALS = (
    "Every interval is 95 % over captions: normal approximation for means (seeds of one caption averaged first) and "
    "win rates, {resamples} bootstrap resamples recentred on the estimate for Fréchet distances. One training run "
    "stands behind each prior: what another training seed would change is not in them. Bold: the best prior that sees "
    "the caption alone, and those whose interval reaches its mean."
)


class Atlas(NamedTuple):
    """Pictures in rows and columns."""

    images: Tensor  # (R, C, 3, H, H) in [-1, 1]
    rows: list[str]
    columns: list[str]

    def sheet(self) -> Tensor:
        """(3, R · H, C · H) in [0, 1], cell beside cell."""
        return self.images.clamp(-1, 1).add(1).div(2).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def save(self, path: Path) -> None:
        """As PNG, pixel for pixel."""
        pixels = (255 * self.sheet()).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path)

    @classmethod
    def load(cls, path: Path, rows: list[str], columns: list[str]) -> "Atlas":
        """Cut a saved sheet into its cells."""
        sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        cells = sheet.unflatten(2, (len(columns), -1)).unflatten(1, (len(rows), -1))  # (3, R, H, C, H)
        return cls(cells.permute(1, 3, 0, 2, 4).float().div(127.5).sub(1), rows, columns)


def write_report(folder: Path, report: dict[str, Any], atlases: dict[str, Atlas]) -> dict[str, Any]:
    """Write ``report.json``, then everything drawn from it.

    Args:
        folder: of the run.
        report: plain data; numbers that are not finite become null.
        atlases: ``grid`` (captions × priors) and, where many images of a caption were drawn, ``many``.

    Returns:
        The report as it was written, with the times of the run's stages.
    """
    pictures = folder / "plots"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, atlas in atlases.items():
        atlas.save(pictures / f"{name}.png")
    shown = {name: {"rows": atlas.rows, "columns": atlas.columns} for name, atlas in atlases.items()}
    write_whole(
        folder / "report.json", json.dumps(_finite({**report, "pictures": shown}), indent=1, ensure_ascii=False)
    )
    return render(folder)


def render(folder: Path) -> dict[str, Any]:
    """Draw ``report.md``, ``report.html`` and ``plots/`` from ``report.json``; no network is asked again.

    Stage times are read anew: ``reproduce`` knows the last one only once the comparison is over.

    Returns:
        The report.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise MissingFileError(f"No report at {path}: `unclip test --config configs/compare/…` writes it.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        stages = stage_seconds(folder, sum(report["meta"]["comparison_seconds"].values()))
        report["meta"] |= {"stages": stages, "wall_seconds": sum(stages.values())}
        atlases = {
            name: Atlas.load(folder / "plots" / f"{name}.png", **labels) for name, labels in report["pictures"].items()
        }
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{path} is no report of a comparison ({error!r}): run the comparison again.") from error
    figures = plots(report)
    (folder / "plots").mkdir(exist_ok=True)
    for name, data in figures.items():
        (folder / "plots" / f"{name}.png").write_bytes(data)
    write_whole(path, json.dumps(report, indent=1, ensure_ascii=False))
    write_whole(folder / "report.md", markdown(report, figures))
    write_whole(folder / "report.html", page(report, figures, atlases, interval_note(report)))
    return report


def interval_note(report: dict[str, Any]) -> str:
    """How to read the intervals."""
    return INTERVALS.format(resamples=report["meta"]["config"]["resamples"])


def markdown(report: dict[str, Any], figures: dict[str, bytes]) -> str:
    """The report for a terminal or a repository; pictures lie in ``plots/``."""
    meta = report["meta"]
    parts = [
        "# Priors, compared",
        f"{sample_sizes(report)}. Commit {meta['commit']}.",
        f"{meta['wall_seconds'] / 60:.1f} minutes on {meta['hardware']}.",
        "\n".join(f"- {sentence}" for sentence in summary(report)),
    ]
    if "grid" in report["pictures"]:
        columns = ", ".join(report["pictures"]["grid"]["columns"])
        captions = "\n".join(f"{i}. {caption}" for i, caption in enumerate(report["pictures"]["grid"]["rows"], 1))
        parts += ["## Pictures", f"![grid](plots/grid.png)\n\nColumns: {columns}. Rows:\n\n{captions}"]
    parts += ["## What is claimed, what we find", markdown_table(claim_table(report))]
    if "head_to_head" in figures:
        parts.append("![head to head](plots/head_to_head.png)")
    for table in metric_tables(report):
        notes = "\n".join(f"- *{name}*: {what}" for name, what in table.notes)
        parts += [f"## {table.title}", markdown_table(table), notes]
    parts += [interval_note(report), "![metrics](plots/metrics.png)", "![calibration](plots/calibration.png)"]
    for extra in (cost_table(report), attribute_table(report), foundation_table(report)):
        if extra is not None:
            parts += [f"## {extra.title}", markdown_table(extra)]
    settings = "\n".join(f"- `{key}`: {value}" for key, value in lines_of(meta["config"]))
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    parts += ["## Settings", settings, versions]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """In GitHub's flavour."""
    rows = [[f"**{c.text}** {c.interval}" if c.best else f"{c.text} {c.interval}" for c in row] for row in table.rows]
    lines = [table.head, ["---"] * len(table.head), *rows]
    return "\n".join(f"| {' | '.join(cell.strip().replace('|', '∣') for cell in line)} |" for line in lines)


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """The report's means, for a logger."""
    found = {
        f"compare/{name}/{prior}": value["mean"]
        for prior, entry in report["priors"].items()
        for name, value in entry["metrics"].items()
    }
    found |= {f"decoder/{name}": value for name, value in report["decoder"]["reconstruction"].items()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def print_summary(folder: Path, report: dict[str, Any]) -> None:
    """The first tables and the findings, to the terminal."""
    console = Console()
    console.width = max(console.width, 116)  # numbers with their intervals in one line
    for table in metric_tables(report)[:2]:
        drawn = RichTable(*table.head, title=table.title, title_justify="left", box=None, pad_edge=False)
        for row in table.rows:
            drawn.add_row(*(Text.assemble((c.text, "bold" if c.best else ""), (f" {c.interval}", "dim")) for c in row))
        console.print(drawn, "")
    for sentence in summary(report):
        console.print(f"· {sentence}", highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
