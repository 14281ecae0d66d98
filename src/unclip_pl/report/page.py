"""``report.html``: one file that needs no other, to read on a screen or on paper."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from unclip_pl.report.plots import DPI, colors
from unclip_pl.report.tables import (
    Cell,
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

if TYPE_CHECKING:
    from unclip_pl.report.report import Atlas

STYLE = """
:root { --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --wash: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; letter-spacing: -.005em; }
p, li { max-width: 48rem; } p { margin: .4rem 0 .8rem; }
.soft, figcaption, dd { color: var(--soft); } .soft { font-size: .9rem; }
ul.findings { padding-left: 1.1rem; margin: 1.2rem 0; } ul.findings li { margin: .35rem 0; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; font-size: .82rem; color: var(--soft); vertical-align: bottom; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 1.5px solid var(--ink); }
td { text-align: right; vertical-align: top; } th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
td small { display: block; color: var(--soft); font-size: .74rem; font-weight: 400; white-space: nowrap; }
td b { font-weight: 700; }
.words td, .words th { text-align: left; } .words td { font-size: .9rem; } .words td small { white-space: normal; }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .45em; }
.tag { display: inline-block; padding: .05rem .5rem; border-radius: 1rem; font-size: .78rem; white-space: nowrap;
  background: var(--wash); color: var(--soft); border: 1px solid var(--line); }
