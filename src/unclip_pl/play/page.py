"""Lay out the page. Gradio is imported here alone, and gets a run's pictures as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from unclip_pl.errors import InputError
from unclip_pl.play.drawing import Frame, Playground
from unclip_pl.play.examples import Examples
from unclip_pl.play.sheet import CSS, line, show

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
}
#: A stopped drawing has no bar.
STOPPED = "() => document.querySelectorAll('.play-bar').forEach(bar => { bar.textContent = 'stopped'; })"


def page(playground: Playground, examples: Examples) -> gr.Blocks:
    """Return the page.

    Args:
        playground: answers of a run.
        examples: what there is to click.
    """
    with gr.Blocks(title="unclip play", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>unclip play</h1><p>Drawn here, on this machine, with {playground.unclip.origin.text}.</p>")
        with gr.Tab("Draw"):
            _draw(playground, examples)
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
                0,
                16,
                0,
                step=1,
                label="Keep the best of N embeddings",
                info="where a prior draws several; 0: as the run does",
            )
            seed = gr.Number(0, label="Seed", precision=0)
            go, stop = _buttons("Draw")
            clicked = gr.Examples(
                [[text] for text in examples.captions], [caption], label="Captions to click", **HIDDEN
            )
        with gr.Column(scale=2, min_width=280):
            result = gr.HTML(f"<p>{HELP['draw']}</p>")
    inputs = [caption, seed, guidance, num, candidates]
    _answer(playground.draw, [go.click, caption.submit, clicked.load_input_event.then], stop, inputs, result)


def _buttons(what: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(what, variant="primary", min_width=120), gr.Button("Stop", min_width=80)


def _answer(
    draw: Callable[..., Iterator[Frame]],
    events: Sequence[Callable[..., Any]],
    stop: gr.Button,
    inputs: Sequence[Any],
    result: gr.HTML,
) -> None:
    """Let events draw, and a button stop them."""
    started = [event(_pages(draw), inputs, result, **DRAWING) for event in events]
    stop.click(None, cancels=started, js=STOPPED)


def _pages(draw: Callable[..., Iterator[Frame]]) -> Callable[..., Iterator[str]]:
    def pages(*values: Any) -> Iterator[str]:
        try:
            for frame in draw(*values):
                yield show(frame)
        except EXPECTED as error:
            yield line(" ".join(str(error).split()))

    return pages
