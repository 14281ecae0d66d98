"""A run, put together: what `generate` promises."""

from pathlib import Path

import pytest
import torch

from unclip_pl.pipeline import Unclip


@pytest.fixture(scope="module")
def unclip(mini_run: Path) -> Unclip:
    return Unclip.load(mini_run)


def test_rows_of_images_and_their_embeddings(unclip: Unclip) -> None:
    images, image_embed = unclip.generate(["a red star", "a ring"], num=2)
    assert images.shape == (4, 3, 32, 32)
    assert images.abs().max() <= 1
    torch.testing.assert_close(image_embed.norm(dim=-1), torch.ones(4))


def test_one_call_leaves_nothing_to_the_next(unclip: Unclip) -> None:
    before = unclip.generate(["a red star"]).images
    assert not torch.equal(unclip.generate(["a red star"], guidance=5.0).images, before)
    torch.testing.assert_close(unclip.generate(["a red star"]).images, before, rtol=0, atol=0)


def test_what_cannot_be_drawn_is_refused(unclip: Unclip) -> None:
    with pytest.raises(ValueError, match="at least one caption"):
        unclip.generate([])
    with pytest.raises(ValueError, match=r"no prior 'best'\. Expected one of diffusion, ar"):
        unclip.generate(["a red star"], prior="best")
    with pytest.raises(ValueError, match="TrueEmbedding needs the image"):
        unclip.generate(["a red star"], prior="ceiling")
