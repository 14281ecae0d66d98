import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from unclip_pl.metrics.neighbours import precision_recall


def test_agrees_with_torch_fidelity_which_takes_generated_first() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1300, 6, generator=generator)  # more rows than one chunk
    fake = 0.7 * torch.randn(700, 6, generator=generator) + 0.3
    scores = precision_recall(real, fake)
    reference = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    assert scores.precision.item() == pytest.approx(reference["precision"])
    assert scores.recall.item() == pytest.approx(reference["recall"])
    assert scores.precision > scores.recall  # shrunk towards the middle


def test_precision_and_recall_trade_places_with_the_sides() -> None:
    a, b = torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(0))
    forth, back = precision_recall(a, 0.5 * b), precision_recall(0.5 * b, a)
    assert (forth.precision, forth.recall) == (back.recall, back.precision)


def test_equal_sets_score_one_even_with_duplicates() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1)  # every radius is 0
    scores = precision_recall(features, features)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)


def test_density_and_coverage_on_a_line() -> None:
    """Real at 0, 1, 2, 3 with k = 1: balls of radius 1. Five generated at 0: in the balls of 0 and 1."""
    real, fake = torch.arange(4.0)[:, None], torch.zeros(5, 1)
    scores = precision_recall(real, fake, k=1)
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (1, 0.25, 2, 0.5)


def test_far_sets_score_zero() -> None:
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features + 100) == (0, 0, 0, 0)


def test_density_and_coverage_of_one_distribution_are_what_theory_says() -> None:
    """Naeem et al. (2020), eq. 5-6: E density = 1; E coverage → 1 − 2⁻ᵏ for equally many samples."""
    real, fake = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    scores = precision_recall(real, fake, k=3)
    assert scores.density.item() == pytest.approx(1, abs=0.05)
    assert scores.coverage.item() == pytest.approx(1 - 2**-3, abs=0.03)


def test_too_few_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(10, 2))
