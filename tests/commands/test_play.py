"""``unclip play``: what keeps a page from being served is one clear line."""

import socket
import sys
from pathlib import Path

import pytest

from unclip_pl.cli import main
from unclip_pl.play import page


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["play", "--port", str(other.getsockname()[1])]) == 1
    said = capsys.readouterr().err
    assert "Address already in use): choose another with --port" in said
    assert said.count("\n") == 1


def test_a_page_without_gradio_is_one_line(
    port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "gr", None)
    assert main(["play", "--port", str(port)]) == 1
    assert "run `pip install 'unclip_pl[play]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "fragment"),
    [(None, "No run at"), ('{"clip": {"name": "tiny-rn", "pretrained": ""}, "priors": {}}', "decoder")],
)
def test_a_run_that_cannot_draw_is_one_line(
    content: str | None,
    fragment: str,
    port: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if content:
        (tmp_path / "run.json").write_text(content)
    monkeypatch.setattr(page, "gr", sys)  # any module: the run is read before the page is made
    assert main(["play", "--run", str(tmp_path), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert fragment in said
    assert said.count("\n") == 1
