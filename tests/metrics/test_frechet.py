from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from unclip_pl.metrics.frechet import (
    FrechetDistance,
    frechet_distance,
    frechet_interval,
    frechet_resamples,
    without_bias,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def features(*shape: int, seed: int = 0) -> Tensor:
    """Correlated, off-centre features (..., F)."""
    mixing = torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(99)) / shape[-1] ** 0.5
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) @ mixing + 0.3


def distance(real: Tensor, fake: Tensor) -> float:
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    """Axis-aligned Gaussians: |μ1 − μ2|² + Σ (σ1 − σ2)², in any rotated basis."""
    generator = torch.Generator().manual_seed(0)
    mean1, mean2 = torch.randn(2, 8, generator=generator).double()
    std1, std2 = torch.rand(2, 8, generator=generator).double()
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    cov1, cov2 = (basis @ torch.diag(std**2) @ basis.mT for std in (std1, std2))
    expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    torch.testing.assert_close(frechet_distance(mean1, cov1, mean2, cov2), expected)


@pytest.mark.parametrize("count", [500, 20])  # 20: fewer samples than features
def test_distance_to_itself_is_zero(count: int) -> None:
    assert distance(features(count, 32), features(count, 32)) == pytest.approx(0, abs=1e-10)


def test_distance_is_symmetric_and_knows_no_rotation() -> None:
    real, fake = features(200, 16), features(200, 16, seed=1) * 1.2
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    assert distance(fake, real) == pytest.approx(distance(real, fake))
    assert distance(real @ basis, fake @ basis) == pytest.approx(distance(real, fake), rel=1e-4)


def test_distance_broadcasts_over_leading_dimensions() -> None:
    fakes = features(3, 50, 8, seed=1).double()
    means, covs = fakes.mean(1), torch.stack([torch.cov(fake.mT) for fake in fakes])
    batched = frechet_distance(means[0], covs[0], means, covs)
    single = torch.stack(
        [frechet_distance(means[0], covs[0], mean, cov) for mean, cov in zip(means, covs, strict=True)]
    )
    torch.testing.assert_close(batched, single)


def test_wide_features_are_counted() -> None:
    real, fake = features(400, 300).double(), features(400, 300, seed=1).double() * 1.1
    expected = frechet_distance(real.mean(0), torch.cov(real.mT), fake.mean(0), torch.cov(fake.mT))
    assert distance(real, fake) == pytest.approx(expected.item())


@pytest.mark.parametrize("count", [300, 40])
def test_metric_agrees_with_torch_fidelity(count: int) -> None:
    real, fake = features(count, 48).double(), features(count, 48, seed=1).double() * 1.1 + 0.05
    statistics = [fid_features_to_statistics(side) for side in (real, fake)]
    reference = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert distance(real, fake) == pytest.approx(reference, rel=1e-6)


def test_two_processes_and_uneven_batches_are_one() -> None:
    real, fake = features(90, 8), features(70, 8, seed=1)
    ranks = [FrechetDistance(8), FrechetDistance(8)]
    for rank, cut in zip(ranks, (slice(0, 30), slice(30, None)), strict=True):
        for batch in real[cut].split(16):
            rank.update(batch, real=True)
        rank.update(fake[cut], real=False)
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().item() == pytest.approx(distance(real, fake))


def test_metric_explains_wrong_width_and_missing_samples() -> None:
    metric = FrechetDistance(8)
    with pytest.raises(ValueError, match=r"\(B, 8\). Got \(5, 9\)"):
        metric.update(torch.zeros(5, 9), real=True)
    metric.update(torch.zeros(5, 8), real=True)
    with pytest.raises(ValueError, match="Got 5 and 0"):
        metric.compute()


def test_interval_surrounds_the_full_estimate_though_resamples_lie_above_it() -> None:
    real, fake = features(300, 16), features(300, 16, seed=1) + 0.05
    resamples = frechet_resamples(real, {"a": fake}, generator=torch.Generator().manual_seed(0))["a"]
    interval = frechet_interval(real, {"a": fake}, generator=torch.Generator().manual_seed(0))["a"]
    assert interval.mean == pytest.approx(distance(real, fake))
    assert resamples[1:].quantile(0.025) > interval.mean  # the plain percentiles miss the estimate
    assert interval.low < interval.mean < interval.high
    assert (interval.low + interval.high) / 2 == pytest.approx(interval.mean, abs=0.2 * (interval.high - interval.low))


