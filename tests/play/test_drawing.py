"""What the page draws is what the commands draw, and what it writes is safe to show."""

import json
import shutil
import time
from collections.abc import Iterator
from copy import copy
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unclip_pl.diffusion import Progress
from unclip_pl.errors import InputError
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.play import drawing
from unclip_pl.play.drawing import Dot, Easel, Frame, Labelled, Map, Playground, Row, painted
from unclip_pl.play.examples import examples
from unclip_pl.play.known import known_to, report_of
from unclip_pl.play.sheet import line, page_in_page, scatter, show


@pytest.fixture(scope="module")
def playground(mini_run: Path) -> Iterator[Playground]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "STEPS", 6)
        yield Playground(Unclip.load(mini_run))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "upright.png"
    Image.radial_gradient("L").convert("RGB").resize((40, 60)).save(path)
    return str(path)


def last(frames: Iterator[Frame]) -> Frame:
    return list(frames)[-1]


def pictures(row: Row) -> Tensor:
    return torch.stack([cell.picture for cell in row.cells])


def test_every_prior_draws_what_the_command_draws(playground: Playground) -> None:
    frames = list(playground.draw("a red star", seed=3, guidance=1.5, num=2, candidates=0))
    assert [row.title for row in frames[-1].rows] == [
        "diffusion",
        "ar",
        "linear",
        "text",
    ]  # the ceiling needs a picture
    for row in frames[-1].rows:
        drawn = playground.unclip.generate(["a red star"], num=2, prior=row.title, guidance=1.5, seed=3).images
        assert torch.equal(pictures(row), drawn)
        assert 1 <= sum(cell.best for cell in row.cells) <= 2
    shares = [frame.done for frame in frames]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [bool(frame.doing) for frame in frames] == [True] * (len(frames) - 1) + [False]


def test_varying_keeps_the_file_as_the_run_sees_it(playground: Playground, picture: str) -> None:
    given, drawn = last(playground.vary(picture, eta=0.0, num=2, seed=0)).rows
    assert given.note == "40 × 60: cut to its central square of 40, resized to 32"
    latent = playground.manipulator.invert(pictures(given), steps=6)
    assert torch.equal(pictures(drawn), playground.manipulator.vary(latent, num=2, eta=0.0))


def test_a_slider_shows_one_of_the_strip(playground: Playground, picture: str) -> None:
    frame = last(playground.between_captions("a red star", "a blue ring", 0, at=0.5))
    assert (frame.chosen, len(frame.rows[-1].cells)) == (4, 9)
    start = playground.unclip.generate(["a red star"]).images
    assert torch.allclose(pictures(frame.rows[-1])[:1], start, atol=1e-4)
    frame = last(playground.edit(picture, "a red star", "a blue ring", theta=0.375))
    assert (frame.chosen, frame.rows[-1].cells[6].label) == (6, "θ 0.38")
    frame = last(playground.between_pictures(picture, picture, at=1.0))
    assert frame.chosen == 8
    frame = last(playground.look(picture, 5))
    assert frame.rows[-1].cells[frame.chosen or 0].label == "5 of 64"


def test_inpainting_draws_what_is_painted_or_masked(playground: Playground, picture: str, tmp_path: Path) -> None:
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:32, :32, 3] = 1  # a faint touch counts
    mask = Image.new("L", (20, 30))
    mask.paste(255, (10, 15, 20, 30))
    mask.save(tmp_path / "mask.png")
    kept, drawn = last(
        playground.inpaint(picture, painted({"layers": [layer]}), str(tmp_path / "mask.png"), "", 1, 0, 0)
    ).rows
    given = pictures(playground.given(picture))
    open_part = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    open_part[..., :16, :16] = open_part[..., 16:, 16:] = True
    assert torch.equal(pictures(kept), given.masked_fill(open_part, 0.0))
    assert torch.equal(pictures(drawn), playground.unclip.inpaint(given, open_part).images)


def test_nothing_painted_is_a_warning_and_the_picture(playground: Playground, picture: str) -> None:
    frame = last(playground.inpaint(picture, painted(None), None, "", 1, 0, 0))
    assert frame.note == "Nothing is painted: the picture stays as it is."
    assert torch.equal(pictures(frame.rows[-1]), pictures(playground.given(picture)))


