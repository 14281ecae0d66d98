"""DDIM inversion: the noise of a given picture, and the way back (Dhariwal & Nichol 2021, appendix F)."""

import math

import torch
from torch import Tensor

from unclip_pl.diffusion.process import noise_like
from unclip_pl.diffusion.sampling import Denoise, Grid, Progress, ddim_path, time_grid, time_of
from unclip_pl.diffusion.schedule import CosineSchedule, Schedule, per_sample
from unclip_pl.errors import InputError


def check_eta(eta: float) -> float:
    """The number itself.

    Raises:
        ValueError: it lies outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"Expected 0 <= eta <= 1. Got {eta}.")
    return eta


class Inversion:
    """DDIM's grid walked in both directions between the same two noise levels.

    The data are taken to be at the lowest level already, as in OpenAI's code, and are read off at that level again: so
    what the network cannot say of a picture, which is in its noise, comes back too.

    Args:
        steps: of the whole grid.
        sigma_min: skip the grid's times with less noise. Noise that an x0-predicting network sees in clean data is
            its error times alpha / sigma, 156 at the first index: give 0.05 or more there, 0 for an eps-predicting one.
        schedule: of the training diffusion; cosine when None.
        grid: see `time_grid`.
        train_steps: T of the training diffusion.

    Raises:
        ValueError: no time of the grid has that much noise.
    """

    def __init__(
        self,
        steps: int = 100,
        sigma_min: float = 0.0,
        schedule: Schedule | None = None,
        grid: Grid = "strided",
        train_steps: int = 1000,
    ) -> None:
        self.schedule = schedule or CosineSchedule()
        times = torch.tensor(time_grid(steps, grid, train_steps)[:-1], dtype=torch.float64, device="cpu")
        sigmas = self.schedule.alpha_sigma(times)[1]
        if not (sigmas >= sigma_min).any():
            raise InputError(f"Expected sigma_min below 1. Got {sigma_min}.")
        self.times: list[float] = times[sigmas >= sigma_min].tolist()  # from 1 down to the lowest level
        self._ends = (float(sigmas[0]), float(sigmas[len(self.times) - 1]))

    @torch.no_grad()
    def invert(self, denoise: Denoise, x0: Tensor, *, progress: Progress | None = None) -> Tensor:
        """The x_T (B, ...) from which :meth:`restore` comes back to x0, up to the step size.

        Exact only as steps grow, and less so the stronger the guidance; use float32.

        Args:
            denoise: as for `Sampler.sample`.
            x0: data, (B, ...).
            progress: called after each step as progress(steps done, steps, x0).
        """
        x_t, levels = x0, self.times[::-1]
        path = ddim_path(self.schedule, levels)
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
        *,
        eta: float = 0.0,
        own: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Data from x_T.

        At the lowest level there is still noise: the picture's own, to be kept, and what eta > 0 has put in, to be
        removed. The former has a share of `survival`² of the variance: as much of it is kept, of what sets the lowest
        level apart from the estimate of x0.

        Args:
            denoise: as for `Sampler.sample`.
            x_T: noise, (B, ...).
            eta: 0 is deterministic, 1 is ancestral sampling.
            own: how much of x_T's noise belongs to the picture, one number or (B,): 1 for an inverted x_T and the
                condition that it was inverted under, 0 for drawn noise, whose result is the estimate of x0 as in
                `Sampler.sample`.
            generator: of the noise, where eta > 0.
            progress: called after each step as progress(steps done, steps, x0).

        Raises:
            ValueError: eta outside [0, 1].
        """
        check_eta(eta)
        x_t, path = x_T, ddim_path(self.schedule, self.times, eta)
        whole = eta == 0 and not isinstance(own, Tensor) and own == 1
        steps = len(path) + (0 if whole else 1)
        for i, (t, step) in enumerate(zip(self.times, path, strict=False)):
            denoised = denoise(x_t, time_of(t, x_t))
            x_t = step.c_x0 * denoised.x0 + step.c_xt * x_t
            if eta > 0:
                x_t = x_t + step.std * noise_like(x_t, generator=generator)
            if progress is not None:
                progress(i + 1, steps, denoised.x0)
        if whole:
            return x_t
        x0 = denoise(x_t, time_of(self.times[-1], x_t)).x0
        if progress is not None:
            progress(steps, steps, x0)
        kept = own * self.survival(eta) ** 2
        return x0.lerp(x_t, per_sample(kept.to(x0), x0) if isinstance(kept, Tensor) else kept)

    def survival(self, eta: float) -> float:
        """Weight, in [0, 1], of x_T's own noise in the noise of the lowest level; eta puts fresh noise in the rest."""
        first, last = self._ends
        return min(1.0, math.prod(step.c_xt for step in ddim_path(self.schedule, self.times, eta)) * first / last)
