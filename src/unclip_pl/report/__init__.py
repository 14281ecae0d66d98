"""Draw a study's report from its cells: plain data in, files out. No network is asked again."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from unclip_pl.evaluation.sheet import REAL, Sheet, sheet_path
from unclip_pl.files import replacing, write_json, write_text
from unclip_pl.generation.provenance import stage_profiles, stage_seconds, wall_seconds
from unclip_pl.report.claims import claims_table, judge
from unclip_pl.report.compute import compute
from unclip_pl.report.frontier import at_equal, frontier, never_equal
from unclip_pl.report.page import html, markdown
from unclip_pl.report.plots import draw_plots, file_name
from unclip_pl.report.study import CELLS, Key, Study, key_of, read_study, rows_of, study_report, with_baselines
from unclip_pl.report.tables import metric_tables
from unclip_pl.report.tables import summary as sentences

__all__ = ["draw", "log", "show", "summary"]


def draw(folder: Path) -> dict[str, Any]:
    """Draw ``report.json``, ``report.md``, ``report.html`` and ``plots/`` from a folder's cells.

    Args:
        folder: a run or a study, with ``cells/`` and, perhaps, ``best/``, ``stages/`` and ``claims.yaml``.

    Returns:
        The content of ``report.json``.

    Raises:
        MissingFileError: there are no cells.
        InputError: a cell is broken, doubled or of another base.
    """
    paper = claims_table(folder)
    study = with_baselines(read_study(folder, paper["order"], paper["beside"]), paper["baselines"])
    report = study_report(study, paper)
    report["meta"]["name"] = folder.resolve().name
    seconds = wall_seconds(folder) or report["meta"]["measuring_seconds"]
    report["meta"] |= {"stages": stage_seconds(folder), "wall_seconds": seconds}
    report["meta"] |= {"profiles": profiles} if (profiles := stage_profiles(folder)) else {}
    report["frontier"] = frontier(study.arms, rows_of(study.arms))
    report["compute"] = compute(study.arms)
    report["ablations"] += at_equal(study.arms, paper["ablations"])
    report["never_equal"] = never_equal(study.arms, paper["ablations"])
    report["words"] = paper["words"]
    report["claims"] = judge(report, paper["claims"], paper["gate"])
    sheets = _sheets(folder, study, list(report["priors"]))
    report["pictures"] = {name: {"rows": s.rows, "columns": s.columns} for name, s in sheets.items()}
    report = _finite(report)
    figures = draw_plots(report)
    for name, sheet in sheets.items():
        sheet.save(folder / "plots" / f"{name}.png")
    for name, data in figures.items():
        with replacing(folder / "plots" / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    write_json(folder / "report.json", report, indent=1)
    for name, text in (
        ("report.md", markdown(report, figures, sheets)),
        ("report.html", html(report, figures, sheets)),
    ):
        write_text(folder / name, text)
    return report


def summary(folder: Path, report: dict[str, Any]) -> None:
    """Print the first tables and the findings."""
    console = Console()
    console.width = max(console.width, 116)  # numbers with their intervals in one line
    for table in metric_tables(report)[:2]:
        drawn = RichTable(*table.head, title=table.title, title_justify="left", box=None, pad_edge=False)
        for row in table.rows:
            drawn.add_row(*(Text.assemble((c.text, "bold" if c.best else ""), (f" {c.interval}", "dim")) for c in row))
        console.print(drawn, "")
    for sentence in sentences(report):
        console.print(f"· {sentence}", highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)


def show(folder: Path, report: dict[str, Any], loggers: Sequence[Any]) -> None:
    """Show a report in loggers: every row's means, and all pictures. TensorBoard gets what :func:`log` writes.

    Args:
        folder: folder of the run or study that :func:`draw` has drawn.
        report: content of its ``report.json``.
        loggers: Lightning's loggers. One line names those that show no pictures; they get the means.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    from unclip_pl.training.loggers import log_picture, name_the_blind, takes_pictures

    rows = report["priors"].items()
    means = {f"compare/{name}/{measure}": mean for name, row in rows for measure, mean in _means(row).items()}
    if loggers:
        name_the_blind(loggers, "the pictures of a comparison")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            log(folder, report, Path(logger.log_dir))
            continue
        logger.log_metrics(means, step=0)
        for title, picture in _pictures(folder) if takes_pictures(logger) else ():
            log_picture(logger, title, torch.from_numpy(picture).permute(2, 0, 1) / 255, 0)