def test_what_is_no_picture_or_does_not_fit_is_one_line(playground: Playground, picture: str, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    Image.new("L", (60, 40)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="choose a file, or click an example"):
        last(playground.vary(None, 0.5, 1, 0))
    with pytest.raises(InputError, match=r"Expected an image .* Got .*no\.png"):
        last(playground.edit(str(tmp_path / "no.png"), "", "a ring", 0.5))
    with pytest.raises(InputError, match=r"40 × 60 .* Got .* of 60 × 40"):
        last(playground.inpaint(picture, None, str(tmp_path / "mask.png"), "", 1, 0, 0))


def test_an_embedding_lies_where_its_coordinates_are(playground: Playground, picture: str) -> None:
    placed = playground.place(picture)
    z_i = playground.unclip.clip.encode_image(pictures(playground.given(picture)))
    assert placed.own.at == pytest.approx(playground.manipulator.coordinates(z_i)[0, :2].tolist())
    assert "first 96 pictures of the training set" in placed.note
    assert len(placed.dots) == 96
    mean = torch.tensor([dot.at for dot in placed.dots]).mean(0)
    assert mean.abs().max() < 1e-3  # the axes' origin is the training set's mean
    assert scatter(placed).count("<circle") == 97


def test_an_embedding_alone_is_drawn_in_the_corner() -> None:
    drawn = scatter(Map([], Dot((0.5, -2.0), "this picture"), "no embeddings"))
    assert '<circle class="play-own" cx="20.0" cy="380.0" r="8">' in drawn


def test_a_bundle_of_shapes_renders_its_training_set_again(
    playground: Playground, mini_run: Path, picture: str, tmp_path: Path
) -> None:
    kept = playground.unclip.root
    run = json.loads((kept / "run.json").read_text()) | {"store": ""}
    shutil.copytree(kept / "stages", tmp_path / "stages")
    (tmp_path / "run.json").write_text(json.dumps(run))
    other = copy(playground.unclip)
    other.root = tmp_path
    again = known_to(other)
    there = known_to(playground.unclip).image_embed
    assert torch.allclose(again.image_embed[:96], there, atol=2e-3)  # the store keeps halves
    shutil.rmtree(tmp_path / "stages")
    nothing = known_to(other)
    assert nothing.note == "This run has no embeddings of its training set."
    page = copy(playground)
    vars(page)["_known"] = nothing
    assert page.place(picture).dots == []


def test_examples_are_of_the_run(playground: Playground, tmp_path: Path) -> None:
    found = examples(playground.unclip, tmp_path)
    assert len(found.captions) == len(found.pictures) == 6
    for file in [*found.pictures, *(mask for _, mask, _ in found.parts)]:
        with Image.open(file) as image:
            assert image.width == image.height


def test_the_report_is_the_runs_own(playground: Playground, tmp_path: Path) -> None:
    run = copy(playground.unclip)
    run.root = Path(shutil.copy(run.root / "run.json", tmp_path)).parent
    html, card = report_of(run)
    assert "Training data" in card
    assert not html
    (tmp_path / "report.html").write_text('<p class="x">measured</p>')
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;measured' in page_in_page(report_of(run)[0])


def test_a_drawing_stops_when_its_reader_goes() -> None:
    easel, ended, steps = Easel(), Event(), []

    def draw(progress: Progress) -> None:
        try:
            for step in count(1):
                steps.append(step)
                progress(step, 10**6, torch.zeros(1, 3, 2, 2))
                time.sleep(0.001)
        finally:
            ended.set()

    frames = easel.watch(draw, lambda estimate: Frame([], None, estimate.done))
    next(frames)
    frames.close()
    assert ended.wait(10)
    with pytest.raises(StopIteration) as end:
        next(easel.watch(lambda progress: "the next one's turn", lambda estimate: Frame([])))
    assert end.value.value == "the next one's turn"
    ended.clear()
    frames = easel.watch(draw, lambda estimate: Frame([], None, estimate.done))
    next(frames)
    easel.close()
    assert ended.wait(10)


def test_a_fault_of_a_drawing_reaches_its_reader() -> None:
    def draw(progress: Progress) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        list(Easel().watch(draw, lambda estimate: Frame([])))


def test_texts_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    row = Row(evil, [Labelled(torch.zeros(3, 2, 2), f'"{evil}', best=True)], evil)
    written = show(Frame([row], 0, 0.5, evil, evil))
    assert "<script" not in written + line(evil)
    assert 'alt="&lt;script' in written
    assert "50%" in written
