"""``unclip runs``: a table of trainings and measurements."""

import csv
import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.generation.provenance import STAGES, stage_records
from unclip_pl.origin import COMMAND
from unclip_pl.report.study import CELLS, metrics, read_cell
from unclip_pl.settings import read_yaml

Row = dict[str, Any]

LOSSES = ("train/loss", "val/loss")
#: Columns that every row has.
COLUMNS = ("run", "part", "steps", *LOSSES, "commit", "command")
#: Scores in the table; --json and --columns have all.
SHOWN = ("stated_match", "clip_score", "embed_fd", "fd_judge")
#: A condition: column, comparison, value.
_CONDITION = re.compile(r"(.+?)(<=|>=|=|<|>)(.*)")
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def runs(
    paths: list[str],
    *,
    sort: str = "run",
    descending: bool = False,
    where: str = "",
    columns: str = "",
    json: bool = False,
) -> None:
    """Show what was trained and measured below some folders: part, steps, last losses, scores, commit and command.

    A row is a folder that a fit or a test logged to, or one arm of a measurement.

    Args:
        paths: folders to look through; without one, the folder runs.
        sort: column to sort by. Rows without a value come last.
        descending: largest first.
        where: conditions that all hold, with commas between them, such as "part=DiffusionPrior,run=ar-*,val/loss<0.2".
        columns: columns to show, with commas between them.
        json: print JSON with all columns.
    """
    folders = [Path(path) for path in paths or ["runs"]]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise MissingFileError(f"No folder at {missing[0]}: name one with runs.")
    rows = [row for folder in folders for row in find_rows(folder)]
    if not rows:
        raise InputError(f"Expected runs below {', '.join(map(str, folders))}. Got none: name another folder.")
    known = list(dict.fromkeys([*COLUMNS[:5], *(name for row in rows for name in row), *COLUMNS[5:]]))
    for condition in filter(None, where.split(",")):
        rows = list(filter(_holds(condition, known), rows))
    _require(sort, known)
    there = sorted((row for row in rows if sort in row), key=lambda row: _order(row[sort]), reverse=descending)
    rows = there + [row for row in rows if sort not in row]
    chosen = [name.strip() for name in columns.split(",") if columns]
    for name in chosen:
        _require(name, known)
    if json:
        print(dumps(rows, indent=1, ensure_ascii=False))
    else:
        scores = [name for name in SHOWN if any(name in row for row in rows)]
        _show(rows, chosen or [*COLUMNS[:5], *scores, *COLUMNS[5:]])


def find_rows(folder: Path) -> Iterator[Row]:
    """Yield a row for every folder of a fit or test below a folder, and for every arm of its measurements."""
    made: dict[Path, dict[str, Any]] = {}  # what stages wrote → their records
    for stages in sorted(folder.rglob(STAGES)):
        root = str(stages.parent)
        for record in stage_records(stages.parent).values():
            made[Path(record["out"].replace("{run}", root).replace("{results}", root))] = record
    told = Console(stderr=True)
    for path in track(
        sorted(folder.rglob("config.yaml")), "Reading logs", transient=True, console=told, disable=not told.is_terminal
    ):
        content = read_yaml(path)
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, dict) and isinstance(model.get("class_path"), str):
            part = model["class_path"].rpartition(".")[2].removesuffix("Task")
            yield _row(folder, path.parent, part, made) | _logged(path.parent)
    for path in sorted(folder.rglob(f"{CELLS}/[!.]*.json")):
        for name, arm in read_cell(path)["arms"].items():
            means = {measure: value.mean for measure, value in metrics({0: arm}).items() if value.mean is not None}
            yield _row(folder, path, name, made) | {"steps": arm["training_steps"]} | means


def _row(folder: Path, path: Path, part: str, made: dict[Path, dict[str, Any]]) -> Row:
    row: Row = {"run": path.relative_to(folder).as_posix(), "part": part}
    if record := made.get(path):
        row |= {"commit": ", ".join(record["commits"]), "command": f"unclip {record['command']}"}
    elif (noted := path / COMMAND).is_file():
        row |= loads(noted.read_text(encoding="utf-8"))
    return row


def _logged(folder: Path) -> Row:
    """Return the last value of every number that a run logged, and the step at which it stands."""
    last: dict[str, Any] = {}
    step = -1
    if (table := folder / "metrics.csv").is_file():
        with table.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                last |= {name: float(value) for name, value in line.items() if value}
        step = int(last.pop("step", -1))
    elif any(folder.glob("events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        few = dict.fromkeys(("scalars", "images", "histograms", "tensors", "compressedHistograms", "audio"), 1)
        events = EventAccumulator(str(folder), size_guidance=few)
        events.Reload()
        for name in events.Tags()["scalars"]:
            event = events.Scalars(name)[-1]
            last[name], step = event.value, max(step, event.step)
    last = {
        name.removeprefix("test/"): value if math.isfinite(value) else str(value)
        for name, value in last.items()
        if name not in ("epoch", "hp_metric")
    }
    checkpoint = folder / "checkpoints" / "last.ckpt"
    with suppress(Exception):  # of many types where it is missing or damaged: then the log's step stands
        step = int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    return last | ({"steps": step} if step >= 0 else {})


def _require(column: str, known: list[str]) -> None:
    if column not in known:
        near = get_close_matches(column, known, 3, 0.4)
        raise InputError(f"Expected a column of the table. Got {column!r}: name {' or '.join(near or known[:5])}.")


def _holds(condition: str, known: list[str]) -> Callable[[Row], bool]:
    """Return the test that a condition describes; a row without the column fails it."""
    if not (match := _CONDITION.fullmatch(condition)):
        raise InputError(f"Expected a condition such as part=DiffusionPrior. Got {condition!r}: write COLUMN=PATTERN.")
    column, sign, value = match[1].strip(), match[2], match[3]
    _require(column, known)
    if sign == "=":
        return lambda row: column in row and fnmatch(str(row[column]), value.strip())
    try:
        bound = float(value)
    except ValueError:
        raise InputError(f"Expected a number after {sign}. Got {value!r} in {condition!r}: write a number.") from None
    return lambda row: isinstance(row.get(column), int | float) and _COMPARISONS[sign](row[column], bound)


def _order(value: Any) -> tuple[bool, Any]:
    """Return a key to sort by: numbers, the parts of texts that are numbers, then texts."""
    if isinstance(value, int | float):
        return False, value
    return True, [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", value)]


def _show(rows: list[Row], columns: list[str]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a line for each row, for grep
    table = Table(box=None, pad_edge=False)
    for name in columns:
        number = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(_text(row.get(name))) for name in columns))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else value
