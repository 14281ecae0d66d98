"""A classifier of two samples: chance where there is one distribution, and right where there are two."""

import torch
from torch import Tensor

from unclip_pl.metrics.two_sample import told_apart


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_distribution_is_not_told_apart() -> None:
    found = told_apart(draw(300, 8, seed=0), draw(300, 8, seed=1))
    assert found.shape == (300,)
    assert set(found.tolist()) <= {0, 0.5, 1}
    assert abs(found.mean() - 0.5) < 0.06  # 2.4 standard errors


def test_the_two_pictures_of_a_caption_do_not_betray_each_other() -> None:
    """What they share would send the accuracy below a half if one of them were seen."""
    caption = draw(300, 8, seed=2)
    pairs = (caption + 0.1 * draw(300, 8, seed=seed) for seed in (0, 1))
    assert abs(told_apart(*pairs).mean() - 0.5) < 0.06


def test_other_means_and_other_spreads_are_told_apart() -> None:
    real, fake = draw(300, 8, seed=0), draw(300, 8, seed=1)
    assert told_apart(real, fake + 2).mean() > 0.9
    narrow = torch.tensor([1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])  # the same mean: no line tells them apart
    assert told_apart(real, fake * narrow).mean() > 0.65
    assert told_apart(real, fake + 100).mean() > 0.99
