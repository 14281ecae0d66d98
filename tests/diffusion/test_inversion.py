"""DDIM inversion on a Gaussian, whose exact flow is known: there, and back."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM, Ancestral, CosineSchedule, Denoised, GaussianDiffusion, Inversion, StraightPath
from unclip_pl.diffusion.schedule import per_sample
from unclip_pl.diffusion.solvers import Grid

MEAN, VAR = 2.0, 0.25
DIFFUSION = GaussianDiffusion()
X0 = MEAN + math.sqrt(VAR) * torch.randn(256, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
QUANTILE = (X0 - MEAN) / math.sqrt(VAR)


def gaussian_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    """E[x0 | x_t] for data ~ N(MEAN, VAR)."""
    alpha, sigma = (per_sample(c, x_t) for c in CosineSchedule().alpha_sigma(t))
    gain = alpha * VAR / (alpha.square() * VAR + sigma.square())
    return Denoised(MEAN + gain * (x_t - alpha * MEAN))


def wrong_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    """An x0-predicting network with an error of 0.01, which is 156 times that in the noise at the first index."""
    return Denoised(gaussian_denoise(x_t, t).x0 + 0.01 * torch.sin(50 * x_t))


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def trip(steps: int, grid: Grid = "strided", sigma_min: float = 0.0) -> float:
    inversion = Inversion(steps, sigma_min, grid=grid)
    return rms(inversion.restore(gaussian_denoise, inversion.invert(gaussian_denoise, X0, DIFFUSION), DIFFUSION) - X0)


@pytest.mark.parametrize("grid", ["strided", "uniform"])
def test_round_trip_is_first_order(grid: Grid) -> None:
    errors = [trip(steps, grid) for steps in (50, 200, 800)]
    assert errors[0] < 0.04
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5


def test_finds_the_noise() -> None:
    """The exact flow of a Gaussian maps x0 to its quantile, (x0 - MEAN) / sqrt(VAR)."""
    x_T = Inversion(1000).invert(gaussian_denoise, X0, DIFFUSION)
    torch.testing.assert_close(x_T, QUANTILE, rtol=0, atol=0.02)


def test_walks_between_the_same_two_levels() -> None:
    levels: list[float] = []

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        levels.append(CosineSchedule().alpha_sigma(t)[1][0].item())
        return gaussian_denoise(x_t, t)

    inversion = Inversion(100, 0.05)
    x_T = inversion.invert(denoise, X0, DIFFUSION)
    assert 0.05 <= levels[0] < 0.08
    assert levels == sorted(levels)
    up = len(levels)
    assert rms(inversion.restore(denoise, x_T, DIFFUSION) - X0) < 0.03
    assert levels[up:] == sorted(levels[up:], reverse=True)
    assert min(levels) == levels[0]


def test_sigma_min_tames_an_x0_network() -> None:
    def error(sigma_min: float) -> float:
        return rms(Inversion(500, sigma_min).invert(wrong_denoise, X0, DIFFUSION) - QUANTILE)

    assert error(0.05) < error(0.0)


def test_what_the_network_cannot_say_comes_back() -> None:
    """Read off as an estimate of x0, a picture has lost the network's error; read off at its level, it has not."""
    inversion = Inversion(500, 0.05)
    x_T = inversion.invert(wrong_denoise, X0, DIFFUSION)
    own, estimate = (rms(inversion.restore(wrong_denoise, x_T, DIFFUSION, own=own) - X0) for own in (1.0, 0.0))
    assert own < 0.5 * estimate


def test_drawn_noise_is_sampled_as_ddim_does() -> None:
    x_T = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for eta in (0.0, 0.5):
        ours = Inversion(20).restore(
            gaussian_denoise, x_T, DIFFUSION, eta=eta, own=0.0, generator=torch.Generator().manual_seed(2)
        )
        ddim = DDIM(20, eta).sample(gaussian_denoise, x_T, DIFFUSION, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(ours, ddim, rtol=0, atol=0)


def test_what_survives_fresh_noise() -> None:
    """All of x_T's noise at eta = 0; at eta = 1, ancestral sampling, the ratio of the signal-to-noise ratios' roots."""
    inversion = Inversion(100, 0.05)
    times = inversion.times(DIFFUSION)
    ends = torch.tensor([times[0], times[-1]], dtype=torch.float64)
    alpha, sigma = CosineSchedule().alpha_sigma(ends)
    snr = alpha / sigma
    assert inversion.survival(DIFFUSION, 0.0) == pytest.approx(1)
    assert inversion.survival(DIFFUSION, 1.0) == pytest.approx((snr[0] / snr[1]).item())
    shares = [inversion.survival(DIFFUSION, eta) for eta in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert shares == sorted(shares, reverse=True)


def test_fresh_noise_makes_new_data_of_the_same_distribution() -> None:
    inversion, n = Inversion(250), 20_000
    x0 = MEAN + math.sqrt(VAR) * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x_T = inversion.invert(gaussian_denoise, x0, DIFFUSION)
    varied = inversion.restore(gaussian_denoise, x_T, DIFFUSION, eta=1.0, generator=torch.Generator().manual_seed(4))
    fresh = Ancestral(250).sample(gaussian_denoise, x_T, DIFFUSION, generator=torch.Generator().manual_seed(4))
    assert varied.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert varied.var().item() == pytest.approx(fresh.var().item(), abs=0.01)
    assert torch.corrcoef(torch.cat([varied, x0], dim=1).T)[0, 1].abs() < 0.05


def test_a_straight_path_leads_to_the_noise_and_back() -> None:
    """Its last level is all noise, of alpha 0: a sample's x_T is its quantile, and the way back ends at it."""
    diffusion = GaussianDiffusion(StraightPath(), "velocity")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (per_sample(c, x_t) for c in diffusion.schedule.alpha_sigma(t))
        return Denoised(MEAN + alpha * VAR / (alpha.square() * VAR + sigma.square()) * (x_t - alpha * MEAN))

    inversion = Inversion(400)
    x_T = inversion.invert(denoise, X0, diffusion)
    torch.testing.assert_close(x_T, QUANTILE, rtol=0, atol=0.02)
    assert rms(inversion.restore(denoise, x_T, diffusion) - X0) < 0.01


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_min below 1. Got 1.5"):
        Inversion(10, 1.5)
    with pytest.raises(ValueError, match=r"0 <= eta <= 1. Got 1.5"):
        Inversion(10).restore(gaussian_denoise, X0, DIFFUSION, eta=1.5)
