"""Samplers: from noise to data, given only `denoise(x_t, t) -> Denoised`; guidance and thresholds wrap it."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoised, GaussianDiffusion, noise_like
from unclip_pl.diffusion.schedule import CosineSchedule, Schedule, per_sample
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams

Denoise: TypeAlias = Callable[[Tensor, Tensor], Denoised]  # x_t (B, ...), t (B,) in (0, 1]
Grid: TypeAlias = Literal["strided", "uniform"]
Variance: TypeAlias = Literal["small", "large", "learned", "analytic"]
Progress: TypeAlias = Callable[[int, int, Tensor], None]  # steps done, steps, the estimate of x0


def check_guidance(scale: float) -> float:
    """The scale itself.

    Raises:
        ValueError: it is negative: away from the caption.
    """
    if not scale >= 0:
        raise InputError(f"Expected guidance >= 0 (1 is off, 0 ignores the condition). Got {scale}.")
    return scale


def guided(denoise_both: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance, Ho & Salimans (2022): away from the unconditional estimate of x0.

    Args:
        denoise_both: sees x_t and t twice, (2B, ...): the first half is to be conditioned, the second is not.
        scale: 1 is off, 0 ignores the condition. It acts on the mean only: the learned variance stays conditional.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = denoise_both(torch.cat([x_t, x_t]), torch.cat([t, t]))
        cond, uncond = x0.chunk(2)
        return Denoised(uncond.lerp(cond, scale), None if frac is None else frac.chunk(2)[0])

    return denoise


def clip_x0(denoise: Denoise, bound: float = 1.0) -> Denoise:
    """Clamp the estimate of x0 to [-bound, bound]."""

    def clipped(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = denoise(x_t, t)
        return Denoised(x0.clamp(-bound, bound), frac)

    return clipped


def dynamic_threshold(denoise: Denoise, quantile: float = 0.995) -> Denoise:
    """Clamp each sample's x0 to s = max(1, quantile of |x0|) and divide by s, Saharia et al. (2022), section 2.3."""

    def thresholded(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = denoise(x_t, t)
        size = x0.flatten(1).abs()
        rank = max(1, math.ceil(quantile * size.shape[1]))  # torch.quantile refuses large images
        s = per_sample(size.kthvalue(rank, dim=1).values.clamp(min=1), x0)
        return Denoised(x0.clamp(-s, s) / s, frac)

    return thresholded


def time_grid(steps: int, grid: Grid, train_steps: int = 1000) -> list[float]:
    """The times that a sampler of n steps visits, from 1 down, and 0 after them: n + 1 numbers.

    Args:
        steps: n, network evaluations.
        grid: `strided`, the training indices round(i (T - 1) / (n - 1)), i < n, the paper's; or `uniform`, i / n.
        train_steps: T; index k is the time (k + 1) / T.

    Raises:
        ValueError: steps < 1, more steps than training steps, or an unknown grid.
    """
    if not 1 <= steps <= train_steps:
        raise InputError(f"Expected from 1 to {train_steps} steps, the training steps. Got {steps}.")
    if grid == "uniform":
        return [i / steps for i in range(steps, -1, -1)]
    if grid != "strided":
        raise InputError(f"Expected grid 'strided' or 'uniform'. Got {grid!r}.")
    # Stride first, as Karlo and diffusers do: the order decides which way a tie such as 499.5 goes.
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 0.0
    indices = [round(i * stride) for i in range(steps - 1)] + [train_steps - 1]
    return [(k + 1) / train_steps for k in reversed(indices)] + [0.0]


class Step(NamedTuple):
    """x_s = c_x0 x0 + c_xt x_t + std n: every sampler here is this line. Python floats: no device is asked for them."""

    c_x0: float
    c_xt: float
    std: float


class Sampler(ABC):
    """Walks a grid of times from t = 1 to clean data, which is the last estimate of x0, without noise.

    Args:
        steps: network evaluations.
        grid: see `time_grid`.
        schedule: of the training diffusion; cosine when None.
        train_steps: T of the training diffusion.
    """

    def __init__(self, steps: int, grid: Grid, schedule: Schedule | None, train_steps: int) -> None:
        self.steps = steps
        self.grid = grid
        self.schedule = schedule or CosineSchedule()
        self.train_steps = train_steps
        self.times = time_grid(steps, grid, train_steps)

    def check(self, diffusion: GaussianDiffusion, *, learns_variance: bool = False) -> None:
        """Whether it walks the noise levels that a network was trained on, and asks for nothing that it did not learn.

        Args:
            diffusion: of the network's training.
            learns_variance: whether the network predicts its variance.

        Raises:
            ValueError: another schedule, another T, or a variance that the network does not know.
        """
        have = (type(self.schedule).__name__, self.train_steps)
        want = (type(diffusion.schedule).__name__, diffusion.steps)
        if have != want:
            raise InputError(
                f"Expected a sampler for (schedule, training steps) = {want}, as the network's. Got {have}."
            )

    @abstractmethod
    def step(self, i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
        """x at times[i + 1] from x_t at times[i], i < steps - 1."""

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        x_T: Tensor,
        *,
        last: Denoise | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Data (B, ...) from x_T ~ N(0, 1) of the same shape.

        Args:
            denoise: estimates x0, (B, ...), from x_t and t, (B,) in float32 (float64 if x_T is).
            x_T: the noise to start from, on the device to work on.
            last: takes the last step instead, where another network was trained for it (Karlo's upsampler).
            generator: of the noise of stochastic samplers, or one for each row. The same state gives the same bytes.
            progress: called after each step as progress(steps done, steps, x0).
        """
        x_t = x_T
        for i, t in enumerate(self.times[:-1]):
            ends = i + 1 == self.steps
            denoised = (last if ends and last is not None else denoise)(x_t, time_of(t, x_t))
            x_t = denoised.x0 if ends else self.step(i, x_t, denoised, generator)
            if progress is not None:
                progress(i + 1, self.steps, denoised.x0)
        return x_t


class Ancestral(Sampler):
    """Ho et al. (2020), algorithm 2, on any grid: draws x_s from q(x_s | x_t, x0) with the estimate for x0.

    Args:
        steps: network evaluations.
        variance: of each draw. `small`: beta_tilde. `large`: beta. `learned`: between them as `Denoised.frac` says.
            `analytic`: beta_tilde + c_x0^2 c_t, c_t the variance of x0 given x_t: exact for a Gaussian posterior of
            independent dimensions (Bao et al. 2022, eq. 8).
        grid: see `time_grid`.
        schedule: of the training diffusion; cosine when None.
        train_steps: T of the training diffusion.
        posterior_mse: c_t per training index, (T,), for `analytic`; may come later by `with_posterior_mse`.

    Raises:
        ValueError: unknown variance, or posterior_mse is not (T,) finite numbers.
    """

    def __init__(
        self,
        steps: int = 64,
        variance: Variance = "small",
        grid: Grid = "strided",
        schedule: Schedule | None = None,
        train_steps: int = 1000,
        posterior_mse: Tensor | None = None,
    ) -> None:
        super().__init__(steps, grid, schedule, train_steps)
        if variance not in ("small", "large", "learned", "analytic"):
            raise InputError(f"Expected variance 'small', 'large', 'learned' or 'analytic'. Got {variance!r}.")
        self.variance = variance
        self.posterior_mse = self._check(posterior_mse)
        self._path, self._log_ratio = self._plan()

    def with_posterior_mse(self, c_t: Tensor) -> "Ancestral":
        """A copy that knows the variance of x0 given x_t, c_t per training index, (T,)."""
        sampler = copy.copy(self)
        sampler.posterior_mse = self._check(c_t)
        sampler._path, _ = sampler._plan()
        return sampler

    def check(self, diffusion: GaussianDiffusion, *, learns_variance: bool = False) -> None:
        """As `Sampler.check`."""
        super().check(diffusion, learns_variance=learns_variance)
        if self.variance == "learned" and not learns_variance:
            raise InputError(
                "Expected a network that learned its variance, for variance='learned'. Got one that did not: sample "
                "with 'small' or 'large', or by DDIM."
            )
        if self.variance == "analytic" and self.posterior_mse is None:
            raise InputError(
                "Expected posterior_mse for variance='analytic'. Got none: diffusion priors keep it in the checkpoint, "
                "other networks sample with 'small' or 'large', or by DDIM."
            )

    def step(self, i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
        """As `Sampler.step`."""
        c_x0, c_xt, std = self._path[i]
        noise = std * noise_like(x_t, generator=generator)
        if self.variance == "learned":
            if denoised.frac is None:
                raise InputError("Expected a network that predicts its variance, for variance='learned'. Got none.")
            noise = noise * (0.5 * self._log_ratio[i] * (denoised.frac - 1)).exp()
        if self.variance == "analytic" and self.posterior_mse is None:
            raise InputError("Expected posterior_mse for variance='analytic'. Got none: see `with_posterior_mse`.")
        return c_x0 * denoised.x0 + c_xt * x_t + noise

    def _plan(self) -> tuple[list[Step], list[float]]:
        """Every step but the last, which is noise-free, and log(beta / beta_tilde) there."""
        times = torch.tensor(self.times, dtype=torch.float64, device="cpu")[:-1]
        q = self.schedule.posterior(times[:-1], times[1:])
        variance = q.beta if self.variance in ("large", "learned") else q.beta_tilde
        if self.variance == "analytic" and self.posterior_mse is not None:
            c_t = self.posterior_mse.detach().double().cpu().numpy().clip(min=0)
            index = times[:-1].numpy() * self.train_steps - 1
            variance = variance + q.c_x0.square() * torch.from_numpy(np.interp(index, np.arange(len(c_t)), c_t))
        path = torch.stack([q.c_x0, q.c_xt, variance.sqrt()], dim=1)
        return [Step(*row) for row in path.tolist()], (q.beta / q.beta_tilde).log().tolist()

    def _check(self, c_t: Tensor | None) -> Tensor | None:
        if c_t is not None and c_t.shape != (self.train_steps,):
            raise InputError(f"Expected posterior_mse of shape ({self.train_steps},). Got {tuple(c_t.shape)}.")
        if c_t is not None and not c_t.isfinite().all():
            raise InputError("Expected posterior_mse to be finite. Got nan or inf: was the network trained?")
        return c_t


class DDIM(Sampler):
    """Song et al. (2021), eq. 12 and 16, with the noise re-derived from the (clipped, guided) estimate of x0.

    Args:
        steps: network evaluations.
        eta: 0 is deterministic, 1 is `Ancestral` with the small variance.
        grid: see `time_grid`.
        schedule: of the training diffusion; cosine when None.
        train_steps: T of the training diffusion.

    Raises:
        ValueError: eta outside [0, 1].
    """

    def __init__(
        self,
        steps: int = 27,
        eta: float = 0.0,
        grid: Grid = "strided",
        schedule: Schedule | None = None,
        train_steps: int = 1000,
    ) -> None:
        super().__init__(steps, grid, schedule, train_steps)
        if not 0 <= eta <= 1:
            raise InputError(f"Expected 0 <= eta <= 1. Got {eta}.")
        self.eta = eta
        self._path = ddim_path(self.schedule, self.times[:-1], eta)

    def step(self, i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
        """As `Sampler.step`."""
        c_x0, c_xt, std = self._path[i]
        x_s = c_x0 * denoised.x0 + c_xt * x_t
        return x_s + std * noise_like(x_t, generator=generator) if self.eta > 0 else x_s


def ddim_path(schedule: Schedule, times: list[float], eta: float = 0.0) -> list[Step]:
    """The DDIM step between each two neighbouring times, in either direction if eta is 0; t > 0."""
    alphas, sigmas = schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64, device="cpu"))
    path = []
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(zip(alphas.tolist(), sigmas.tolist(), strict=True)):
        std = eta * sigma_s / sigma_t * math.sqrt(max(0.0, 1 - (alpha_t / alpha_s) ** 2))
        c_xt = math.sqrt(sigma_s**2 - std**2) / sigma_t
        path.append(Step(alpha_s - c_xt * alpha_t, c_xt, std))
    return path


def time_of(t: float, x: Tensor) -> Tensor:
    """One time for each of B samples, (B,), in float32 (float64 if x is)."""
    return torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
