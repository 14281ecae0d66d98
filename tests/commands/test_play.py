"""``unclip play``: what keeps a page from being served is one clear line."""

import socket

import pytest

from unclip_pl.cli import main
from unclip_pl.play import page


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["play", "--port", str(other.getsockname()[1])]) == 1
    said = capsys.readouterr().err
    assert "which is in use: choose another with --port" in said
    assert said.count("\n") == 1


def test_a_page_without_gradio_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "gr", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["play", "--port", str(port)]) == 1
    assert "run `pip install gradio`" in capsys.readouterr().err
