"""The perfect prior of the shapes draws what the renderer draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.generation.posterior import TruePosterior, TruePosteriorSpec, draw_open
from unclip_pl.metrics.diversity import total_variation
from unclip_pl.shapes.captions import conditional, parse
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import ATTRIBUTES, VALUES, Split, encode

CAPTIONS = ["a large red star on the left on a white background", "a little blue heart", "a ring at the top on navy"]


@pytest.fixture(scope="module")
def prior() -> TruePosterior:
    return TruePosteriorSpec(ClipSpec("tiny-rn")).load(Path())


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(
    "caption", ["a red shape on white", "a small ring", "a picture of a heart on a navy background"]
)
def test_what_is_open_has_the_renderers_distribution(caption: str, split: Split) -> None:
    stated, rng = parse(caption), np.random.default_rng(0)
    drawn = encode([draw_open(stated, split=split, rng=rng) for _ in range(4000)])
    for column, name in zip(drawn.T, ATTRIBUTES, strict=True):
        if name in stated:
            assert set(column.tolist()) == {VALUES[name].index(stated[name])}
        else:
            truth = torch.from_numpy(conditional(stated, name, split))
            assert total_variation(torch.bincount(column, minlength=len(truth)), truth) < 0.03


def test_training_shows_no_picture_of_some_captions() -> None:
    with pytest.raises(ValueError, match="No picture of split 'train' is a heart blue"):
        draw_open({"shape": "heart", "color": "blue"}, split="train", rng=np.random.default_rng(0))


def test_its_pictures_show_what_captions_state_in_any_batch(
    prior: TruePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def embeds(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)

    monkeypatch.setattr(prior.clip, "encode_image", embeds)
    text = prior.clip.describe(CAPTIONS).repeat(8)
    streams = [torch.Generator().manual_seed(seed) for seed in range(24)]
    together = prior.embed(text, generator=streams)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(24))
    read, *_ = ShapesOracle()(seen[0])
    for row, caption in zip(read, [caption for caption in CAPTIONS for _ in range(8)], strict=True):
        stated = parse(caption)
        assert {name: VALUES[name][row[ATTRIBUTES.index(name)]] for name in stated} == stated
    assert len(read[8:16].unique(dim=0)) > 4  # a blue heart: eight of 2 · 5 · 4 pictures
    alone = prior.embed(text.rows(slice(10, 11)), generator=[torch.Generator().manual_seed(10)])
    torch.testing.assert_close(alone[0], together[10])


def test_what_training_never_shows_is_drawn_where_the_caption_names_it_and_not_else(
    prior: TruePosterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(prior.clip, "encode_image", lambda images: seen.append(images) or images.flatten(1))
    monkeypatch.setattr(prior, "spec", replace(prior.spec, split="train"))
    text = prior.clip.describe(["a blue heart", "a heart"])
    prior.embed(text.repeat(40), generator=torch.Generator().manual_seed(0))
    read, *_ = ShapesOracle()(seen[0])
    colors = [VALUES["color"][row[ATTRIBUTES.index("color")]] for row in read]
    assert set(colors[:40]) == {"blue"}
    assert "blue" not in colors[40:]
    assert len(set(colors[40:])) > 3


def test_its_embeddings_are_the_clips(prior: TruePosterior) -> None:
    """Pictures of one caption that states all differ by jitter alone; those of another caption lie further away."""
    text = prior.clip.describe([CAPTIONS[0]] * 4 + [CAPTIONS[2]] * 4)
    drawn = prior.embed(text, generator=torch.Generator().manual_seed(0))
    assert F.cosine_similarity(drawn[0], drawn[1:4]).min() > F.cosine_similarity(drawn[0], drawn[4:]).max()
    assert prior.reference
    assert not prior.needs_image
    assert prior.fingerprint == prior.clip.fingerprint


def test_captions_of_other_data_are_refused(prior: TruePosterior) -> None:
    with pytest.raises(ValueError, match=r"captions of the built-in shapes\. Got 'two dogs"):
        prior.embed(prior.clip.describe(["two dogs"]))
