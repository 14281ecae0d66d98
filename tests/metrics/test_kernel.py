"""The kernel distance against its definition, and against sets whose distance is known."""

import pytest
import torch
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.metrics import kernel
from unclip_pl.metrics.kernel import kernel_values


def test_two_points_have_the_distance_of_the_definition() -> None:
    """All of one set at e₁, all of the other at e₂: 2³ + 2³ − 2 · 1³."""
    one, other = torch.eye(3)[[0] * 5], 7 * torch.eye(3)[[1] * 5]
    assert kernel_values(one, {"other": other, "same": one})["other"].tolist() == pytest.approx([14] * 5)
    assert kernel_values(one, {"same": 3 * one})["same"].tolist() == pytest.approx([0] * 5)


def test_mean_of_the_shares_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 8, 4, generator=generator).double()
    x, y = F.normalize(real, dim=-1), F.normalize(fake, dim=-1)

    def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (1 + a @ b) ** 3

    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    total = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j]) for i, j in pairs)
    found = kernel_values(real, {"fake": fake, "twice": torch.stack([fake, real])})
    assert found["fake"].mean().item() == pytest.approx(float(total) / 56)
    assert found["twice"].mean().item() == pytest.approx(float(total) / 112)  # the mean of two seeds, one of them exact


def test_it_is_zero_on_average_for_samples_of_one_distribution_that_share_their_captions() -> None:
    """Without the pairs of one caption, what x_i and y_i share does not count."""
    generator = torch.Generator().manual_seed(0)
    estimates, halves = [], []
    for _ in range(300):
        caption, x, y = torch.randn(3, 30, 4, generator=generator).double()
        shares = kernel_values(caption + x, {"": caption + y})[""]
        estimates.append(shares.mean())
        halves.append(shares.std() / 30**0.5)
    mean, spread = torch.stack(estimates).mean(), torch.stack(estimates).std()
    assert abs(mean) < 3 * spread / 300**0.5
    assert 0.9 < torch.stack(halves).mean() / spread < 1.7  # √2 at the most


def test_the_spread_of_the_shares_is_that_of_the_estimate() -> None:
    generator = torch.Generator().manual_seed(1)
    estimates, halves = [], []
    for _ in range(300):
        x, y = torch.randn(2, 60, 3, generator=generator).double()
        shares = kernel_values(x, {"": y + torch.tensor([1.5, 0, 0])})[""]
        estimates.append(shares.mean())
        halves.append(shares.std() / 60**0.5)
    assert torch.stack(halves).mean() / torch.stack(estimates).std() == pytest.approx(1, abs=0.12)


def test_other_numbers_of_samples_are_refused() -> None:
    with pytest.raises(InputError, match="use equal numbers"):
        kernel_values(torch.randn(4, 3), {"a": torch.randn(5, 3)})
    with pytest.raises(InputError, match="2 captions at least"):
        kernel_values(torch.randn(1, 3), {"a": torch.randn(1, 3)})
