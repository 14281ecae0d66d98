"""Solvers: from noise to data, given only `denoise(x_t, t) -> Denoised` and the diffusion of the network's training.

To add one, derive from `Sampler` and write `sample`. The loop belongs to the solver, so it may look twice per step, as
`Heun` does. A solver of one estimate per step derives from `OneLook`; `DPMSolver` is one that keeps the one before.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoise, Denoised, GaussianDiffusion, noise_like
from unclip_pl.diffusion.schedule import CosineSchedule, Schedule
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams

Grid: TypeAlias = Literal["strided", "uniform", "karras"]
Variance: TypeAlias = Literal["small", "large", "learned", "analytic"]
Progress: TypeAlias = Callable[[int, int, Tensor], None]  # steps done, steps, the estimate of x0


#: Highest noise level and exponent of the grid of Karras et al. (2022), table 1.
TOP_LEVEL, RHO = 80.0, 7.0


def time_grid(steps: int, grid: Grid, train_steps: int = 1000, schedule: Schedule | None = None) -> list[float]:
    """Return the times that a solver of n steps visits, falling, and 0 after them: n + 1 numbers.

    Args:
        steps: n, the number of times.
        grid: `strided`, the training indices round(i (T - 1) / (n - 1)), i < n, the paper's; `uniform`, i / n; both
            begin at 1. Or `karras`, noise levels sigma / alpha whose 7th roots are evenly spaced, from 80, or the
            schedule's highest, down to that of the first training time (Karras et al. 2022, eq. 5).
        train_steps: T, the number of training times; index k is the time (k + 1) / T.
        schedule: schedule that `karras` takes the levels from; cosine when None.

    Raises:
        InputError: steps < 1, more steps than training steps, or an unknown grid.
    """
    if not 1 <= steps <= train_steps:
        raise InputError(f"Expected from 1 to {train_steps} steps, the training steps. Got {steps}: change steps.")
    if grid == "uniform":
        return [i / steps for i in range(steps, -1, -1)]
    if grid == "karras":
        return [*_karras_times(steps, train_steps, schedule or CosineSchedule()), 0.0]
    if grid != "strided":
        raise InputError(f"Expected grid 'strided', 'uniform' or 'karras'. Got {grid!r}: choose one of them.")
    # Stride first, as Karlo and diffusers do: the order decides which way a tie such as 499.5 goes.
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 0.0
    indices = [round(i * stride) for i in range(steps - 1)] + [train_steps - 1]
    return [(k + 1) / train_steps for k in reversed(indices)] + [0.0]


def _karras_times(steps: int, train_steps: int, schedule: Schedule) -> list[float]:
    above = torch.ones(steps, dtype=torch.float64, device="cpu")
    below = above / train_steps
    lowest, highest = schedule.level(below[0]).item(), min(TOP_LEVEL, schedule.level(above[0]).item())
    roots = torch.linspace(highest ** (1 / RHO), lowest ** (1 / RHO), steps, dtype=torch.float64, device="cpu")
    levels = roots**RHO
    for _ in range(60):  # halves the bracket: a schedule need not know its inverse
        middle = (below + above) / 2
        low = schedule.level(middle) < levels
        below, above = torch.where(low, middle, below), torch.where(low, above, middle)
    return above.tolist()


def first_of(x_T: Tensor, time: float, schedule: Schedule) -> Tensor:
    """Return x at the first time, which is all noise: x_T itself where the schedule preserves the variance."""
    return x_T * schedule.power(torch.tensor(time, dtype=torch.float64, device="cpu")).sqrt().item()


def time_of(t: float, x: Tensor) -> Tensor:
    """Return one time for each of B samples, (B,), in float32 (float64 if x is)."""
    return torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


class Sampler(ABC):
    """A solver: walks a grid of times from noise to clean data.

    Args:
        steps: number of times that it visits.
        grid: spacing of the times, see `time_grid`.
    """

    def __init__(self, steps: int, grid: Grid) -> None:
        time_grid(min(steps, 1000), grid)  # refuses what no diffusion could follow
        self.steps = steps
        self.grid: Grid = grid

    def times(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times that it visits, falling, and 0 after them."""
        return time_grid(self.steps, self.grid, diffusion.steps, diffusion.schedule)

    def looks(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times at which it asks the network, in order."""
        return self.times(diffusion)[:-1]

    def with_steps(self, steps: int) -> Self:
        """Return the same solver with another number of steps.

        Raises:
            InputError: steps < 1.
        """
        time_grid(min(steps, 1000), self.grid)
        other = copy.copy(self)
        other.steps = steps
        return other

    def check(self, diffusion: GaussianDiffusion, *, learns_variance: bool = False) -> None:
        """Refuse a network that was not trained for what the solver asks of it.

        Args:
            diffusion: diffusion of the network's training.
            learns_variance: whether the network predicts its variance.

        Raises:
            InputError: more steps than in training, or a variance that nobody knows.
        """
        self.times(diffusion)

    @abstractmethod
    def sample(
        self,
        denoise: Denoise,
        x_T: Tensor,
        diffusion: GaussianDiffusion,
        *,
        last: Denoise | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw data (B, ...) from x_T ~ N(0, 1) of the same shape; call it without gradients.

        Args:
            denoise: estimates x0, (B, ...), from x_t and t, (B,) in float32 (float64 if x_T is).
            x_T: noise to start from, on the device to work on.
            diffusion: diffusion of the network's training.
            last: takes the last step instead, where another network was trained for it (Karlo's upsampler).
            generator: source of a stochastic solver's noise, or one for each row. The same state gives the same bytes.
            progress: called after each step as progress(steps done, steps, x0).
        """


StepFunction: TypeAlias = Callable[[int, Tensor, Denoised, Streams | None], Tensor]


class OneLook(Sampler):
    """A solver of one estimate per time. The last estimate is the sample."""

    @abstractmethod
    def plan(self, times: list[float], diffusion: GaussianDiffusion) -> StepFunction:
        """Return step(i, x_t, denoised, generator), which makes x at times[i + 1] of x_t at times[i]."""

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        x_T: Tensor,
        diffusion: GaussianDiffusion,
        *,
        last: Denoise | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw data as `Sampler.sample` describes."""
        times = self.times(diffusion)
        x_t, step = first_of(x_T, times[0], diffusion.schedule), self.plan(times, diffusion)
        for i, t in enumerate(times[:-1]):
            ends = i + 1 == self.steps
            denoised = (last if ends and last is not None else denoise)(x_t, time_of(t, x_t))
            x_t = denoised.x0 if ends else step(i, x_t, denoised, generator)
            if progress is not None:
                progress(i + 1, self.steps, denoised.x0)
        return x_t


class Ancestral(OneLook):
    """Ho et al. (2020), algorithm 2, on any grid: draws x_s from q(x_s | x_t, x0) with the estimate for x0.

    Args:
        steps: number of times that it visits, one network evaluation each.
        variance: variance of each draw. `small`: beta_tilde. `large`: beta. `learned`: between them as `Denoised.frac`
            says, and beta at most. `analytic`: beta_tilde + c_x0^2 c_t with c_t = `GaussianDiffusion.posterior_mse`,
            the variance of x0 given x_t: exact for a Gaussian posterior of independent dimensions (Bao et al. 2022,
            eq. 8).
        grid: spacing of the times, see `time_grid`.

    Raises:
        InputError: unknown variance or grid, or steps < 1.
    """

    def __init__(self, steps: int = 64, variance: Variance = "small", grid: Grid = "strided") -> None:
        super().__init__(steps, grid)
        if variance not in ("small", "large", "learned", "analytic"):
            raise InputError(
                f"Expected variance 'small', 'large', 'learned' or 'analytic'. Got {variance!r}: choose one of them."
            )
        self.variance: Variance = variance

    def check(self, diffusion: GaussianDiffusion, *, learns_variance: bool = False) -> None:
        """Refuse a network without the variance that is asked for, see `Sampler.check`."""
        super().check(diffusion, learns_variance=learns_variance)
        if self.variance == "learned" and not learns_variance:
            raise InputError(
                "Expected a network that learned its variance, for variance='learned'. Got one that did not: sample "
                "with 'small' or 'large', or by DDIM."
            )
        if self.variance == "analytic":
            _posterior_mse(diffusion)

    def plan(self, times: list[float], diffusion: GaussianDiffusion) -> StepFunction:
        """Return the step, with its coefficients computed in float64."""
        t = torch.tensor(times, dtype=torch.float64, device="cpu")[:-1]
        q, power = diffusion.schedule.posterior(t[:-1], t[1:]), diffusion.schedule.power(t)
        beta = q.beta * (power[1:] / power[:-1])  # in the units of x_s: the same where the variance is preserved
        variance = beta if self.variance in ("large", "learned") else q.beta_tilde
        if self.variance == "analytic":
            c_t = _posterior_mse(diffusion).detach().double().cpu().numpy().clip(min=0)
            index = t[:-1].numpy() * diffusion.steps - 1
            variance = variance + q.c_x0.square() * torch.from_numpy(np.interp(index, np.arange(len(c_t)), c_t))
        path = torch.stack([q.c_x0, q.c_xt, variance.sqrt()], dim=1).tolist()
        log_ratio = (beta / q.beta_tilde).log().tolist()

        def step(i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
            c_x0, c_xt, std = path[i]
            noise = std * noise_like(x_t, generator=generator)
            if self.variance == "learned":
                if denoised.frac is None:
                    raise InputError(
                        "Expected a network that predicts its variance, for variance='learned'. Got none: sample with "
                        "'small' or 'large'."
                    )
                # Data of variance 1 or less need no more than beta. A network that misses x0 by more than the noise, as
                # x0-prediction does near data, learns fractions above 1, which overflow between times that lie apart.
                noise = noise * (0.5 * log_ratio[i] * (denoised.frac.clamp(max=1) - 1)).exp()
            return c_x0 * denoised.x0 + c_xt * x_t + noise

        return step


def _posterior_mse(diffusion: GaussianDiffusion) -> Tensor:
    c_t = diffusion.posterior_mse
    if c_t is None:
        raise InputError(
            "Expected posterior_mse, the errors of a diffusion prior's validation, for variance='analytic'. Got a "
            "network without them: fit a prior on data with a validation split, or sample with 'small' or by DDIM."
        )
    if c_t.shape != (diffusion.steps,) or not c_t.isfinite().all():
        raise InputError(
            f"Expected posterior_mse of shape ({diffusion.steps},), all finite. Got {tuple(c_t.shape)} with "
            f"{int(c_t.isfinite().sum())} finite numbers: train the network longer, or sample with another variance."
        )
    return c_t


class DDIM(OneLook):
    """Song et al. (2021), eq. 12 and 16, with the noise re-derived from the (clipped, guided) estimate of x0.

    Args:
        steps: number of times that it visits, one network evaluation each.
        eta: share of fresh noise: 0 is deterministic, 1 is `Ancestral` with the small variance.
        grid: spacing of the times, see `time_grid`.

    Raises:
        InputError: eta outside [0, 1], unknown grid, or steps < 1.
    """

    def __init__(self, steps: int = 27, eta: float = 0.0, grid: Grid = "strided") -> None:
        super().__init__(steps, grid)
        self.eta = check_eta(eta)

    def plan(self, times: list[float], diffusion: GaussianDiffusion) -> StepFunction:
        """Return the step, with its coefficients computed in float64."""
        path = ddim_path(diffusion.schedule, times[:-1], self.eta)

        def step(i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
            c_x0, c_xt, std = path[i]
            x_s = c_x0 * denoised.x0 + c_xt * x_t
            return x_s + std * noise_like(x_t, generator=generator) if self.eta > 0 else x_s

        return step


class DPMSolver(DDIM):
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2, and with eta = 1 its SDE form: of second order in the log-SNR.

    A step is DDIM's with the estimate that the latest two, x0 and the one before, point to in the middle of the step:
    x0 + h / (2 h_before) (x0 - x0_before), where h is the step in log(alpha / sigma).

    Args:
        steps: number of times that it visits, one network evaluation each.
        eta: share of fresh noise: 0 is the ODE, 1 the SDE.
        grid: spacing of the times, see `time_grid`.

    Raises:
        InputError: eta outside [0, 1], unknown grid, or steps < 1.
    """

    def __init__(self, steps: int = 15, eta: float = 0.0, grid: Grid = "strided") -> None:
        super().__init__(steps, eta, grid)

    def plan(self, times: list[float], diffusion: GaussianDiffusion) -> StepFunction:
        """Return the step, which keeps the estimate before."""
        step = super().plan(times, diffusion)
        h = -diffusion.schedule.level(torch.tensor(times[:-1], dtype=torch.float64, device="cpu")).log().diff()
        weights = [0.0, *(h[1:] / h[:-1] / 2).tolist()]
        kept: list[Tensor] = []

        def multistep(i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
            x0 = denoised.x0
            ahead = x0 + weights[i] * (x0 - kept.pop()) if kept else x0
            kept.append(x0)
            return step(i, x_t, Denoised(ahead), generator)

        return multistep


class Heun(Sampler):
    """Karras et al. (2022), algorithm 1, with sigma(t) = t: the trapezoid rule in the noise level, two looks a step.

    The last step looks once. In x / alpha, of noise level a = sigma / alpha, a step goes to level b by the mean of the
    slopes (x / alpha - x0) / a at its two ends. That is DDIM's step with the estimate x0 + a / (2 b) (x0_end - x0). A
    level much lower than the one before would blow up the difference, so the levels are always theirs.

    Args:
        steps: n, the number of times that it visits; 2 n - 1 network evaluations.

    Raises:
        InputError: steps < 1.
    """

    def __init__(self, steps: int = 14) -> None:
        super().__init__(steps, "karras")

    def looks(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times at which it asks the network, in order: both ends of each step, and the last time."""
        times = self.times(diffusion)[:-1]
        return [t for ends in pairwise(times) for t in ends] + times[-1:]

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        x_T: Tensor,
        diffusion: GaussianDiffusion,
        *,
        last: Denoise | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw data as `Sampler.sample` describes."""
        times = self.times(diffusion)[:-1]
        levels = diffusion.schedule.level(torch.tensor(times, dtype=torch.float64, device="cpu")).tolist()
        x_t = first_of(x_T, times[0], diffusion.schedule)
        for i, (step, (a, b)) in enumerate(zip(ddim_path(diffusion.schedule, times), pairwise(levels), strict=True)):
            x0 = denoise(x_t, time_of(times[i], x_t)).x0
            guess = step.c_x0 * x0 + step.c_xt * x_t
            x0_end = denoise(guess, time_of(times[i + 1], x_t)).x0
            x_t = guess + step.c_x0 * a / b / 2 * (x0_end - x0)
            if progress is not None:
                progress(i + 1, self.steps, x0)
        x0 = (denoise if last is None else last)(x_t, time_of(times[-1], x_t)).x0
        if progress is not None:
            progress(self.steps, self.steps, x0)
        return x0


class Step(NamedTuple):
    """x_s = c_x0 x0 + c_xt x_t + std n: one step of DDIM. Python floats, so no device is asked."""

    c_x0: float
    c_xt: float
    std: float


def ddim_path(schedule: Schedule, times: list[float], eta: float = 0.0) -> list[Step]:
    """Return the DDIM step between each two neighbouring times, in either direction if eta is 0; t > 0."""
    t = torch.tensor(times, dtype=torch.float64, device="cpu")
    levels = torch.stack([*schedule.alpha_sigma(t), schedule.power(t)], dim=1).tolist()
    path = []
    for (alpha_t, sigma_t, power_t), (alpha_s, sigma_s, power_s) in pairwise(levels):
        std = 0.0
        if eta > 0:  # towards noise, where there is none, a straight path ends at alpha = 0
            beta = power_t - (alpha_t / alpha_s) ** 2 * power_s  # variance of q(x_t | x_s)
            std = eta * sigma_s / sigma_t * math.sqrt(max(0.0, beta))
        c_xt = math.sqrt(sigma_s**2 - std**2) / sigma_t
        path.append(Step(alpha_s - c_xt * alpha_t, c_xt, std))
    return path


def check_eta(eta: float) -> float:
    """Return eta, the share of fresh noise in a DDIM step, if it is one.

    Raises:
        InputError: it lies outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"Expected 0 <= eta <= 1. Got {eta}: give 0 for no fresh noise, 1 for ancestral sampling.")
    return eta
