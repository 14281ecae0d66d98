"""DDIM inversion: the noise of a given picture, and the way back (Dhariwal & Nichol 2021, appendix F)."""

import math

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoise, GaussianDiffusion, noise_like
from unclip_pl.diffusion.schedule import per_sample
from unclip_pl.diffusion.solvers import Grid, Progress, check_eta, ddim_path, time_grid, time_of
from unclip_pl.errors import InputError


class Inversion:
    """DDIM's grid walked in both directions between the same two noise levels.

    The data are taken to be at the lowest level already, as in OpenAI's code, and are read off at that level again. So
    what the network cannot say of a picture, which is in its noise, comes back too.

    Args:
        steps: number of times of the whole grid.
        sigma_min: lowest noise level; the grid's times below it are skipped. The noise that an x0-predicting network
            sees in clean data is its error times alpha / sigma, 156 at the first index: give 0.05 or more there, and 0
            for an eps-predicting one.
        grid: spacing of the times, see `time_grid`.

    Raises:
        InputError: sigma_min is not below 1.
    """

    def __init__(self, steps: int = 100, sigma_min: float = 0.0, grid: Grid = "strided") -> None:
        if not sigma_min < 1:
            raise InputError(f"Expected sigma_min below 1. Got {sigma_min}: give 0.05, or 0 for an eps-predictor.")
        self.steps = steps
        self.sigma_min = sigma_min
        self.grid: Grid = grid

    def times(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times that it visits, from the first down to the lowest level."""
        grid = time_grid(self.steps, self.grid, diffusion.steps, diffusion.schedule)[:-1]
        times = torch.tensor(grid, dtype=torch.float64, device="cpu")
        return times[diffusion.schedule.alpha_sigma(times)[1] >= self.sigma_min].tolist()

    @torch.no_grad()
    def invert(
        self, denoise: Denoise, x0: Tensor, diffusion: GaussianDiffusion, *, progress: Progress | None = None
    ) -> Tensor:
        """Return the x_T (B, ...) from which :meth:`restore` comes back to x0, up to the step size.

        Exact only as steps grow, and less so the stronger the guidance; use float32.

        Args:
            denoise: estimates x0 from x_t and t, as for `Sampler.sample`.
            x0: data, (B, ...).
            diffusion: diffusion of the network's training.
            progress: called after each step as progress(steps done, steps, x0).
        """
        x_t, levels = x0, self.times(diffusion)[::-1]
        path = ddim_path(diffusion.schedule, levels)
        for i, (t, step) in enumerate(zip(levels, path, strict=False)):  # the last level is reached, not left
            denoised = denoise(x_t, time_of(t, x_t))
            x_t = step.c_x0 * denoised.x0 + step.c_xt * x_t
            if progress is not None:
                progress(i + 1, len(path), denoised.x0)
        return x_t

    @torch.no_grad()
    def restore(
        self,
        denoise: Denoise,
        x_T: Tensor,
        diffusion: GaussianDiffusion,
        *,
        eta: float = 0.0,
        own: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return data from x_T.

        The lowest level still holds noise: the picture's own, which is kept, and fresh noise of eta > 0, which is
        removed. The picture's own has a share of the variance, the square of `survival`. The same share is kept of the
        difference between the lowest level and the estimate of x0.

        Args:
            denoise: estimates x0 from x_t and t, as for `Sampler.sample`.
            x_T: noise, (B, ...).
            diffusion: diffusion of the network's training.
            eta: share of fresh noise; 0 is deterministic, 1 is ancestral sampling.
            own: share of x_T's noise that belongs to the picture, one number or (B,): 1 for an inverted x_T and the
                condition that it was inverted under, 0 for drawn noise, whose result is the estimate of x0 as in
                `Sampler.sample`.
            generator: source of the fresh noise.
            progress: called after each step as progress(steps done, steps, x0).

        Raises:
            InputError: eta outside [0, 1].
        """
        check_eta(eta)
        times = self.times(diffusion)
        x_t, path = x_T, ddim_path(diffusion.schedule, times, eta)
        whole = eta == 0 and not isinstance(own, Tensor) and own == 1
        steps = len(path) + (0 if whole else 1)
        for i, (t, step) in enumerate(zip(times, path, strict=False)):
            denoised = denoise(x_t, time_of(t, x_t))
            x_t = step.c_x0 * denoised.x0 + step.c_xt * x_t
            if eta > 0:
                x_t = x_t + step.std * noise_like(x_t, generator=generator)
            if progress is not None:
                progress(i + 1, steps, denoised.x0)
        if whole:
            return x_t
        x0 = denoise(x_t, time_of(times[-1], x_t)).x0
        if progress is not None:
            progress(steps, steps, x0)
        kept = own * self.survival(diffusion, eta) ** 2
        return x0.lerp(x_t, per_sample(kept.to(x0), x0) if isinstance(kept, Tensor) else kept)

    def survival(self, diffusion: GaussianDiffusion, eta: float) -> float:
        """Return the weight, in [0, 1], of x_T's own noise in the lowest level's; eta puts fresh noise in the rest."""
        times = self.times(diffusion)
        sigma = diffusion.schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64, device="cpu"))[1].tolist()
        kept = math.prod(step.c_xt for step in ddim_path(diffusion.schedule, times, eta))
        return min(1.0, kept * sigma[0] / sigma[-1])
