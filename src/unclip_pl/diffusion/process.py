"""The forward process and what a network predicts of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from unclip_pl.diffusion.schedule import CosineSchedule, Schedule, StraightPath, VariancePreserving, per_sample
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams, fill_like

Prediction = Literal["x0", "eps", "v", "velocity"]


class Denoised(NamedTuple):
    """What a solver sees of a network.

    Attributes:
        x0: estimate of the clean data, (B, ...).
        frac: learned variance as a fraction of the way, in logarithms, from beta_tilde (0) to beta (1); the network's
            raw output v as (v + 1) / 2, unclamped (Nichol & Dhariwal 2021, eq. 15). Same shape as x0.
    """

    x0: Tensor
    frac: Tensor | None = None


Denoise: TypeAlias = Callable[[Tensor, Tensor], Denoised]  # x_t (B, ...), t (B,) in (0, 1]


class TimeDensity(ABC):
    """How training draws the time: on the grid k / steps, k in 1..steps, or anywhere in (0, 1)."""

    @abstractmethod
    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n times, float32, (n,), on the generator's device, and move them."""


class UniformTime(TimeDensity):
    """k uniform in 1..steps: the paper's."""

    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n times, each of the grid's equally likely."""
        source = device if generator is None else generator.device
        return (torch.randint(1, steps + 1, (n,), generator=generator, device=source) / steps).to(device)


