"""Write frames as HTML: pictures as data in the page itself, enlarged without blur, every text escaped."""

import base64
import io
from html import escape

from unclip_pl.generation.pictures import to_image
from unclip_pl.play.drawing import Cell, Frame, Row

#: How the pictures stand on the page. Names begin with "play", so that they meet none of Gradio's.
CSS = """
.play-rows { display: grid; gap: 20px 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.play-rows:has(> :only-child) { grid-template-columns: 1fr; }
.play-row h3 { margin: 0; font-size: 1rem; }
.play-row p { margin: 0 0 6px; opacity: .75; font-size: .85rem; }
.play-cells { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.play-cells figure { margin: 0; max-width: 224px; }
.play-cells img { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; border-radius: 4px; }
.play-cells figcaption { font-size: .8rem; padding-top: 2px; }
.play-cells .play-best img { outline: 3px solid var(--primary-600, #ea580c); outline-offset: 1px; }
.play-cells .play-best figcaption { font-weight: 600; }
.play-bar { display: block; min-height: 34px; font-size: .9rem; }
.play-bar div { height: 6px; border-radius: 3px; background: var(--border-color-primary, #ddd); margin: 3px 0 10px; }
.play-bar div div { background: var(--primary-500, #f97316); margin: 0; }
.gradio-container .image-frame img, .gradio-container .gallery img { image-rendering: pixelated; }
.play-line { padding: 8px 12px; border-left: 4px solid #b45309; background: rgb(180 83 9 / 12%); margin: 0 0 10px; }
"""


def show(frame: Frame) -> str:
    """Return a frame as HTML."""
    note = line(frame.note) if frame.note else ""
    bar = ""
    if frame.doing:
        share = f"{frame.done:.0%}"
        bar = (
            f'<div class="play-bar" role="status">{escape(frame.doing)} … {share}<div><div style="width:{share}"></div>'
        )
        bar += "</div></div>"
    return f'{note}{bar}<div class="play-rows">{"".join(map(_row, frame.rows))}</div>'


def line(text: str) -> str:
    """Return a line that says what is wrong."""
    return f'<p class="play-line" role="alert">{escape(text)}</p>'


def _row(row: Row) -> str:
    head = f"<h3>{escape(row.title)}</h3>" if row.title else ""
    note = f"<p>{escape(row.note)}</p>" if row.note else ""
    cells = "".join(_cell(cell, row.title) for cell in row.cells)
    return f'<section class="play-row">{head}{note}<div class="play-cells">{cells}</div></section>'


def _cell(cell: Cell, title: str) -> str:
    buffer = io.BytesIO()
    to_image(cell.picture).save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    label, best = escape(cell.label), ' class="play-best"' if cell.best else ""
    caption = f"<figcaption>{label}{' ★' if cell.best else ''}</figcaption>" if label else ""
    return f'<figure{best}><img src="{source}" alt="{escape(f"{title} {cell.label}".strip())}">{caption}</figure>'
