"""CLIP's weights: where they come from, and what is said where they cannot."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from unclip_pl.cli import main


def test_a_tag_that_cannot_be_downloaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The CLIP that `unclip import karlo` takes by default, on a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    words = ["precompute", "--source", str(tmp_path / "source"), "--store", str(tmp_path / "store")]
    assert main([*words, "--clip.name", "ViT-L-14-quickgelu", "--clip.pretrained", "openai"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: The weights 'openai' of ViT-L-14-quickgelu are not in the cache")
    assert "clip.pretrained" in said