class PowerTime(TimeDensity):
    """t = 1 - u^power, u uniform, rounded up to the grid: drawn towards noise when power > 1; 1 is uniform.

    Small image networks learn what to draw, decided at high noise, much sooner with power about 2.

    Args:
        power: exponent of the uniform draw, above 0.

    Raises:
        InputError: power is not positive.
    """

    def __init__(self, power: float) -> None:
        if not power > 0:
            raise InputError(f"Expected power > 0. Got {power}: give 1 for uniform times, 2 for times near noise.")
        self.power = power

    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n times of that density."""
        source = device if generator is None else generator.device
        u = torch.rand(n, generator=generator, device=source)
        return (((1 - u**self.power) * steps).ceil().clamp(1, steps) / steps).to(device)


class LogitNormalTime(TimeDensity):
    """t = 1 / (1 + exp(-n)), n normal, anywhere in (0, 1): the middle of a straight path (Esser et al. 2024, eq. 19).

    Args:
        mean: mean of n; above 0 draws towards noise.
        std: standard deviation of n.

    Raises:
        InputError: std is not positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise InputError(f"Expected std > 0. Got {std}: give 1, or more for times nearer to both ends.")
        self.mean = mean
        self.std = std

    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n times of that density, between the steps too."""
        source = device if generator is None else generator.device
        t = (self.mean + self.std * torch.randn(n, generator=generator, device=source)).sigmoid()
        return t.clamp(1e-5, 1 - 1e-5).to(device)  # float32 would round the tails to 0 and 1


class GaussianDiffusion:
    """Forward process of a schedule, the line between a network's output F and x0, and the density of training times.

    A parameterisation is two numbers per time, x0 = c_skip x_t + c_out F:

    ==========  =======  ============  =======================
    prediction  c_skip   c_out         F estimates
    ==========  =======  ============  =======================
    x0          0        1             x0
    eps         1/alpha  -sigma/alpha  eps (Ho et al. 2020)
    v           alpha    -sigma        alpha eps - sigma x0 (Salimans & Ho 2022; variance-preserving schedules)
    velocity    1        -sigma        eps - x0 (Liu et al. 2023; straight paths)
    ==========  =======  ============  =======================

    A straight path has no signal at t = 1, so no eps leads back to x0 there.

    Times t are (B,) in [0, 1], clean at 0; data and noise are (B, ...).

    Args:
        schedule: signal and noise over time; cosine when None.
        prediction: quantity that the network's output estimates.
        steps: T, the number of training times k / T; on a straight path the scale of the index alone.
        time_density: distribution of the times of training; None is uniform, on a straight path logit-normal.

    Raises:
        InputError: unknown prediction, one that the schedule does not have, or steps < 1.
    """

    #: c_t, (T,): the variance of x0 given x_t at every training time, per dimension, from a trained network's errors
    #: (`PosteriorMSE`). `Ancestral(variance="analytic")` reads it; None until it was measured.
    posterior_mse: Tensor | None = None

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction = "eps",
        steps: int = 1000,
        time_density: TimeDensity | None = None,
    ) -> None:
        if prediction not in ("x0", "eps", "v", "velocity"):
            raise InputError(
                f"Expected prediction 'x0', 'eps', 'v' or 'velocity'. Got {prediction!r}: choose one of them."
            )
        if steps < 1:
            raise InputError(f"Expected steps >= 1. Got {steps}: give the number of training times, 1000 in the paper.")
        self.schedule = schedule or CosineSchedule()
        straight, name = isinstance(self.schedule, StraightPath), type(self.schedule).__name__
        if straight and prediction not in ("velocity", "x0"):
            raise InputError(
                f"Expected prediction 'velocity' or 'x0' on a straight path. Got {prediction!r}: change it."
            )
        if prediction == "velocity" and not straight:
            raise InputError(
                f"Expected schedule StraightPath for prediction 'velocity'. Got {name}: change it, or predict 'v'."
            )
        if prediction == "v" and not isinstance(self.schedule, VariancePreserving):
            raise InputError(f"Expected a variance-preserving schedule for prediction 'v'. Got {name}: choose 'x0'.")
        self.prediction = prediction
        self.steps = steps
        self.time_density = time_density or (LogitNormalTime() if straight else UniformTime())

    def __str__(self) -> str:
        """Return what a network's weights mean: the schedule, the prediction and the times that it was told."""
        schedule = self.schedule
        settings = ", ".join(f"{name}={value}" for name, value in vars(schedule).items())
        return f"{type(schedule).__name__}({settings}), {self.prediction}, {self.steps} steps"

    def draw_t(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n training times, (n,) float32 in (0, 1]."""
        return self.time_density.draw(n, steps=self.steps, device=device, generator=generator)

    def index(self, t: Tensor) -> Tensor:
        """Return the 0-based index t T - 1 that networks embed: float, fractional between the training times."""
        return t * self.steps - 1

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t = alpha x0 + sigma eps, Ho et al. (2020), eq. 4."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def to_x0(self, F: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x0 that the network output F means: c_skip x_t + c_out F."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        match self.prediction:
            case "x0":
                return F.to(torch.promote_types(F.dtype, x_t.dtype))
            case "eps":
                return (x_t - sigma * F) / alpha
            case "velocity":
                return x_t - sigma * F
            case _:
                return alpha * x_t - sigma * F

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the regression target of F: the line of `to_x0` solved for F at the true x0."""
        match self.prediction:
            case "x0":
                return x0
            case "eps":
                return eps
            case "velocity":
                return eps - x0
            case _:
                alpha, sigma = self._alpha_sigma(t, x0)
                return alpha * eps - sigma * x0

    def _alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return per_sample(alpha, x), per_sample(sigma, x)


def same_levels(a: GaussianDiffusion, b: GaussianDiffusion) -> bool:
    """Return whether two diffusions have the same signal and noise at the same training times."""
    times = torch.arange(1, a.steps + 1, dtype=torch.float64, device="cpu") / a.steps
    pairs = zip(a.schedule.alpha_sigma(times), b.schedule.alpha_sigma(times), strict=True)
    return a.steps == b.steps and all(torch.equal(x, y) for x, y in pairs)


def noise_like(x: Tensor, *, generator: Streams | None = None) -> Tensor:
    """Draw standard normal noise of x's shape, dtype and device, on the generator's device, and move it."""
    return fill_like(x, lambda rows, stream: rows.normal_(generator=stream), generator)
