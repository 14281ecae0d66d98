"""Numbers from features and readings, against closed forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from unclip_pl.evaluation.foundations import axes_for, zero_shot
from unclip_pl.evaluation.scores import (
    caption_gap,
    embedding_values,
    open_captions,
    stated_indices,
    states_unseen_pair,
)
from unclip_pl.metrics.interval import mean_interval
from unclip_pl.shapes.render import ATTRIBUTES, VALUES
from unclip_pl.types import TextFeatures


def test_captions_become_indices() -> None:
    stated = stated_indices(["a large red star", "something"])
    expected = [VALUES["shape"].index("star"), VALUES["color"].index("red"), VALUES["size"].index("large"), -1, -1]
    assert stated.tolist() == [expected, [-1] * 5]


def test_unseen_pairs_are_those_that_training_leaves_out() -> None:
    stated = stated_indices(["a purple circle", "a red circle", "a circle", "a small green star on the left"])
    assert states_unseen_pair(stated).tolist() == [True, False, False, True]


def test_captions_for_diversity_differ_and_leave_something_open() -> None:
    complete = "a large red star at the top on a navy background"
    captions = ["a red star", complete, "a red star", "a small ring at the top"]
    assert open_captions(captions, 9, shapes=True) == [0, 3]
    assert open_captions(captions, 2, shapes=False) == [0, 1]
    assert open_captions(captions, 0, shapes=True) == []


def test_gap_of_one_value_is_its_distance_less_that_of_true_draws() -> None:
    stated = {"shape": "star", "color": "red", "position": "top", "background": "navy"}  # size is open: two values
    always = torch.zeros(16, len(ATTRIBUTES), dtype=torch.long)
    even = always.clone()
    even[::2, ATTRIBUTES.index("size")] = 1
    expected = 0.5 * math.comb(16, 8) / 2**16  # mean deviation of 16 fair coins from one half: De Moivre
    assert caption_gap(always, stated) == pytest.approx(0.5 - expected)
    assert caption_gap(even, stated) == pytest.approx(-expected)
    assert math.isnan(caption_gap(always, {**stated, "size": "small"}))


def test_calibrated_samples_have_equal_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = F.normalize(torch.randn(400, 1, 64, generator=generator), dim=-1)
    draws = F.normalize(mean + 0.05 * torch.randn(400, 5, 64, generator=generator), dim=-1)
    samples, true = draws[:, :4].transpose(0, 1), draws[:, 4]  # the truth is one more draw
    scores = {name: mean_interval(x) for name, x in embedding_values(samples, true, true).items()}
    assert scores["calibration_gap"].low < 0 < scores["calibration_gap"].high
    assert scores["cos_true"].mean == pytest.approx(1 / (1 + 64 * 0.05**2), abs=0.01)
    assert scores["text_cos"].mean == pytest.approx(scores["cos_true"].mean)
    assert "text_cos" not in embedding_values(samples, true, true[:, :32])  # two encoders of an imported dump
    assert scores["mean_norm"].mean == pytest.approx((1 + 64 * 0.05**2) ** -0.5, abs=0.01)


class Reader:
    """A CLIP whose embedding is what the caption states, one axis for every value."""

    def describe(self, captions: list[str]) -> TextFeatures:
        stated = stated_indices(captions)
        widths = [len(VALUES[name]) for name in ATTRIBUTES]
        axes = [F.one_hot(column, width) for column, width in zip(stated.T, widths, strict=True)]
        return TextFeatures(stated, stated, stated, torch.cat(axes, dim=1).float())


def test_zero_shot_finds_what_the_embeddings_say() -> None:
    captions = ["a small red star in the center on a white background", "a large blue ring at the top on navy"]
    truth = stated_indices(captions)
    image_embed = Reader().describe(captions).embed
    assert zero_shot(Reader(), image_embed, truth) == dict.fromkeys(ATTRIBUTES, 1.0)  # type: ignore[arg-type]
    assert zero_shot(Reader(), image_embed.flip(0), truth) == dict.fromkeys(ATTRIBUTES, 0.0)  # type: ignore[arg-type]


def test_axes_are_counted_until_the_share_is_held() -> None:
    centred = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # axes hold 9, 4 and 1 of 14
    assert axes_for(0.6, centred, torch.eye(3)) == 1
    assert axes_for(0.92, centred, torch.eye(3)) == 2
    assert axes_for(0.99, centred, torch.eye(3)[:2]) is None
