"""What the page draws is what the commands draw, and what it writes is safe to show."""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from unclip_pl.generation.decoding import Progress
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.play.drawing import Cell, Easel, Frame, Playground, Row
from unclip_pl.play.sheet import line, show


@pytest.fixture(scope="module")
def playground(mini_run: Path) -> Playground:
    return Playground(Unclip.load(mini_run))


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

    frames = easel.watch(draw, lambda estimate: Frame([], estimate.done))
    next(frames)
    frames.close()
    assert ended.wait(10)
    with pytest.raises(StopIteration) as end:
        next(easel.watch(lambda progress: "the next one's turn", lambda estimate: Frame([])))
    assert end.value.value == "the next one's turn"


def test_a_fault_of_a_drawing_reaches_its_reader() -> None:
    def draw(progress: Progress) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        list(Easel().watch(draw, lambda estimate: Frame([])))


def test_texts_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    written = show(Frame([Row(evil, [Cell(torch.zeros(3, 2, 2), f'"{evil}', best=True)], evil)], 0.5, evil, evil))
    assert "<script" not in written + line(evil)
    assert 'alt="&lt;script' in written
    assert "50%" in written
