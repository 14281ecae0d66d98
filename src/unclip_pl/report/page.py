"""Put a report together: one list of sections, written out as Markdown and as one HTML file that needs no other."""

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from torch import Tensor

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.evaluation.sheet import Sheet
from unclip_pl.generation.pictures import to_image
from unclip_pl.report.claims import UNMEASURED
from unclip_pl.report.plots import DPI, colors, curve_file
from unclip_pl.report.study import MATCHED
from unclip_pl.report.tables import (
    Table,
    ablation_table,
    attribute_table,
    choice_table,
    claim_table,
    cost_table,
    duel_table,
    excess_table,
    foundation_table,
    further_tables,
    lines_of,
    metric_tables,
    profile_table,
    sample_sizes,
    slope_table,
    summary,
)

Report = dict[str, Any]

#: Groups of measures that have figures or pictures beside their table, as measures.yaml names them.
DIVERSITY, EMBEDDINGS = "Diversity", "Embeddings"
#: Sentences that every report prints.
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Points(NamedTuple):
    """Sentences, one below the other; with a summary, folded away."""

    points: list[str]
    summary: str = ""


class Settings(NamedTuple):
    """Names and values, folded away."""

    lines: list[tuple[str, str]]


class Figure(NamedTuple):
    """A plot, by the name of its file."""

    name: str
    caption: str


class Pictures(NamedTuple):
    """A sheet, by its name; the rows of one with groups are labelled ``arm: caption``."""

    name: str
    note: str
    side: int  # of a picture on the page, in CSS pixels
    grouped: bool = False


Block = Text | Points | Settings | Figure | Pictures | Table


class Section(NamedTuple):
    """Blocks under a heading."""

    title: str
    blocks: list[Block]


def sections(report: Report, figures: set[str], sheets: dict[str, Sheet]) -> list[Section]:
    """Return the body of the report in reading order.

    Args:
        report: all numbers.
        figures: names of the plots that there are.
        sheets: pictures by name.
    """
    claims, choices = claim_table(report), choice_table(report)
    terms, cost = _terms(report), cost_table(report)
    found: list[tuple[str, list[Block | None]]] = [
        (
            "",
            [
                _figure("frontier"),
                Pictures("grid", WORDS["grid"], 88 if len(sheets["grid"].columns) < 9 else 66)
                if "grid" in sheets
                else None,
            ],
        ),
        (
            "What is claimed, what we find",
            [claims, Points(WORDS["verdicts"], "How verdicts are reached") if claims else None, _unmeasured(report)],
        ),
        ("Quality for compute", [_figure("compute"), slope_table(report), excess_table(report)]),
        ("Every measure at a glance", [_figure("metrics"), Points(WORDS["statistics"], "How to read the intervals")]),
        ("Head to head", [_figure("head_to_head"), duel_table(report)]),
    ]
    found += [(table.title, _with_figures(table, sheets)) for table in metric_tables(report)]
    found += [(table.title, [table]) for table in further_tables(report)]
    found += [
        ("Ablations", [_figure("ablations"), ablation_table(report)]),
        ("Curves", [_figure(curve_file(title), title) for title in report["curves"]]),
        ("Cost", [Points(terms) if terms and cost else None, cost]),
        ("Chosen on validation data", [Points(WORDS["choices"]) if choices else None, choices]),
        ("What it stands on", [_figure("attributes"), attribute_table(report), foundation_table(report)]),
        (
            "How it was made",
            [
                _figure("stages"),
                profile_table(report),
                Text(_provenance(report)),
                Settings(list(lines_of(report["meta"]["config"]))),
            ],
        ),
    ]
    there = [
        (title, [b for b in blocks if b and (not isinstance(b, Figure) or b.name in figures)])
        for title, blocks in found
    ]
    return [Section(title, blocks) for title, blocks in there if blocks]


def _terms(report: Report) -> list[str]:
    """Return on what terms a study's priors stand beside each other; nothing for a comparison of one training."""
    if report["meta"]["training_seeds"] == 1:
        return []
    terms = WORDS["terms"]
    told = [terms["chosen"]] if report["choices"] else []
    told += [terms["matched"]] if any(name.endswith(MATCHED) for name in report["priors"]) else []
    return told + terms["always"]


def _with_figures(table: Table, sheets: dict[str, Sheet]) -> list[Block | None]:
    """Return the table of a group of measures, and what belongs beside it."""
    if table.title == EMBEDDINGS:
        return [Text(WORDS["cosine"]), table, _figure("calibration"), _figure("cost")]
    many = table.title == DIVERSITY and "many" in sheets
    return [table, Pictures("many", WORDS["many"], 46, grouped=True) if many else None]


def _figure(name: str, curve: str = "") -> Figure:
    return Figure(name, WORDS["captions"]["curve"].format(curve) if curve else WORDS["captions"][name])


def _unmeasured(report: Report) -> Text | None:
    names = [claim["claim"] for claim in report["claims"] if claim["verdict"] == UNMEASURED]
    return Text(f"Not measured here: {'; '.join(names)}.") if names else None


