"""Write frames as HTML: pictures as data in the page itself, enlarged without blur, every text escaped."""

import base64
import io
from html import escape

from unclip_pl.generation.pictures import to_image
from unclip_pl.play.drawing import Frame, Labelled, Map, Row

#: How the pictures stand on the page. Names begin with "play", so that they meet none of Gradio's.
CSS = """
.play-rows, .play-strip { display: grid; gap: 20px 28px; }
.play-beside { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.play-beside:has(> :only-child) { grid-template-columns: 1fr; }
.play-row h3 { margin: 0; font-size: 1rem; }
.play-row p { margin: 0 0 6px; opacity: .75; font-size: .85rem; }
.play-cells { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.play-cells figure { margin: 0; max-width: 224px; }
.play-cells img { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; border-radius: 4px; }
.play-cells figcaption { font-size: .8rem; padding-top: 2px; }
.play-cells .play-best img { outline: 3px solid var(--primary-600, #ea580c); outline-offset: 1px; }
.play-cells .play-best figcaption { font-weight: 600; }
.play-large { margin-bottom: 14px; }
.play-large figure { margin: 0; max-width: 288px; }
.play-large img { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; border-radius: 6px; }
.play-strip .play-cells { grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); }
.play-bar { display: block; min-height: 34px; font-size: .9rem; }
.play-bar div { height: 6px; border-radius: 3px; background: var(--border-color-primary, #ddd); margin: 3px 0 10px; }
.play-bar div div { background: var(--primary-500, #f97316); margin: 0; }
.gradio-container .image-frame img, .gradio-container td img, .gradio-container .gallery img {
  image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.play-map { width: 100%; max-width: 560px; display: block; }
.play-map text { font-size: 11px; fill: currentColor; }
.play-map .play-axis { stroke: currentColor; opacity: .35; }
.play-map .play-own { fill: none; stroke: var(--primary-600, #ea580c); stroke-width: 3; }
.play-report { width: 100%; height: 85vh; border: 1px solid var(--border-color-primary, #ddd); background: white; }
.play-line { padding: 8px 12px; border-left: 4px solid #b45309; background: rgb(180 83 9 / 12%); margin: 0 0 10px; }
"""

#: Let a slider from 0 to 1 choose the picture of a strip that is shown large, without asking the server.
CHOOSE = """(value) => {
  const cells = [...document.querySelectorAll('#NAME .play-strip section:last-child figure')];
  const large = document.querySelector('#NAME .play-large');
  if (cells.length) large.innerHTML = cells[Math.round(value * (cells.length - 1))].outerHTML;
}"""


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
    rows = "".join(map(_row, frame.rows))
    if frame.chosen is None:
        beside = len({len(row.cells) for row in frame.rows}) == 1
        return f'{note}{bar}<div class="play-rows{" play-beside" if beside else ""}">{rows}</div>'
    large = _cell(frame.rows[-1].cells[frame.chosen], frame.rows[-1].title)
    return f'{note}{bar}<div class="play-large">{large}</div><div class="play-strip">{rows}</div>'


def scatter(map: Map) -> str:
    """Return dots on two axes, with a ring around one's own."""
    x, y = zip(*(dot.at for dot in [*map.dots, map.own]), strict=True)
    left, low = min(x), min(y)
    wide = max(max(x) - left, max(y) - low) or 1.0  # without dots, one's own stands in the corner

    def place(at: tuple[float, float]) -> str:
        return f'cx="{20 + 360 * (at[0] - left) / wide:.1f}" cy="{380 - 360 * (at[1] - low) / wide:.1f}"'

    dots = [
        f'<circle {place(dot.at)} r="3" fill="{dot.color}" stroke="gray" stroke-width=".4">'
        f"<title>{escape(dot.told)}</title></circle>"
        for dot in map.dots
    ]
    own = f'<circle class="play-own" {place(map.own.at)} r="8"><title>{escape(map.own.told)}</title></circle>'
    axes = '<path class="play-axis" d="M10 8V390H396" fill="none"/>'
    names = '<text x="396" y="403" text-anchor="end">first axis</text><text x="16" y="14">second axis</text>'
    drawing = f'<svg class="play-map" viewBox="0 0 400 408" role="img">{axes}{names}{"".join(dots)}{own}</svg>'
    return f"{drawing}<p>{escape(map.note)}</p>"


def page_in_page(html: str) -> str:
    """Return another page as a part of this one, in a frame where no script runs."""
    return f'<iframe class="play-report" sandbox="" title="report" srcdoc="{escape(html)}"></iframe>'


def line(text: str) -> str:
    """Return a line that says what is wrong."""
    return f'<p class="play-line" role="alert">{escape(text)}</p>'


def _row(row: Row) -> str:
    head = f"<h3>{escape(row.title)}</h3>" if row.title else ""
    note = f"<p>{escape(row.note)}</p>" if row.note else ""
    cells = "".join(_cell(cell, row.title) for cell in row.cells)
    return f'<section class="play-row">{head}{note}<div class="play-cells">{cells}</div></section>'


def _cell(cell: Labelled, title: str) -> str:
    buffer = io.BytesIO()
    to_image(cell.picture).save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    label, best = escape(cell.label), ' class="play-best"' if cell.best else ""
    caption = f"<figcaption>{label}{' ★' if cell.best else ''}</figcaption>" if label else ""
    return f'<figure{best}><img src="{source}" alt="{escape(f"{title} {cell.label}".strip())}">{caption}</figure>'
