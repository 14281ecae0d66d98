"""Lay out the page. Gradio is imported here alone, and gets a run's pictures as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from PIL.Image import Resampling

from unclip_pl.errors import InputError
from unclip_pl.generation.pictures import to_image
from unclip_pl.play.drawing import ANGLES, STRIP, Frame, Map, Playground, Stopped, painted
from unclip_pl.play.examples import Examples
from unclip_pl.play.known import report_of
from unclip_pl.play.sheet import CHOOSE, CSS, line, page_in_page, scatter, show

try:
    import gradio as gr
except ModuleNotFoundError:  # every module can be imported without an extra
    gr = None

#: Mistakes that a visitor can mend: they become one line.
EXPECTED = (InputError, OSError)
#: No endpoint for programs: scripts have the commands and Python.
HIDDEN: dict[str, Any] = {"api_visibility": "private"}
#: One thing is drawn at a time; the others wait their turn.
DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, **HIDDEN}
#: What stands where pictures will be.
HELP = {
    "draw": "Every prior of the run draws your caption from the same noise. The number under a picture says how well "
    "it fits the caption in the eyes of the run's own CLIP; ★ marks the best of a prior.",
    "vary": "A picture is split into what CLIP sees of it and the noise that holds the rest. Variations keep the first "
    "and draw the second again: at η = 0 nothing changes, at η = 1 nothing of the noise is left.",
    "between": "The embedding turns from the first to the second. Between captions the noise stays the same; between "
    "pictures it turns, too, so that both ends are the pictures. Move the slider along the strip.",
    "edit": "The picture's embedding turns by θ towards the difference of two captions, and its noise stays. At θ = 0 "
    "it is the picture; around 0.4 it obeys; far beyond it comes apart. Move the slider along the strip.",
    "inpaint": "Give a picture and paint over a part of it. That part is drawn again, after a caption of the whole "
    "picture or after what CLIP sees of it; the rest stays to the pixel.",
    "look": "The picture is drawn from the first 1, 2, 4, … principal dimensions of its embedding, all from one noise: "
    "what comes first is what CLIP holds to be most important.",
    "report": "This run has no report.html: `unclip report` draws one of what was measured. Here is its model card.",
}
#: Side of the picture to paint on, in pixels.
CANVAS = 320
#: A stopped drawing has no bar. A last update may still be on its way when the button is pressed, so it is said again.
STOPPED = """() => [0, 300, 1000].forEach(wait => setTimeout(() =>
    document.querySelectorAll('.play-bar').forEach(bar => { bar.textContent = 'stopped'; }), wait))"""


def page(playground: Playground, examples: Examples) -> gr.Blocks:
    """Return the page.

    Args:
        playground: answers of a run.
        examples: what there is to click.
    """
    with gr.Blocks(title="unclip play", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>unclip play</h1><p>Drawn here, on this machine, with {playground.unclip.origin.text}.</p>")
        for name, tab in TABS.items():
            with gr.Tab(name):
                tab(playground, examples)
    return blocks


def require_gradio() -> None:
    """Refuse to make a page without Gradio.

    Raises:
        InputError: the extra is not installed.
    """
    if gr is None:
        raise InputError(
            "Expected Gradio, which serves the page. Got no such package: run `pip install 'unclip_pl[play]'`."
        )


def launch(blocks: gr.Blocks, port: int, **settings: Any) -> None:
    """Serve the page on this machine alone.

    Args:
        blocks: the page.
        port: port of 127.0.0.1, which is free.
        settings: further arguments of Gradio's ``launch``.
    """
    blocks.queue(max_size=16).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        quiet=True,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        **settings,
    )


def _draw(playground: Playground, examples: Examples) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            caption = gr.Textbox(examples.captions[0], label="Caption", lines=2)
            num = gr.Slider(1, 8, 2, step=1, label="Pictures of each prior")
            guidance = gr.Slider(0, 6, playground.unclip.decoder.spec.guidance, step=0.25, label="Guidance (1 is off)")
            candidates = gr.Slider(
                0, 16, 0, step=1, label="Keep the best of N embeddings", info="0: as many as the run draws"
            )
            seed = _seed()
            go, stop = _buttons("Draw")
            clicked = _examples([[text] for text in examples.captions], [caption])
        with gr.Column(scale=2, min_width=280):
            result = _result("draw")
    inputs = [caption, seed, guidance, num, candidates]
    _answer(playground.draw, [go.click, caption.submit, *clicked], stop, inputs, result)


def _vary(playground: Playground, examples: Examples) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("Picture")
            eta = gr.Slider(0, 1, 0.5, step=0.05, label="η: how much may change")
            num = gr.Slider(1, 16, 8, step=1, label="Variations")
            seed = _seed()
            go, stop = _buttons("Vary")
            clicked = _examples([[path] for path in examples.pictures], [picture])
        with gr.Column(scale=2, min_width=280):
            result = _result("vary")
    _answer(playground.vary, [go.click, *clicked], stop, [picture, eta, num, seed], result)


def _between(playground: Playground, examples: Examples) -> None:
    told, files = examples.captions, examples.pictures
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            at = gr.Slider(0, 1, 0.5, step=1 / (STRIP - 1), label="From the first to the second")
            seed = _seed()
            with gr.Tab("Two captions"):
                texts = [gr.Textbox(told[0], label="First caption"), gr.Textbox(told[1], label="Second caption")]
                draw, halt = _buttons("Mix")
                worded = _examples([list(pair) for pair in pairwise(told)], texts)
            with gr.Tab("Two pictures"):
                with gr.Row():
                    ends = [_upload("First picture", 180), _upload("Second picture", 180)]
                go, stop = _buttons("Mix")
                pictured = _examples([list(pair) for pair in pairwise(files)], ends)
        with gr.Column(scale=2, min_width=280):
            result = _result("between")
    _answer(playground.between_captions, [draw.click, *worded], halt, [*texts, seed, at], result)
    _answer(playground.between_pictures, [go.click, *pictured], stop, [*ends, at], result)
    at.input(None, at, None, js=CHOOSE.replace("NAME", "between"))


def _edit(playground: Playground, examples: Examples) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("Picture")
            current = gr.Textbox(label="It shows", placeholder="may stay empty")
            caption = gr.Textbox(label="It should show")
            theta = gr.Slider(0, 1, 0.375, step=1 / (ANGLES - 1), label="θ: how far it turns")
            go, stop = _buttons("Edit")
            clicked = _examples([list(diff) for diff in examples.diffs], [picture, current, caption])
        with gr.Column(scale=2, min_width=280):
            result = _result("edit")
    _answer(playground.edit, [go.click, caption.submit, *clicked], stop, [picture, current, caption, theta], result)
    theta.input(None, theta, None, js=CHOOSE.replace("NAME", "edit"))


def _inpaint(playground: Playground, examples: Examples) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("Picture", 180)
            brush = gr.ImageEditor(
                label="Paint over a part",
                type="numpy",
                height=400,
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(24, colors=["#ffffff"], color_mode="fixed"),
                buttons=[],
            )
            with gr.Accordion("A mask from a file, beside what is painted", open=False):
                mask = _upload("Mask: white is drawn again", 140)
            caption = gr.Textbox(label="What the whole picture should show", placeholder="empty: what it shows now")
            num = gr.Slider(1, 8, 4, step=1, label="Drawings")
            jumps = gr.Slider(0, 5, 0, step=1, label="Jumps: each step once more, for a better fit (slower)")
            seed = _seed()
            go, stop = _buttons("Inpaint")
            clicked = _examples([list(part) for part in examples.parts], [picture, mask, caption])
        with gr.Column(scale=2, min_width=280):
            result = _result("inpaint")
    picture.change(partial(_canvas, playground), picture, brush, queue=False, **HIDDEN)

    def inpaint(picture: str, editor: Any, *values: Any) -> Iterator[Frame]:
        return playground.inpaint(picture, painted(editor), *values)

    _answer(inpaint, [go.click, *clicked], stop, [picture, brush, mask, caption, num, jumps, seed], result)


def _canvas(playground: Playground, picture: str | None) -> dict[str, Any] | None:
    """Return for the editor what the run sees of a picture; nothing for what is no picture, which drawing reports."""
    try:
        image = to_image(playground.given(picture).cells[0].picture)
    except EXPECTED:
        return None
    return {"background": image.resize((CANVAS, CANVAS), Resampling.NEAREST), "layers": [], "composite": None}


def _look(playground: Playground, examples: Examples) -> None:
    d = playground.unclip.clip.embed_dim
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = _upload("Picture")
            dims = gr.Slider(1, d, min(8, d), step=1, label=f"Dimensions kept, of {d}")
            go, stop = _buttons("Look")
            clicked = _examples([[path] for path in examples.pictures], [picture])
        with gr.Column(scale=2, min_width=280):
            result = _result("look")
            map = gr.HTML()
    _answer(playground.look, [go.click, dims.release, *clicked], stop, [picture, dims], result)
    _answer(playground.place, [go.click, *clicked], stop, [picture], map)


def _report(playground: Playground, examples: Examples) -> None:
    html, card = report_of(playground.unclip)
    if html:
        gr.HTML(page_in_page(html))
    else:
        gr.HTML(f"<p>{HELP['report']}</p>")
        gr.Markdown(card)


#: The tabs, from left to right.
TABS: dict[str, Callable[[Playground, Examples], None]] = {
    "Draw": _draw,
    "Vary": _vary,
    "Between": _between,
    "Edit": _edit,
    "Inpaint": _inpaint,
    "Look inside": _look,
    "Report": _report,
}


def _upload(label: str, height: int = 240) -> gr.Image:
    """Return a place for a picture. Its file is opened by us, with our own checks, and not by Gradio."""
    place = gr.Image(label=label, type="filepath", height=height, sources=["upload", "clipboard"], buttons=[])
    place.preprocess = lambda file: file.path if file else None
    return place


def _seed() -> gr.Number:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
    checked = seed.preprocess
    seed.preprocess = lambda value: checked(value or 0)  # an empty field is 0
    return seed


def _result(name: str) -> gr.HTML:
    return gr.HTML(f"<p>{HELP[name]}</p>", elem_id=name)


def _examples(rows: list[list[Any]], inputs: list[Any]) -> list[Callable[..., Any]]:
    """Add examples, and return the event of a click; none where the run has none."""
    return [gr.Examples(rows, inputs, label="Examples to click", **HIDDEN).load_input_event.then] if rows else []


def _buttons(what: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(what, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def _answer(
    draw: Callable[..., Iterator[Frame] | Map],
    events: Sequence[Callable[..., Any]],
    stop: gr.Button,
    inputs: Sequence[Any],
    result: gr.HTML,
) -> None:
    """Let events draw, and a button stop them. On a narrow screen the pictures come into sight."""
    look = "(...values) => { document.getElementById('NAME')?.scrollIntoView({block: 'nearest'}); return values; }"
    js = look.replace("NAME", result.elem_id or "")
    started = [event(_pages(draw), inputs, result, js=js, **DRAWING) for event in events]
    stop.click(None, cancels=started, js=STOPPED, **HIDDEN)


def _pages(draw: Callable[..., Iterator[Frame] | Map]) -> Callable[..., Iterator[str]]:
    def pages(*values: Any) -> Iterator[str]:
        try:
            answer = draw(*values)
            for frame in [answer] if isinstance(answer, Map) else answer:
                yield scatter(frame) if isinstance(frame, Map) else show(frame)
        except Stopped:  # the command ends
            return
        except EXPECTED as error:
            yield line(" ".join(str(error).split()))

    return pages
