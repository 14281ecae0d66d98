"""A run in one file draws what the run draws, up to half precision, and nothing in it can run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unclip_pl.cli import main
from unclip_pl.files import read_checkpoint
from unclip_pl.generation import run
from unclip_pl.generation.bundle import MEMBERS, exists, inside, read_member, read_provenance
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import BACKGROUNDS, COLORS, SHAPES, SIZES


@pytest.fixture(scope="module")
def bundle(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "mini.safetensors"
    assert main(["bundle", str(mini_run), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def pair(mini_run: Path, bundle: Path) -> tuple[Unclip, Unclip]:
    return Unclip.load(mini_run), Unclip.load(bundle)


@pytest.mark.parametrize("prior", ["diffusion", "ar", "linear", "text"])
def test_it_draws_what_the_run_draws(pair: tuple[Unclip, Unclip], prior: str) -> None:
    captions = ["a large red star on a navy background", "a ring", ""]
    ours, theirs = (unclip.generate(captions, prior=prior, seed=3) for unclip in pair)
    cosine = torch.nn.functional.cosine_similarity(ours.image_embed, theirs.image_embed, dim=-1)
    # A code drawn at the edge of two of the AR prior's buckets may fall on the other side.
    assert cosine.min() > (0.9 if prior == "ar" else 0.9999)
    torch.testing.assert_close(theirs.images, ours.images, rtol=0, atol=0.01)


def test_it_sees_what_the_run_sees(pair: tuple[Unclip, Unclip]) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = (unclip.clip.encode_image(images) for unclip in pair)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2 * float(ours.abs().max()))
    assert pair[0].clip.fingerprint == pair[1].clip.fingerprint
    ours, theirs = (unclip.reconstruct(images, steps=20).psnr for unclip in pair)
    assert theirs.min() > 30


def test_matrices_are_halves_and_vectors_what_they_were(mini_run: Path, bundle: Path) -> None:
    stored = load_file(bundle)
    path = "prior/checkpoints/last.ckpt"
    whole, again = (read_checkpoint(root / path) for root in (mini_run, bundle))
    for name, value in whole["state_dict"].items():
        matrix = name.startswith("net.") and value.ndim > 1
        assert stored[f"{path}:state_dict.{name}"].dtype == (torch.half if matrix else value.dtype), name
        assert torch.equal(again["state_dict"][name], value.half().float() if matrix else value), name
    assert torch.equal(again["posterior_mse"], whole["posterior_mse"])
    assert again["global_step"] == whole["global_step"]
    assert bundle.stat().st_size < 0.6 * 4 * sum(value.numel() for value in stored.values())


def test_words_that_no_caption_has_are_left_out(pair: tuple[Unclip, Unclip], caplog: pytest.LogCaptureFixture) -> None:
    clip = pair[1].clip
    tokens = clip.tokenize(["a shiny red star turquoise!", "a red star"])
    assert torch.equal(tokens[0], tokens[1])
    assert "'shiny', 'turquoise', '!' left out: no caption that this CLIP was trained on" in caplog.text
    caplog.clear()
    both = clip.tokenize(["On the LEFT, a small cyan ring"]), pair[0].clip.tokenize(["On the LEFT, a small cyan ring"])
    known = {int(token) for token in both[0][0]}
    assert known <= {int(token) for token in both[1][0]}


def test_it_names_no_path_of_this_machine(mini_run: Path, bundle: Path) -> None:
    with safe_open(bundle, "pt") as file:
        head = json.dumps(file.metadata())
    assert str(mini_run) not in head
    told = read_provenance(bundle)
    assert told["run"] == mini_run.name
    assert told["commits"]
    assert (
        told["recipe"]["linear"]
        == "unclip linear --source {run}/data --store {run}/store --out {run}/linear.safetensors"
    )


def test_others_may_read_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert bundle.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_members_are_paths(bundle: Path, tmp_path: Path) -> None:
    assert exists(bundle / "linear.safetensors")
    assert not exists(bundle / "judge/checkpoints/last.ckpt")
    assert not exists(tmp_path / "nowhere" / "run.json")
    assert inside(tmp_path) is None
    place = inside(bundle / "judge.ckpt")
    assert place is not None
    with pytest.raises(FileNotFoundError, match=r"holds no judge.ckpt: expected one of run.json, clip/"):
        read_member(place)


def test_without_a_run_the_package_draws(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "DEMO", bundle)
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "a small green ring on a black background", "--num", "1"]) == 0
    said = capsys.readouterr().out
    assert "drawn with the weights in this package: of the run mini, trained at commit" in said
    monkeypatch.setattr(run, "DEMO", tmp_path / "nowhere")
    assert main(["sample", "a small green ring on a black background"]) == 1
    assert "No run at runs/quickstart" in capsys.readouterr().err


def test_what_the_package_draws_is_what_the_caption_says() -> None:
    """Read back by the oracle: 16 pictures, two attributes that training has shown together and three."""
    assert run.DEMO.stat().st_size <= 20e6
    unclip = Unclip.load(run.DEMO)
    drawn = unclip.generate(["a small green ring on a black background", "a large red star"], num=8, seed=0).images
    shape, color, size, _, background = ShapesOracle(32)(drawn).indices.view(2, 8, -1).unbind(-1)
    names = (list(SHAPES), list(COLORS), list(SIZES), list(BACKGROUNDS))
    ring = zip((shape[0], color[0], size[0], background[0]), names, ("ring", "green", "small", "black"), strict=True)
    star = zip((shape[1], color[1], size[1]), names[:3], ("star", "red", "large"), strict=True)
    right = torch.cat([read == known.index(said) for read, known, said in (*ring, *star)])
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("damage", [lambda data: b"no bundle", lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_damaged_bundle_is_one_line(
    damage: Callable[[bytes], bytes], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(bundle.read_bytes()))
    assert main(["sample", "a star", "--run", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"{path} is no bundle of a run, or damaged" in said
    assert said.count("\n") == 1


def test_a_bundle_neither_imports_nor_calls(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(bundle, "pt") as file:
        head = file.metadata()
    members = json.loads(head[MEMBERS])
    members["run.json"]["priors"]["diffusion"] = {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}
    path = tmp_path / "x.safetensors"
    save_file(load_file(bundle), path, head | {MEMBERS: json.dumps(members)})
    assert main(["sample", "a star", "--run", str(path)]) == 1
    assert "names 'subprocess.Popen'" in capsys.readouterr().err


def test_one_run_at_a_time(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(mini_run), str(mini_run)], [str(tmp_path)]):
        assert main(["bundle", *words]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "Expected one run" in said[0]
    assert "Expected one run" in said[1]
    assert "No run at" in said[2]


def test_the_first_bar_does_not_wait_for_torch() -> None:
    code = "import sys, unclip_pl.commands.sample, unclip_pl.commands.edit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
