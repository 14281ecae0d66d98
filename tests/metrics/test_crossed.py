"""Intervals over training seeds and captions, held to the model they assume."""

import pytest
import torch

from unclip_pl.metrics.crossed import crossed_interval, crossed_resamples
from unclip_pl.metrics.interval import mean_interval, sign_test


def test_one_training_seed_is_the_plain_interval_over_captions() -> None:
    values = torch.rand(1, 200, generator=torch.Generator().manual_seed(0))
    assert crossed_interval(values) == pytest.approx(mean_interval(values[0]))


def test_seeds_that_agree_add_nothing_and_do_not_count_as_more_captions() -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    crossed, plain = crossed_interval(values), mean_interval(values[0])
    assert crossed.mean == pytest.approx(plain.mean)
    assert crossed.high - crossed.low == pytest.approx(plain.high - plain.low, rel=0.02)  # Student's, 99 degrees


def test_captions_that_agree_leave_students_interval_over_seeds() -> None:
    seeds = torch.tensor([0.90, 0.92, 0.91, 0.95])
    crossed = crossed_interval(seeds[:, None].repeat(1, 50))
    assert crossed.mean == pytest.approx(seeds.mean().item())
    assert crossed.high - crossed.mean == pytest.approx(3.18244631 * seeds.std().item() / 2, rel=1e-5)


@pytest.mark.parametrize(
    "sigmas", [(1.0, 0.0, 1.0), (0.3, 3.0, 1.0), (0.0, 1.0, 3.0)], ids=["seeds", "captions", "rest"]
)
def test_intervals_hold_the_truth_as_often_as_they_say(sigmas: tuple[float, float, float]) -> None:
    """Drawn from the model itself, whose grand mean is 0. 400 studies: 95 % ± 2.2 % at two standard errors."""
    generator = torch.Generator().manual_seed(0)
    seed, caption, rest = sigmas
    held = 0
    for _ in range(400):
        values = (
            seed * torch.randn(5, 1, generator=generator)
            + caption * torch.randn(1, 60, generator=generator)
            + rest * torch.randn(5, 60, generator=generator)
        )
        interval = crossed_interval(values)
        held += interval.low <= 0 <= interval.high
    assert 0.925 <= held / 400 <= 0.995  # never too narrow; with no seed effect a little wide


def test_resamples_of_a_mean_give_what_the_mean_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 1, generator=generator) * 0.1 + torch.randn(4, 300, generator=generator)
    index = torch.randint(300, (4000, 300), generator=generator)
    resamples = torch.cat([values.mean(1, keepdim=True), values[:, index].mean(-1)], dim=1)
    a, b = crossed_interval(values), crossed_resamples(resamples)
    assert b.mean == pytest.approx(a.mean, abs=1e-6)
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.05)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (2, 3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="K seeds"):
        crossed_interval(torch.zeros(shape))


def test_sign_test_is_the_binomial() -> None:
    ours = torch.tensor([1.0] * 8 + [0.0] * 2 + [0.5] * 3)
    test = sign_test(ours, torch.full((13,), 0.5))
    assert (test.wins, test.losses, test.ties) == (8, 2, 3)
    assert test.p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(ours[:1], ours[:1]).p == 1
