"""``unclip sample``: what it takes, and what its files say."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unclip_pl.cli import main
from unclip_pl.diffusion import DPMSolver, Heun
from unclip_pl.generation.pictures import CELL, GAP, save_png, to_image
from unclip_pl.generation.pipeline import Unclip


@pytest.fixture(autouse=True, scope="module")
def run(mini_run: Path) -> Iterator[Unclip]:
    """Read once for all."""
    unclip = Unclip.load(mini_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unclip, "load", lambda *_: unclip)
        yield unclip


def drawn(run: Path, out: Path, *words: str) -> Path:
    assert main(["sample", *words, "--run", str(run), "--out", str(out)]) == 0
    return out


def test_every_image_by_itself_says_how_to_draw_it_again(mini_run: Path, tmp_path: Path) -> None:
    folder = drawn(mini_run, tmp_path / "all", "a red star", "", "--num", "2", "--seed", "5", "--prior", "ar")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["000-a-red-star.png", "001-a-red-star.png", "002-no-caption.png", "003-no-caption.png", "grid.png"]
    image = Image.open(folder / "001-a-red-star.png")
    texts = image.text
    assert (texts["caption"], texts["seed"], texts["prior"], texts["run"]) == ("a red star", "6", "ar", mini_run.name)
    assert texts["commit"]
    words = (texts["caption"], "--seed", texts["seed"], "--prior", texts["prior"], "--num", "1")
    again = Image.open(drawn(mini_run, tmp_path / "again", *words) / "000-a-red-star.png")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(again)).max() <= 1
    assert Image.open(folder / "grid.png").width == 2 * (CELL + GAP) + GAP


def test_one_image_into_one_file_is_that_image(mini_run: Path, tmp_path: Path) -> None:
    words = ("a red star", "--num", "1", "--seed", "6", "--prior", "linear")
    alone = Image.open(drawn(mini_run, tmp_path / "alone.png", *words))
    listed = Image.open(drawn(mini_run, tmp_path / "all", *words) / "000-a-red-star.png")
    assert alone.size == (32, 32)
    assert np.array_equal(np.asarray(alone), np.asarray(listed))
    assert alone.text == listed.text
    assert alone.text["seed"] == "6"
    labelled = Image.open(drawn(mini_run, tmp_path / "labelled.png", *words, "--labels"))
    assert labelled.width == CELL + 2 * GAP
    assert labelled.height > CELL + 2 * GAP
    assert Image.open(drawn(mini_run, tmp_path / "way.png", *words, "--previews", "1")).width == 2 * (CELL + GAP) + GAP


def test_previews_stand_before_the_image(mini_run: Path, tmp_path: Path) -> None:
    words = ("a star", "a ring", "--num", "2", "--batch_size", "3")
    grids = [
        Image.open(drawn(mini_run, tmp_path / f"{n}.png", *words, *previews))
        for n, previews in enumerate((("--previews", "3"), ()))
    ]
    assert grids[0].width == 4 * (CELL + GAP) + GAP
    last = [np.asarray(grid).astype(int)[-CELL - GAP : -GAP, -CELL - GAP : -GAP] for grid in grids]
    assert np.abs(last[0] - last[1]).max() <= 1


def test_prompts_come_from_a_file(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa ring\r\n\r\na blue star \r\n")  # as Windows' editors save it
    grid = drawn(mini_run, tmp_path / "x.png", "a cross", "--prompts", str(path), "--num", "1", "--prior", "linear")
    assert Image.open(grid).text["captions"] == "a cross\na ring\na blue star"
    for text in (b"", "\ufeff".encode(), "caf\xe9".encode("latin-1"), None):
        path.unlink() if text is None else path.write_bytes(text)
        assert main(["sample", "--prompts", str(path), "--run", str(mini_run)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "Expected prompts, one a line" in said[0] == said[1]
    assert "Expected prompts in UTF-8" in said[2]
    assert "No prompts at" in said[3]


def test_embeddings_come_from_a_file(
    run: Unclip, mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, fingerprint = tmp_path / "z.safetensors", run.clip.fingerprint
    z_i = torch.nn.functional.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    save_file({"image_embed": z_i}, path, {"fingerprint": fingerprint})
    grid = Image.open(drawn(mini_run, tmp_path / "x.png", "--from_embedding", str(path), "--num", "2"))
    assert grid.width == 2 * (CELL + GAP) + GAP
    assert grid.text["from_embedding"] == "z.safetensors"
    save_file({"image_embed": z_i}, path, {"fingerprint": "tiny-rn-other"})
    refused = {
        "tiny-rn-other": ["--from_embedding", str(path)],
        "No embeddings at": ["--from_embedding", "nowhere.safetensors"],
        "Got both: leave one out": ["--from_embedding", str(path), "--prior", "ar"],
        "a .png file, or a folder": ["a star", "--out", "x.jpg"],
    }
    for fragment, words in refused.items():
        assert main(["sample", "--run", str(mini_run), *words]) == 1
        assert fragment in capsys.readouterr().err


def test_another_solver_is_asked_for_and_noted(mini_run: Path, tmp_path: Path, run: Unclip) -> None:
    words = ("a red star", "--num", "1", "--seed", "6")
    given = ("--solver", "Heun", "--steps", "3", "--prior_solver", "DPMSolver", "--prior_steps", "5")
    image = Image.open(drawn(mini_run, tmp_path / "one.png", *words, *given))
    noted = {"solver": "Heun", "steps": "3", "prior_solver": "DPMSolver", "prior_steps": "5"}
    assert noted.items() <= image.text.items()
    own = run.generate(["a red star"], seed=6, sampler=Heun(3), prior_sampler=DPMSolver(5)).images
    save_png(to_image(own[0]), tmp_path / "own.png", {})
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "own.png")))

    steps = run.decoder.sampler.steps
    fewer = Image.open(drawn(mini_run, tmp_path / "fewer.png", *words, "--steps", str(steps - 1)))
    same = Image.open(drawn(mini_run, tmp_path / "same.png", *words, "--steps", str(steps)))
    plain = Image.open(drawn(mini_run, tmp_path / "plain.png", *words))
    assert np.array_equal(np.asarray(same), np.asarray(plain))
    assert not np.array_equal(np.asarray(fewer), np.asarray(plain))
    assert "solver" not in plain.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prior", "linear", "--prior_steps", "5"), "Expected a prior that takes steps, for --prior_steps"),
        (("--prior", "ar", "--prior_solver", "DDIM"), "Expected a prior with sampler, such as DiffusionPrior"),
        (("--steps", "1001"), "Expected from 1 to 1000 steps, the training steps. Got 1001"),
        (("--prior_solver", "Heun", "--from_embedding", "z.safetensors"), "Expected --from_embedding or settings of"),
    ],
)
def test_a_solver_that_cannot_be_is_one_line(
    words: tuple[str, ...], said: str, mini_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "a red star", "--run", str(mini_run), "--out", "x.png", *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said in line
    assert not Path("x.png").exists()
