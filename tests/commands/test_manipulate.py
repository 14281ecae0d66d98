"""The commands that take pictures: a grid each that says what it shows, and one clear line for what cannot be."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.cli import main
from unclip_pl.generation.manipulation import Manipulator
from unclip_pl.generation.pictures import CELL, GAP
from unclip_pl.generation.pipeline import Unclip


@pytest.fixture(autouse=True, scope="module")
def run(mini_run: Path) -> Iterator[Unclip]:
    """Read once for all."""
    unclip = Unclip.load(mini_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unclip, "load", lambda *_: unclip)
        yield unclip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGBA", (40, 60), (255, 0, 0, 128)).save(folder / "a.png")
    Image.new("RGB", (32, 32), "navy").save(folder / "b.jpg")
    return [str(folder / name) for name in ("a.png", "b.jpg")]


#: Options, columns, rows, and texts of the PNG.
COMMANDS = {
    "reconstruct": ([], 2, 2, {"steps": "20"}),
    "vary": (["--etas", "[0, 1]", "--num", "2"], 5, 2, {"etas": "(0.0, 1.0)", "seed": "0"}),
    "interpolate": (["--num", "3"], 5, 2, {"pictures": "a.png, b.jpg"}),
    "edit": (["--caption", "a star", "--current", "a ring", "--thetas", "[0.25]"], 2, 2, {"caption": "a star"}),
    "probe": (["--dims", "[1, 64]"], 3, 2, {"dims": "[1, 64]"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_leaves_a_grid(
    command: str, mini_run: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, columns, rows, facts = COMMANDS[command]
    out = tmp_path / "out.png"
    words = [command, *pictures, "--run", str(mini_run), "--steps", "20", "--out", str(out), *options]
    assert main(words) == 0
    image = Image.open(out)
    assert image.width == columns * (CELL + GAP) + GAP
    assert image.height > rows * CELL
    assert image.text.items() >= (facts | {"run": mini_run.name}).items()
    assert image.text["commit"]
    said = capsys.readouterr().out
    assert (
        "a.png: 40 × 60: RGBA to RGB, transparency over white, cut to its central square of 40, resized to 32" in said
    )
    assert f"wrote {out}" in said


def test_a_reconstruction_is_the_picture(mini_run: Path, pictures: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["reconstruct", pictures[1], "--run", str(mini_run), "--out", str(out)]) == 0
    cells = np.asarray(Image.open(out)).astype(int)[-CELL - GAP : -GAP]
    given, again = (cells[:, GAP + i * (CELL + GAP) :][:, :CELL] for i in range(2))
    assert np.abs(given - again).max() <= 2


def test_between_captions_the_ends_are_their_samples(mini_run: Path, tmp_path: Path, run: Unclip) -> None:
    captions = ("a red star", "a small ring on a navy background")
    out = tmp_path / "between.png"
    words = ["interpolate", *captions, "--num", "3", "--seed", "5", "--run", str(mini_run), "--out", str(out)]
    assert main([*words, "--steps", "3", "--candidates", "2"]) == 0
    image = Image.open(out)
    assert image.width == 3 * (CELL + GAP) + GAP
    assert image.text.items() >= {"captions": "\n".join(captions), "seed": "5", "steps": "3", "candidates": "2"}.items()


def test_between_captions_all_that_is_drawn_from_turns(run: Unclip, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, seen = ["a red star", "a small ring on a navy background"], []
    decode = run.decoder.decode
    monkeypatch.setattr(run.decoder, "decode", lambda *a, **k: (seen.append(a), decode(*a, **k))[1])
    way = Manipulator(run).between_captions(captions[0], captions[1], num=3, seed=5)
    (z_i, text), said = seen.pop(), run.clip.describe(captions)
    for row, end in ((0, 0), (2, 1)):
        sample = run.generate([captions[end]], seed=5)
        torch.testing.assert_close(z_i[row], sample.image_embed[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(way[row], sample.images[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(text.embed[row], said.embed[end])
        assert torch.equal(text.mask[row], said.mask[end])
    near, far = (torch.nn.functional.cosine_similarity(z_i[1], z_i[row], dim=0) for row in (0, 2))
    torch.testing.assert_close(near, far)
    assert near < 1


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> str:
    """White in the middle third of a picture of 32 × 32."""
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    image = Image.new("L", (32, 32), 0)
    image.paste(255, (11, 11, 21, 21))
    image.save(path)
    return str(path)


def inpaint(run: Path, picture: str, mask: str, out: Path, *words: str) -> int:
    return main(["inpaint", picture, "--mask", mask, "--run", str(run), "--out", str(out), *words])


def test_a_part_is_drawn_again_and_the_rest_stays(
    mini_run: Path, pictures: list[str], mask: str, tmp_path: Path
) -> None:
    Image.open(pictures[1]).save(tmp_path / "exact.png")
    out, words = tmp_path / "out.png", ("--caption", "a red star", "--seed", "4")
    assert inpaint(mini_run, str(tmp_path / "exact.png"), mask, out, *words, "--jumps", "1") == 0
    image, given = np.asarray(Image.open(out)), np.asarray(Image.open(pictures[1]))
    changed = (image != given).any(-1)
    assert changed[11:21, 11:21].any()
    changed[11:21, 11:21] = False
    assert not changed.any()
    facts = {"caption": "a red star", "seed": "4", "jumps": "1", "prior": "diffusion"}
    assert Image.open(out).text.items() >= facts.items()
    larger = tmp_path / "larger.png"
    Image.open(mask).resize((64, 64), Image.Resampling.NEAREST).save(larger)
    assert inpaint(mini_run, str(tmp_path / "exact.png"), str(larger), tmp_path / "b.png", *words, "--jumps", "1") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), image)
    assert inpaint(mini_run, pictures[1], mask, tmp_path / "grid.png", "--num", "3") == 0
    assert Image.open(tmp_path / "grid.png").width == 5 * (CELL + GAP) + GAP


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vary", "{b}", "--out", "{folder}"], "Expected out to be a .png file"),
        (["vary", "{b}", "--out", "{folder}/x.jpg"], "Expected out to be a .png file"),
        (["vary", "{b}", "--out", "{b}/x.png"], "b.jpg is a file: name another out"),
        (["vary", "{a}", "--out", "{a}"], "which is read: name another out"),
        (["inpaint", "{b}", "--mask", "{a}", "--out", "{a}"], "which is read: name another out"),
        (["sample", "a star", "--out", "{b}"], "Expected out to be a .png file, or a folder"),
        (["vary", "{b}", "--seed", "99999999999999999999999"], "Expected a seed of 64 bits"),
        (["inpaint", "{b}", "--mask", "{a}"], "transparent in parts: fill them"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_drawn(
    words: list[str],
    expected: str,
    mini_run: Path,
    pictures: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (32, 32), (255, 255, 255, 128)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    told = {"a": str(tmp_path / "a.png"), "b": pictures[1], "folder": str(tmp_path)}
    assert main([*(word.format(**told) for word in words), "--run", str(mini_run)]) == 1
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_mask_without_white_is_a_warning_and_the_picture(
    mini_run: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    assert inpaint(mini_run, pictures[1], str(tmp_path / "black.png"), tmp_path / "out.png") == 0
    assert "has no white: nothing is drawn again" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(Image.open(pictures[1])))


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["PICTURE", "PICTURE", "--mask", "MASK"], "Expected one image file. Got 2"),
        (["PICTURE", "--mask", "nowhere.png"], "No file at nowhere.png"),
        (["PICTURE", "--mask", "pyproject.toml"], "Got pyproject.toml"),
        (["PICTURE", "--mask", "WIDE"], "Expected a mask of 32 × 32 pixels, as the picture"),
        (["PICTURE", "--mask", "MASK", "--prior", "ar"], "Expected a caption for settings of a prior"),
        (["PICTURE", "--mask", "MASK", "--solver", "Heun", "--jumps", "2"], "Expected a solver of one look a step"),
        (["PICTURE", "--mask", "MASK", "--caption", "a star", "--prior", "none"], "has no prior 'none'"),
        (["PICTURE", "--canvas", "1.5"], "Expected --mask, or --canvas with --caption"),
        (["PICTURE", "--mask", "MASK", "--canvas", "1.5"], "Expected --mask, or --canvas with --caption"),
        (["PICTURE", "--canvas", "1.5", "--caption", "a star"], "mini, trained on whole shapes alone"),
    ],
)
def test_what_cannot_be_inpainted_is_one_line(
    words: list[str],
    fragment: str,
    mini_run: Path,
    pictures: list[str],
    mask: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (64, 32), 255).save(tmp_path / "wide.png")
    names = {"PICTURE": pictures[1], "MASK": mask, "WIDE": str(tmp_path / "wide.png")}
    out = tmp_path / "out.png"
    line = ["inpaint", *(names.get(word, word) for word in words), "--run", str(mini_run), "--out", str(out)]
    assert main(line) == 1
    assert fragment in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["vary", "nowhere.png"], "No file at nowhere.png"),
        (["vary", "tests"], "Got the directory tests"),
        (["vary", "pyproject.toml"], "Got pyproject.toml"),
        (["vary"], "Expected one image file or more"),
        (["interpolate", "PICTURE"], "Expected two image files or two captions. Got 1"),
        (["interpolate", "PICTURE", "a red star"], "and the caption 'a red star': name two of a kind"),
        (["interpolate", "PICTURE", "nowhere.png"], "No file at nowhere.png"),
        (["interpolate", "PICTURE", "PICTURE", "--prior", "ar"], "Expected two captions for options of a solver"),
        (["interpolate", "PICTURE", "PICTURE", "--num", "1"], "Expected num >= 2"),
        (["probe", "PICTURE", "--dims", "[65]"], "Expected dims from 1 to the embedding's 64. Got [65]"),
        (["reconstruct", "PICTURE", "--steps", "2000"], "Expected from 1 to 1000 steps"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str],
    fragment: str,
    mini_run: Path,
    pictures: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [pictures[0] if word == "PICTURE" else word for word in words]
    assert main([*words, "--run", str(mini_run), "--out", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: Expected") or said.startswith("error: No file")
    assert fragment in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "words", [["vary", "--etas", "[1.5]"], ["vary", "--num", "0"], ["edit", "--caption", "x", "--thetas", "[-1]"]]
)
def test_numbers_out_of_range_are_refused_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "pyproject.toml"]) == 2
    assert words[-2].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_picture_is_noticed_before_torch_is_imported(command: str) -> None:
    caption = ["--caption", "a star"] if command == "edit" else []
    words = [command, "nowhere.png", "elsewhere.png", *caption]
    code = f"import sys; from unclip_pl.cli import main; assert main({words}) == 1; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No file at nowhere.png" in done.stderr