def test_resample_is_the_distance_of_the_drawn_captions() -> None:
    real, fake = features(40, 4), features(40, 4, seed=1)
    index = torch.randint(40, (3, 40), generator=torch.Generator().manual_seed(5))
    resamples = frechet_resamples(real, {"a": fake}, 3, generator=torch.Generator().manual_seed(5))["a"]
    expected = [distance(real, fake)] + [distance(real[rows], fake[rows]) for rows in index]
    torch.testing.assert_close(resamples, torch.tensor(expected, dtype=torch.float64))


def test_names_share_resamples_so_their_difference_is_sharp() -> None:
    real, fake = features(200, 8), features(200, 8, seed=1)
    fakes = {"a": fake, "same": fake, "near": fake + 0.02}
    resamples = frechet_resamples(real, fakes, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resamples["a"], resamples["same"])
    assert (resamples["near"] - resamples["a"]).std() < 0.5 * resamples["a"].std()


def test_seeds_average_and_do_not_count_as_captions() -> None:
    real, fake = features(100, 4), features(3, 100, 4, seed=1) + 0.1
    together = frechet_interval(real, {"a": fake}, 50, generator=torch.Generator().manual_seed(0))["a"]
    assert together.mean == pytest.approx(sum(distance(real, seed) for seed in fake) / 3)
    once, thrice = (
        frechet_interval(real, {"a": rows}, 50, generator=torch.Generator().manual_seed(0))["a"]
        for rows in (fake[0], fake[:1].expand(3, -1, -1))
    )
    assert thrice == pytest.approx(once)


def test_interval_shrinks_with_the_root_of_the_captions() -> None:
    widths = []
    for count in (500, 2000):
        real, fake = features(count, 4), features(count, 4, seed=1) + 0.5  # far apart: the mean term dominates
        interval = frechet_interval(real, {"a": fake}, 400, generator=torch.Generator().manual_seed(0))["a"]
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25)


def test_interval_refuses_unequal_counts() -> None:
    with pytest.raises(ValueError, match=r"'ar' of shape \(100, 4\)"):
        frechet_interval(features(100, 4), {"ar": features(90, 4)})


def test_a_distance_without_its_bias_is_zero_on_average_between_samples_of_one_distribution() -> None:
    found = []
    for seed in range(30):
        real, fake = features(2, 200, 4, seed=seed)
        found.append(frechet_resamples(real, {"": fake}, 30, generator=torch.Generator().manual_seed(seed))[""])
    plain = torch.stack(found)
    corrected = without_bias(plain)
    assert corrected.shape == plain.shape
    torch.testing.assert_close(corrected[:, 1:], plain[:, 1:])
    assert corrected[:, 0].mean().abs() < 0.25 * plain[:, 0].mean()
    assert without_bias(torch.zeros(4)).tolist() == [0] * 4


@pytest.mark.parametrize("counts", [(9, 400), (9, 7), (400, 300)])
def test_any_rank_gives_what_the_samples_themselves_give(counts: tuple[int, int]) -> None:
    """Tr (Σ1 Σ2)^½ is the nuclear norm of X1 X2ᵀ, centred samples over √(n − 1)."""
    g = torch.Generator().manual_seed(0)
    sides = [
        torch.randn(n, 50, generator=g, dtype=torch.float64) * torch.rand(50, generator=g) + i
        for i, n in enumerate(counts)
    ]
    metric = FrechetDistance(50)
    for features, real in zip(sides, (True, False), strict=True):
        metric.update(features, real=real)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in sides]
    traces = sum(x.square().sum() for x in centred)
    gap = (sides[0].mean(0) - sides[1].mean(0)).square().sum()
    expected = gap + traces - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-12, atol=1e-12)
