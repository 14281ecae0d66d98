"""The solver of the tutorial is DDIM at both of its ends, and keeps the mean of a Gaussian in between."""

import runpy

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM, Denoised, GaussianDiffusion, Sampler
from unclip_pl.errors import InputError

EarlyNoise = runpy.run_path("examples/early_noise.py")["EarlyNoise"]
MEAN, VARIANCE = 2.0, 0.25
DIFFUSION = GaussianDiffusion()


def exact(x_t: Tensor, t: Tensor) -> Denoised:
    """Return the mean of x0 given x_t for data from N(2, 0.25)."""
    alpha, sigma = DIFFUSION.schedule.alpha_sigma(t[:, None])
    gain = alpha * VARIANCE / (alpha.square() * VARIANCE + sigma.square())
    return Denoised(MEAN + gain * (x_t - alpha * MEAN))


def drawn(solver: Sampler) -> Tensor:
    x_T = torch.randn(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return solver.sample(exact, x_T, DIFFUSION, generator=torch.Generator().manual_seed(1))


def test_its_ends_are_ddim() -> None:
    assert torch.equal(drawn(EarlyNoise(20, until=1.0)), drawn(DDIM(20)))
    assert torch.equal(drawn(EarlyNoise(20, eta=0.7, until=0.0)), drawn(DDIM(20, eta=0.7)))


def test_between_them_it_draws_the_gaussian_too() -> None:
    x0 = drawn(EarlyNoise(200))
    assert not torch.equal(x0, drawn(DDIM(200)))
    assert x0.mean().item() == pytest.approx(MEAN, abs=4 * (VARIANCE / 4096) ** 0.5)
    assert x0.var().item() == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize("settings", [{"eta": 2.0}, {"until": -0.1}, {"until": 1.1}, {"steps": 0}])
def test_it_refuses_what_makes_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="Expected"):
        EarlyNoise(**settings)