def _means(row: dict[str, Any]) -> dict[str, float]:
    return {name: value["mean"] for name, value in row["metrics"].items() if value["mean"] is not None}


def _pictures(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield title and pixels (H, W, 3) of every picture and plot of a report."""
    for path in sorted((folder / "plots").glob("[!.]*.png")):
        yield f"compare/{path.stem}", np.array(Image.open(path).convert("RGB"))


def log(folder: Path, report: dict[str, Any], logs: Path) -> None:
    """Write a report for TensorBoard: every row's means with its settings as hparams, curves, pictures and plots.

    Args:
        folder: folder of the run or study that :func:`draw` has drawn.
        report: content of its ``report.json``.
        logs: folder of the events.
    """
    from torch.utils.tensorboard import SummaryWriter

    for name, row in report["priors"].items():
        found = {f"compare/{measure}": mean for measure, mean in _means(row).items()}
        settings = {key: value for key, value in row["sampling"].items() if isinstance(value, bool | int | float | str)}
        with SummaryWriter(str(logs / file_name(name))) as writer:
            writer.add_hparams({"prior": name, "lr": row["lr"] or 0.0, **settings}, found, run_name=".")
    for title, series in report["curves"].items():
        for label, measures in series.items():
            with SummaryWriter(str(logs / "curves" / file_name(f"{title}-{label}"))) as writer:
                for measure, points in measures.items():
                    for point in points:
                        if point["mean"] is not None:
                            # TensorBoard counts steps: guidance and temperature stand there times 100.
                            writer.add_scalar(f"{title}/{measure}", point["mean"], round(100 * point["x"]))
    with SummaryWriter(str(logs / "pictures")) as writer:
        for title, pixels in _pictures(folder):
            writer.add_image(title, pixels, dataformats="HWC")


def _sheets(folder: Path, study: Study, rows: list[str]) -> dict[str, Sheet]:
    """Return captions × arms, joined from the pictures of each arm's first seed, and the pictures of many samples.

    Args:
        folder: folder of the study.
        study: all cells.
        rows: names of the main tables' rows, in order.
    """
    found: dict[Key | str, Tensor] = {}
    captions: list[str] = []
    many: dict[str, Sheet] = {}
    for cell in sorted(study.cells, key=lambda cell: cell["seed"]):
        for name, labels in cell["pictures"].items():
            path = sheet_path(folder / CELLS / cell["file"], name)
            if not path.is_file() or cell["kind"] not in ("prior", "matched", "table"):
                continue
            if name != "grid":
                many[name] = many.get(name) or Sheet.load(path, **labels)
            elif labels["rows"] == (captions or labels["rows"]):
                captions = labels["rows"]
                for column, images in zip(labels["columns"], Sheet.load(path, **labels).images.unbind(1), strict=True):
                    found.setdefault(key_of(cell, column) if column in cell["arms"] else column, images)
    keys: list[Key | str] = [REAL]
    for row in rows:
        own, matched = Key("prior", "", row), Key("matched", "", row)
        keys.append(own if own in found else matched)
    keys += [key for key in study.arms if key.kind == "table"] + [key for key in found if isinstance(key, str)]
    columns = {key if isinstance(key, str) else key.name: found[key] for key in dict.fromkeys(keys) if key in found}
    return (
        {"grid": Sheet(torch.stack(list(columns.values()), dim=1), captions, list(columns))} if columns else {}
    ) | many


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
