import pytest
import torch

from unclip_pl.metrics.interval import mean_interval, recentred_interval, share_interval


def test_mean_interval_covers_the_truth_19_times_in_20() -> None:
    draws = torch.rand(2000, 100, generator=torch.Generator().manual_seed(0))
    intervals = [mean_interval(row) for row in draws]
    covered = sum(interval.low <= 0.5 <= interval.high for interval in intervals) / len(intervals)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_mean_interval_shrinks_with_the_root_of_the_captions() -> None:
    values = torch.randn(6400, generator=torch.Generator().manual_seed(0))
    few, many = mean_interval(values[:1600]), mean_interval(values)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.1)


def test_wilson_holds_the_share_and_does_not_vanish() -> None:
    for share in (0.0, 0.3, 1.0):
        mean, low, high = share_interval(share, 50)
        assert mean == share
        assert 0 <= low <= share <= high <= 1
        assert high - low > 0.05
    assert share_interval(0.5, 10**6).high - 0.5 == pytest.approx(1.96 * 0.5e-3, rel=1e-3)


def test_more_seeds_of_the_same_captions_are_not_more_captions() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert mean_interval(values.expand(8, 50)) == pytest.approx(mean_interval(values))


def test_mean_interval_of_clustered_samples_covers_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    caption = torch.randn(1000, 1, 100, generator=generator)  # what all seeds of a caption share
    trials = caption + torch.randn(1000, 4, 100, generator=generator)
    intervals = [mean_interval(trial) for trial in trials]
    assert sum(i.low <= 0 <= i.high for i in intervals) / 1000 == pytest.approx(0.95, abs=0.02)


def test_mean_interval_takes_bool_and_refuses_one_caption() -> None:
    assert mean_interval(torch.tensor([True, False])).mean == 0.5
    with pytest.raises(ValueError, match="N >= 2"):
        mean_interval(torch.ones(3, 1))


def test_mean_interval_of_wins_has_the_papers_half_width() -> None:
    """unCLIP, Table 1: 47.1 ± 3.1 % of 1000 comparisons."""
    rate = mean_interval(torch.arange(1000) < 471)
    assert rate.mean == pytest.approx(0.471)
    assert rate.high - rate.mean == pytest.approx(0.031, abs=5e-4)


def test_recentred_interval_forgets_where_the_resamples_lie() -> None:
    resampled = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert recentred_interval(3.0, resampled + 7) == pytest.approx(recentred_interval(3.0, resampled), abs=1e-6)
