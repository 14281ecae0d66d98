"""Words over shapes: the letters, where they stand, and the oracle that reads the shape below."""

import numpy as np
import pytest
import torch

from unclip_pl.packing.samples import shapes_samples
from unclip_pl.shapes.oracle import WordsOracle
from unclip_pl.shapes.render import SHAPES, Attributes, draw_attributes, encode, render
from unclip_pl.shapes.words import draw_words, stencil, write_words


@pytest.mark.parametrize("word", SHAPES)
def test_a_word_is_ten_pixels_high_and_has_an_edge_all_round(word: str) -> None:
    ink, edge = stencil(word)
    assert ink.shape == edge.shape == (10, 6 * len(word) + 1)
    assert ink.any(1).tolist() == [False, *[True] * 8, False]
    assert not (ink & edge).any()
    padded = np.pad(ink | edge, 1)
    for y, x in zip(*ink.nonzero(), strict=True):
        assert padded[y : y + 3, x : x + 3].all()


def test_words_differ_at_every_letter_that_does() -> None:
    glyphs = {letter: stencil(letter)[0].tobytes() for letter in sorted(set("".join(SHAPES)))}
    assert len(set(glyphs.values())) == len(glyphs) == 16


def test_a_word_covers_its_shape_and_nothing_else_changes() -> None:
    rng = np.random.default_rng(0)
    drawn = draw_attributes(100, split="train", rng=rng)
    plain = render(drawn, size=64, rng=rng)
    written = write_words(plain, drawn, ["ring"] * 100)
    changed = (plain != written).any(-1)
    assert changed.any(2).sum(1).max() <= 10
    assert changed.any(1).sum(1).max() <= 25
    assert set(np.unique(written[changed])) == {0, 255}
    at = {position: i for i, (_, _, size, position, _) in enumerate(drawn) if size == "large"}
    for position, (y, x) in {"center": (32, 32), "left": (32, 23), "top": (23, 32), "bottom": (41, 32)}.items():
        rows, columns = changed[at[position]].nonzero()
        assert (abs(rows.mean() - y), abs(columns.mean() - x)) < (2, 2)
    assert np.array_equal(write_words(plain, drawn, [""] * 100), plain)
    double = write_words(render(drawn, size=128, rng=rng), drawn, ["ring"] * 100)
    assert double.shape == (100, 128, 128, 3)
    with pytest.raises(ValueError, match="at least 64 px"):
        write_words(plain[:, ::2, ::2], drawn, ["ring"] * 100)


def test_half_of_the_training_pictures_and_every_held_out_one_have_a_word() -> None:
    rng = np.random.default_rng(0)
    drawn = draw_attributes(4000, split="train", rng=rng)
    train = draw_words(drawn, split="train", rng=rng)
    assert abs(np.mean([word == "" for word in train]) - 0.5) < 0.03
    said = [word == own.shape for word, own in zip(train, drawn, strict=True) if word]
    assert abs(np.mean(said) - 1 / 8) < 0.03
    heldout = draw_words(drawn, split="heldout", rng=rng)
    assert set(heldout) == set(SHAPES)
    assert all(word != own.shape for word, own in zip(heldout, drawn, strict=True))
    others = np.mean([word == "ring" for word, own in zip(heldout, drawn, strict=True) if own.shape == "heart"])
    assert abs(others - 1 / 7) < 0.06


def test_three_in_four_captions_of_training_say_the_word_and_none_that_is_held_out() -> None:
    """At one in two the shape and the word would be equally likely for any CLIP."""
    said = {
        split: [
            sample.extra["stated"]["shape"] == sample.extra["word"]
            for sample in shapes_samples(1000, split=split, size=64, words=True)
            if "shape" in sample.extra["stated"]
            and sample.extra["word"] not in ("", sample.extra["attributes"]["shape"])
        ]
        for split in ("train", "heldout")
    }
    assert abs(np.mean(said["train"]) - 0.75) < 0.07
    assert not any(said["heldout"])


@pytest.mark.parametrize("written", [True, False])
def test_the_oracle_reads_the_shape_below_the_word(written: bool) -> None:
    rng = np.random.default_rng(1)
    drawn: list[Attributes] = draw_attributes(30, split="heldout", rng=rng)
    images = render(drawn, size=64, rng=rng)
    words = draw_words(drawn, split="heldout", rng=rng) if written else [""] * 30
    pixels = torch.from_numpy(write_words(images, drawn, words)).permute(0, 3, 1, 2) / 127.5 - 1
    reading = WordsOracle(64)(pixels)
    assert (reading.indices == encode(drawn)).float().mean() >= 0.995
    assert reading.residual.max() < 0.01
