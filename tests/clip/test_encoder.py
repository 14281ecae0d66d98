"""CLIP's weights: where they come from, and what is said where they cannot."""

import argparse
import pickle
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unclip_pl.cli import main
from unclip_pl.clip.encoder import ClipEncoder, ClipSpec, build_clip
from unclip_pl.errors import InputError
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


def test_random_weights_are_the_same_every_time() -> None:
    """A fit builds its CLIP more than once, and draws other numbers after it as it did when each was another one."""
    torch.manual_seed(5)
    one = ClipSpec("tiny-rn").load()
    after = torch.get_rng_state()
    assert ClipSpec("tiny-rn").load().fingerprint == one.fingerprint
    torch.manual_seed(5)
    build_clip("tiny-rn")
    assert torch.get_rng_state().equal(after)


@pytest.mark.parametrize("other", ["tiny-judge", "tiny-rn-24"])
def test_weights_of_another_shape_are_one_line(other: str, tmp_path: Path) -> None:
    torch.save(build_clip(other).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        InputError, match=r"other.pt does not fit the CLIP tiny-rn .*of another shape: .*clip.name"
    ) as error:
        build_clip("tiny-rn", str(tmp_path / "other.pt"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def saved_by_others(kind: str, state: dict[str, torch.Tensor], path: Path) -> None:
    if kind == "TorchScript":
        model = build_clip("tiny-rn").eval()
        model.load_state_dict(state)
        example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.long))
        torch.jit.save(torch.jit.trace(model, example, check_trace=False, strict=False), path)
        return
    content = {
        "NumPy": {"epoch": np.float64(3), "best": np.int64(2), "random": np.random.get_state(), "state_dict": state},
        "compiled": {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}},
        "compiled in parts": {"model": {name.replace("visual.", "visual._orig_mod."): v for name, v in state.items()}},
        "DataParallel": {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        "OpenAI": state | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16)},
        "old format": state,
        "safetensors of another name": state,
    }[kind]
    if kind.startswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old format")


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "kind",
    [
        *("TorchScript", "NumPy", "compiled", "compiled in parts", "DataParallel", "OpenAI", "old format"),
        "safetensors of another name",
    ],
)
def test_weights_as_others_write_them(kind: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    saved_by_others(kind, weights, tmp_path / "clip.pt")
    found = build_clip("tiny-rn", str(tmp_path / "clip.pt")).state_dict()
    assert found.keys() == weights.keys()
    assert all(found[name].equal(value) for name, value in weights.items())


def test_what_cannot_be_read_as_plain_tensors_is_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": weights}, path)
    with pytest.raises(InputError, match=r"holds a argparse\.Namespace.*weights_only=False"):
        build_clip("tiny-rn", str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n")
    with pytest.raises(InputError, match=r"pointer of git-lfs: run `git lfs pull`"):
        build_clip("tiny-rn", str(path))
    for content in ([1, 2], {"epoch": 3}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"clip.pt holds no plain CLIP weights .*by name"):
            build_clip("tiny-rn", str(path))


def test_code_in_a_torchscript_archive_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        archive.writestr("clip/constants.pkl", b"")
        archive.writestr("clip/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(InputError, match="no plain CLIP weights"):
        build_clip("tiny-rn", str(tmp_path / "clip.pt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("config", ["{}", "[]", "?", '{"model_cfg": {"embed_dim": 3}}'])
def test_a_local_folder_that_holds_no_clip(config: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(InputError, match=r"correct (it|the folder)"):
        build_clip(f"local-dir:{tmp_path}")