.tag.agrees, .tag.holds { background: #e6f4ec; color: #116329; border-color: #b7dfc6; }
.tag.disagrees, .tag.does-not-hold { background: #fdecea; color: #a40e26; border-color: #f3c4be; }
.scroll { overflow-x: auto; }
.grid td, .grid th { border: 0; padding: 2px; text-align: center; vertical-align: middle; }
.grid th { padding-bottom: .35rem; max-width: calc(var(--cell) + .5rem); }
.grid td:first-child { text-align: left; padding-right: .9rem; font-size: .86rem;
  line-height: 1.3; max-width: 15rem; } .grid td img { display: block; width: var(--cell); height: var(--cell);
  image-rendering: pixelated; border-radius: 3px; }
.grid tr.first td { padding-top: .9rem; } .grid .caption { font-size: .9rem; font-style: italic; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; max-width: 44rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .pair figure { flex: 1 1 20rem; max-width: 30rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; max-width: 56rem;
  margin: .6rem 0; }
dt { font-weight: 600; } dd { margin: 0; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); } code { font-size: .85em; }
@media (max-width: 40rem) { body { padding: 1.2rem .8rem 3rem; font-size: 14px; } h1 { font-size: 1.5rem; }
  th, td { padding: .32rem .45rem; } .scroll { margin: 0 -.8rem; padding: 0 .8rem; } dl { display: block; }
  dd { margin-bottom: .5rem; }
  .words, .words tbody, .words tr, .words td { display: block; } .words thead { display: none; }
  .words tr { border-bottom: 1.5px solid var(--line); padding: .6rem 0; }
  .words td { border: 0; padding: .12rem .2rem; }
  .words td:first-child { font-weight: 600; } .words td[data-head]::before { content: attr(data-head) ": ";
  color: var(--soft); font-size: .82rem; } }
@media print { body { padding: 0; max-width: none; font-size: 10.5pt; } h2 { break-after: avoid; }
  tr, figure { break-inside: avoid; } .tag, .dot, td { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

CAPTIONS = {
    "metrics": "Dots are means, bars 95 % intervals over captions, the ceiling is hollow. ↑ more is better, ↓ less is.",
    "head_to_head": "The same caption, the same decoder noise: which prior's image scores better? Ties count half.",
    "calibration": "A prior that samples from the true distribution lies on the dashed line. Above it samples are "
    "too spread; below it they are too much alike. A regression onto the mean sits far right: a high cosine, "
    "and no choice.",
    "cost": "Time for one embedding against how far the embeddings are from the true ones, both on log scales. Down "
    "and left is better.",
    "attributes": "What the oracle reads from real images, what CLIP can tell, and what is left after image → "
    "embedding → image. No prior can do better than the decoder lets it.",
    "stages": "Where the time went.",
}


def page(report: dict[str, Any], figures: dict[str, bytes], atlases: dict[str, "Atlas"], interval_note: str) -> str:
    """The whole document.

    Args:
        report: of a comparison.
        figures: PNG by name.
        atlases: pictures by name.
        interval_note: how to read the intervals.
    """
    meta, palette = report["meta"], colors(report)
    body = [
        "<h1>Priors, compared</h1>",
        f"<p class=soft>{escape(sample_sizes(report))} · {meta['wall_seconds'] / 60:.1f} minutes on "
        f"{escape(meta['hardware'])} · commit {escape(meta['commit'])}</p>",
        f"<ul class=findings>{''.join(f'<li>{escape(sentence)}</li>' for sentence in summary(report))}</ul>",
        html_pictures(atlases),
        "<h2>What is claimed, what we find</h2>",
        html_figure("head_to_head", figures),
        html_table(claim_table(report), palette, "words"),
        "<h2>Every measure at a glance</h2>",
        html_figure("metrics", figures),
        f"<p class=soft>{escape(interval_note)}</p>",
    ]
    for table in metric_tables(report):
        body += [f"<h2>{escape(table.title)}</h2>", html_table(table, palette), html_notes(table)]
        if table.title == "Diversity" and "many" in atlases:
            body.append(_many(atlases["many"]))
    body.append(f"<div class=pair>{html_figure('calibration', figures)}{html_figure('cost', figures)}</div>")
    costs, attributes = cost_table(report), attribute_table(report)
    body += [f"<h2>{costs.title}</h2>", html_table(costs, palette), html_notes(costs), "<h2>What it stands on</h2>"]
    body.append(html_figure("attributes", figures))
    body += [html_table(table, palette) for table in (attributes, foundation_table(report)) if table is not None]
    body += ["<h2>How it was made</h2>", html_figure("stages", figures), _settings(meta)]
    return document("Priors, compared", body)


def document(title: str, body: list[str]) -> str:
    """A page of these parts that needs no other file."""
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"


def html_table(table: Table, palette: dict[str, str], kind: str = "") -> str:
    """A table that scrolls by itself on a narrow screen."""
    head = "".join(f"<th>{escape(word)}</th>" for word in table.head)
    # On a phone the words of a row stand below each other, and each says what column it is of.
    names = ["", *table.head[1:]] if kind == "words" else [""] * len(table.head)
    cells = [[_cell(cell, palette, name) for cell, name in zip(row, names, strict=True)] for row in table.rows]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<div class=scroll><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cell(cell: Cell, palette: dict[str, str], head: str) -> str:
    text, head = escape(cell.text), f" data-head='{escape(head)}'" if head else ""
    if cell.tone:
        return f"<td{head}><span class='tag {cell.tone}'>{text}</span></td>"
    if cell.best:
        text = f"<b>{text}</b>"
    if cell.text in palette:
        text = f"<span class=dot style='background:{palette[cell.text]}'></span>{text}"
    return f"<td{head}>{text}{f'<small>{escape(cell.interval)}</small>' if cell.interval else ''}</td>"


def html_notes(table: Table) -> str:
    """What its columns mean."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(what)}</dd>' for name, what in table.notes)}</dl>"


def html_figure(name: str, figures: dict[str, bytes], captions: dict[str, str] = CAPTIONS) -> str:
    """A picture inside the page, with its caption; nothing where there is none."""
    if name not in figures:
        return ""
    width = round(Image.open(io.BytesIO(figures[name])).width * 96 / DPI)  # 96 CSS pixels are an inch
    source = base64.b64encode(figures[name]).decode()
    return (
        f"<figure><img width={width} alt='{name}' src='data:image/png;base64,{source}'>"
        f"<figcaption>{escape(captions[name])}</figcaption></figure>"
    )


GRID_NOTE = (
    "Each row starts from the same noise. Left to right: the true image, one image for each prior, and what the "
    "decoder makes of the true embedding when it sees no caption."
)


def html_pictures(atlases: dict[str, "Atlas"], note: str = GRID_NOTE, side: int = 88) -> str:
    """One row per caption, one column per prior."""
    if "grid" not in atlases:
        return ""
    atlas = atlases["grid"]
    head = "".join(f"<th>{escape(column)}</th>" for column in atlas.columns)
    rows = "".join(
        f"<tr><td>{escape(caption)}</td>{html_images(row)}</tr>"
        for caption, row in zip(atlas.rows, atlas.images, strict=True)
    )
    return (
        f"<div class=scroll><table class=grid style='--cell:{side}px'><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p class=soft>{escape(note)}</p>"
    )


def _many(atlas: "Atlas") -> str:
    """Rows come as ``prior: caption``, grouped by caption."""
    rows, last = [], ""
    for label, images in zip(atlas.rows, atlas.images, strict=True):
        prior, _, caption = label.partition(": ")
        if caption != last:
            rows.append(f"<tr class=first><td class=caption colspan={len(images) + 1}>{escape(caption)}</td></tr>")
            last = caption
        rows.append(f"<tr><td>{escape(prior)}</td>{html_images(images)}</tr>")
    return f"<div class=scroll><table class=grid style='--cell:46px'><tbody>{''.join(rows)}</tbody></table></div>"


def html_images(row: Any) -> str:
    """Cells of a row of pictures (C, 3, H, H)."""
    cells = []
    for image in row:
        pixels = (image.add(1).mul(127.5)).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        cells.append(
            f"<td><img alt='' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'></td>"
        )
    return "".join(cells)


def _settings(meta: dict[str, Any]) -> str:
    lines = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(value)}</td></tr>"
        for key, value in lines_of(meta["config"])
    )
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    return (
        f"<p class=soft>{escape(versions)}</p><details><summary>Every setting of the comparison</summary>"
        f"<table class=words>{lines}</table></details>"
    )
