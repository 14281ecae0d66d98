import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_pl.metrics.embedding import calibration, cosine_to_true


def draw(captions: int, samples: int, spread: float, seed: int) -> Tensor:
    """(N, S, d) unit vectors around one centre per caption; the centres do not depend on ``seed``."""
    centres = F.normalize(torch.randn(captions, 1, 32, generator=torch.Generator().manual_seed(99)), dim=-1)
    noise = torch.randn(captions, samples, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5
    return F.normalize(centres + spread * noise, dim=-1)


def test_a_perfect_prior_is_calibrated() -> None:
    """E cos(sample, true) = E cos(sample, sample′) = ‖m‖², and E cos(m, true) = ‖m‖."""
    true = draw(2000, 1, spread=0.8, seed=0)[:, 0]
    samples = draw(2000, 64, spread=0.8, seed=1)
    scores = calibration(samples, true)
    norm = samples.mean(1).norm(dim=-1).mean().item()
    assert scores.gap.mean().item() == pytest.approx(0, abs=0.005)
    assert scores.to_true.mean().item() == pytest.approx(norm**2, abs=0.01)
    assert scores.mean_norm.mean().item() == pytest.approx(norm, abs=0.005)
    assert scores.mean_to_true.mean().item() == pytest.approx(norm, abs=0.01)


def test_collapse_raises_the_cosine_to_the_truth_and_shows_in_the_gap() -> None:
    true = draw(500, 1, spread=0.8, seed=0)[:, 0]
    good, collapsed, wide = (calibration(draw(500, 8, spread, seed=1), true) for spread in (0.8, 0.1, 1.6))
    assert collapsed.to_true.mean() > good.to_true.mean()
    assert collapsed.gap.mean() < -0.1 < good.gap.mean() < 0.1 < wide.gap.mean()


def test_mean_norm_does_not_depend_on_the_number_of_samples() -> None:
    true = draw(3000, 1, spread=0.5, seed=0)[:, 0]
    few, many = (calibration(draw(3000, count, 0.5, seed=1), true).mean_norm.mean().item() for count in (2, 64))
    assert few == pytest.approx(many, abs=0.005)


def test_cosine_to_true_takes_one_or_many_samples_of_any_scale() -> None:
    true = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosine_to_true(3 * true, true), torch.ones(6))
    both = torch.stack([5 * true, -true], dim=1)
    torch.testing.assert_close(cosine_to_true(both, true), torch.zeros(6))
