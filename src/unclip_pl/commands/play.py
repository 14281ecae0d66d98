"""``unclip play``: a page to play with."""

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse.typing import PositiveInt

from unclip_pl.errors import InputError


def play(run: str | None = None, port: PositiveInt = 7860, device: str = "cpu", *, open: bool = False) -> None:
    """Serve a page on which one can draw, vary, edit and look inside, for this machine alone.

    Args:
        run: folder with run.json, a bundle, or the name of weights in the package (shapes); without it runs/quickstart,
            or else shapes.
        port: port of 127.0.0.1.
        device: device to compute on.
        open: show the page in this machine's browser.
    """
    port = int(port)
    _check_port(port)
    with TemporaryDirectory(prefix="unclip-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads go when the page does
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also before a page says so
        for name in ("no_proxy", "NO_PROXY"):  # Gradio looks at its own page, and a proxy knows nothing of it
            os.environ[name] = f"127.0.0.1,localhost,{os.environ.get(name, '')}"
        from unclip_pl.play import page

        page.require_gradio()
        from unclip_pl.generation.pipeline import Unclip
        from unclip_pl.play.drawing import Playground
        from unclip_pl.play.examples import examples

        playground = Playground(Unclip.load(run, device))
        blocks = page.page(playground, examples(playground.unclip, Path(folder)))
        print(f"http://127.0.0.1:{port}   (Ctrl-C ends)   drawn with {playground.unclip.origin.text}", flush=True)
        try:
            page.launch(blocks, port, inbrowser=open)
        finally:
            playground.easel.close()


def _check_port(port: int) -> None:
    if not 1 <= port <= 65_535:
        raise InputError(f"Expected a port from 1 to 65535. Got {port}: choose another with --port.")
    with socket.socket() as test:
        try:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"Expected a free port of 127.0.0.1. Got {port} ({error.strerror}): choose another with --port."
            ) from error
