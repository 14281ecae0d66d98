"""CLIP's weights: where they come from, and what is said where they cannot."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from unclip_pl.cli import main
from unclip_pl.clip.encoder import ClipEncoder, ClipSpec, build_clip
from unclip_pl.files import write_checkpoint


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


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in build_clip("tiny-rn").state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    return state


def test_the_fingerprint_is_computed_once(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ClipSpec("tiny-rn", str(tmp_path / "clip.safetensors")).load()
    first = encoder.fingerprint
    monkeypatch.setattr(type(encoder.model), "state_dict", lambda self: pytest.fail("hashed again"))
    assert encoder.fingerprint == first


def test_a_copy_in_half_precision_keeps_the_fingerprint(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A bundle's CLIP fits the embeddings of the CLIP that it was made of."""
    whole = ClipSpec("tiny-rn", str(tmp_path / "clip.safetensors")).load()
    halves = {f"net.{name}": v.half() if v.is_floating_point() else v for name, v in weights.items()}

    def load(name: str, **facts: str) -> ClipEncoder:
        write_checkpoint(tmp_path / name, {"state_dict": halves, **facts})
        return ClipSpec("tiny-rn", str(tmp_path / name)).load()

    assert load("copy.ckpt", fingerprint=whole.fingerprint).fingerprint == whole.fingerprint
    assert load("unknown.safetensors").fingerprint != whole.fingerprint