def _head(report: Report) -> str:
    meta = report["meta"]
    minutes = f" {meta['wall_seconds'] / 60:.1f} minutes on" if meta["cells"] == 1 else ""
    return f"{sample_sizes(report)}.{minutes} {'; '.join(meta['hardware'])}. Commit {', '.join(meta['commits'])}."


def _provenance(report: Report) -> str:
    meta = report["meta"]
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    hashes = ", ".join(f"{name} {number}" for name, number in meta["config_hashes"].items())
    rows = [row for table in (report["priors"], *report["tables"].values()) for row in table.values()]
    there = {name for row in rows for name in row["metrics"]}
    there |= {name for lines in report["curves"].values() for points in lines.values() for name in points}
    measured = ", ".join(name for name in MEASURES if name in there)
    return f"{versions}. Base {meta['base']}. Training configs by hash: {hashes or 'none'}. Measured: {measured}."


def title_of(report: Report) -> str:
    """Return the report's title with the name of its folder."""
    return f"{words(report)['title']}: {report['meta']['name']}"


def words(report: Report) -> dict[str, Any]:
    """Return the sentences of a report: the study's own, and else everybody's."""
    return WORDS | report["words"]


# Markdown


def markdown(report: Report, figures: dict[str, bytes], sheets: dict[str, Sheet]) -> str:
    """Return the report for a terminal or a repository; pictures lie in ``plots/``."""
    findings = "\n".join(f"- {sentence}" for sentence in summary(report))
    parts = [f"# {title_of(report)}", words(report)["introduction"], _head(report), findings, words(report)["limits"]]
    for section in sections(report, set(figures), sheets):
        parts += [f"## {section.title}"] if section.title else []
        parts += [_as_markdown(block, sheets) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_markdown(block: Block, sheets: dict[str, Sheet]) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Points):
        points = "\n".join(f"- {point}" for point in block.points)
        return f"*{block.summary}.*\n\n{points}" if block.summary else points
    if isinstance(block, Settings):
        return "\n".join(f"- `{key}`: {value}" for key, value in block.lines)
    if isinstance(block, Figure):
        return f"![{block.name}](plots/{block.name}.png)"
    if isinstance(block, Pictures):
        sheet = sheets[block.name]
        rows = "\n".join(f"{i}. {row}" for i, row in enumerate(sheet.rows, 1))
        return f"![{block.name}](plots/{block.name}.png)\n\nColumns: {', '.join(sheet.columns)}. Rows:\n\n{rows}"
    notes = "\n".join(f"- *{name}*: {what}" for name, what in block.notes)
    return "\n\n".join(part for part in (markdown_table(block), notes) if part)


def markdown_table(table: Table) -> str:
    """Return a table in GitHub's flavour."""
    rows = [[f"**{c.text}** {c.interval}" if c.best else f"{c.text} {c.interval}" for c in row] for row in table.rows]
    lines = [table.head, ["---"] * len(table.head), *rows]
    flat = [[cell.strip().replace("|", "∣").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in flat)


# HTML


def html(report: Report, figures: dict[str, bytes], sheets: dict[str, Sheet]) -> str:
    """Return the report as one HTML document that needs no other file."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    body = [
        {"title": section.title, "blocks": [_as_html(block, figures, sheets) for block in section.blocks]}
        for section in sections(report, set(figures), sheets)
    ]
    return environment.get_template("page.html.jinja").render(
        title=title_of(report),
        introduction=words(report)["introduction"],
        head=f"{_head(report)} {words(report)['limits']}",
        findings=summary(report),
        sections=body,
        palette=colors(report),
    )


def _as_html(block: Block, figures: dict[str, bytes], sheets: dict[str, Sheet]) -> dict[str, Any]:
    """Return what the template needs of a block."""
    kind = {"kind": type(block).__name__}
    if isinstance(block, Table):
        return kind | {"table": block}
    if isinstance(block, Figure):
        width = round(Image.open(io.BytesIO(figures[block.name])).width * 96 / DPI)  # 96 CSS pixels are an inch
        return kind | {"source": _embedded(figures[block.name]), "width": width, "caption": block.caption}
    if isinstance(block, Pictures):
        sheet = sheets[block.name]
        columns = [] if block.grouped else sheet.columns
        return kind | {"rows": _rows(sheet, block.grouped), "columns": columns, "note": block.note, "side": block.side}
    return kind | block._asdict()


def _rows(sheet: Sheet, grouped: bool) -> list[dict[str, Any]]:
    rows, last = [], ""
    for row, images in zip(sheet.rows, sheet.images, strict=True):
        label, _, caption = row.partition(": ") if grouped else (row, "", "")
        rows.append({"label": label, "caption": caption if caption != last else "", "images": list(map(_png, images))})
        last = caption
    return rows


def _png(image: Tensor) -> str:
    """Return a picture (3, H, H) in [-1, 1] as a data URL."""
    buffer = io.BytesIO()
    to_image(image).save(buffer, "PNG")
    return _embedded(buffer.getvalue())


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
