"""Inpainting by every solver, on denoisers whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import (
    DDIM,
    Ancestral,
    CosineSchedule,
    Denoised,
    DPMSolver,
    GaussianDiffusion,
    Heun,
    Inpaint,
    Sampler,
    StraightPath,
)
from unclip_pl.diffusion.schedule import per_sample

SAMPLERS = [DDIM(6), DDIM(6, 0.5), Ancestral(6), DPMSolver(6), DPMSolver(6, 1.0), Heun(4)]
KNOWN = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
HALF = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
HALF[..., 4:] = True


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    return Denoised(torch.sin(2 * x_t + 3 * per_sample(t, x_t)), torch.cos(x_t))


def drawn(sampler: Sampler, diffusion: GaussianDiffusion) -> Tensor:
    x_T = torch.randn(KNOWN.shape, generator=generator(1))
    return sampler.sample(random_denoise, x_T, diffusion, generator=generator(2))


@pytest.mark.parametrize("jumps", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: f"{type(sampler).__name__}-{sampler.steps}")
def test_the_known_comes_back_and_the_open_is_drawn(sampler: Sampler, jumps: int) -> None:
    if jumps and isinstance(sampler, Heun):
        with pytest.raises(ValueError, match=r"one look a step, for jumps. Got Heun: set jumps to 0"):
            Inpaint(sampler, KNOWN, HALF, jumps)
        return
    for diffusion in (GaussianDiffusion(), GaussianDiffusion(StraightPath(), "velocity")):
        plain = drawn(sampler, diffusion)
        half = drawn(Inpaint(sampler, KNOWN, HALF, jumps), diffusion)
        assert torch.equal(half[..., :4], KNOWN[..., :4])
        assert not torch.equal(half[..., 4:], KNOWN[..., 4:])
        assert torch.equal(drawn(Inpaint(sampler, KNOWN, HALF & False, jumps), diffusion), KNOWN)
        assert torch.equal(drawn(Inpaint(sampler, KNOWN, HALF | True, jumps), diffusion), plain)


def test_another_number_of_steps() -> None:
    given, fewer = Inpaint(DDIM(6, 0.5), KNOWN, HALF, 2), Inpaint(DDIM(3, 0.5), KNOWN, HALF, 2)
    assert torch.equal(drawn(given.with_steps(3), GaussianDiffusion()), drawn(fewer, GaussianDiffusion()))
    assert given.solver.steps == 6


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_network_sees_the_known_at_the_level_of_its_noise(eta: float) -> None:
    """x_t at the known pixels is alpha x0 + sigma n: what a network was trained to look at, after the first step."""
    diffusion, known = GaussianDiffusion(), torch.full((1, 1, 200, 200), 0.7, dtype=torch.float64)
    mask = torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    mask[..., 0] = True

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (c.item() for c in diffusion.schedule.alpha_sigma(t.double()))
        seen = x_t[~mask]
        assert seen.mean().item() == pytest.approx(alpha * 0.7, abs=0.03)
        assert seen.std().item() == pytest.approx(sigma, rel=0.02)
        return Denoised(torch.zeros_like(x_t))

    x_T = torch.randn(known.shape, dtype=torch.float64, generator=generator(0))
    for jumps in (0, 1):
        Inpaint(DDIM(12, eta), known, mask, jumps).sample(denoise, x_T, diffusion, generator=generator(1))


def test_jumps_make_the_open_part_fit_the_known() -> None:
    """Two numbers of correlation 0.95, one of them known: without jumps the other one regards it too little."""
    rho, diffusion, n = 0.95, GaussianDiffusion(), 4000
    cov = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (c[0].item() for c in CosineSchedule().alpha_sigma(t.double()))
        return Denoised(x_t @ (alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2))).T)

    known = torch.randn(n, 2, dtype=torch.float64, generator=generator(0))
    mask = torch.tensor([False, True]).expand(n, 2)
    x_T = torch.randn(n, 2, dtype=torch.float64, generator=generator(1))

    def correlation(jumps: int) -> float:
        x = Inpaint(Ancestral(20), known, mask, jumps).sample(denoise, x_T, diffusion, generator=generator(2))
        return torch.corrcoef(x.T)[0, 1].item()

    few, many = correlation(0), correlation(10)
    assert few < many
    assert many == pytest.approx(rho, abs=0.03)


def test_steps_and_looks_are_the_solvers() -> None:
    diffusion, seen = GaussianDiffusion(), []
    sampler = Inpaint(DDIM(5), KNOWN, HALF, 2)
    assert len(sampler.looks(diffusion)) == 4 * 3 + 1
    x_T = torch.randn(KNOWN.shape, generator=generator(1))
    sampler.sample(random_denoise, x_T, diffusion, progress=lambda *told: seen.append(told[:2]))
    assert seen == [(i + 1, 13) for i in range(13)]
    assert len(Inpaint(Heun(4), KNOWN, HALF).looks(diffusion)) == 7
    with pytest.raises(ValueError, match=r"jumps >= 0. Got -1"):
        Inpaint(DDIM(5), KNOWN, HALF, -1)
    with pytest.raises(ValueError, match="learned its variance"):
        Inpaint(Ancestral(5, "learned"), KNOWN, HALF).check(diffusion)
    assert math.isclose(sampler.times(diffusion)[0], 1)
