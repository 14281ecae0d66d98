"""The forward process and what a network predicts of it."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unclip_pl.diffusion.schedule import CosineSchedule, Schedule, per_sample
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams, fill_like

Prediction = Literal["x0", "eps", "v"]


class Denoised(NamedTuple):
    """What a sampler sees of a network.

    x0: estimate of the clean data, (B, ...).
    frac: learned variance as a fraction of the way, in logarithms, from beta_tilde (0) to beta (1); the network's raw
        output v as (v + 1) / 2, unclamped (Nichol & Dhariwal 2021, eq. 15). Same shape as x0.
    """

    x0: Tensor
    frac: Tensor | None = None


class TimeDensity(ABC):
    """How training draws the time: on the grid k / steps, k in 1..steps."""

    @abstractmethod
    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """n times in {1 / steps, ..., 1}, float32, (n,). Drawn on the generator's device, then moved."""


class UniformTime(TimeDensity):
    """k uniform in 1..steps: the paper's."""

    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `TimeDensity.draw`."""
        source = device if generator is None else generator.device
        return (torch.randint(1, steps + 1, (n,), generator=generator, device=source) / steps).to(device)


class PowerTime(TimeDensity):
    """t = 1 - u^power, u uniform, rounded up to the grid: drawn towards noise when power > 1; 1 is uniform.

    Small image networks learn what to draw, decided at high noise, much sooner with power about 2.

    Raises:
        ValueError: power is not positive.
    """

    def __init__(self, power: float) -> None:
        if not power > 0:
            raise InputError(f"Expected power > 0. Got {power}.")
        self.power = power

    def draw(
        self, n: int, *, steps: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `TimeDensity.draw`."""
        source = device if generator is None else generator.device
        u = torch.rand(n, generator=generator, device=source)
        return (((1 - u**self.power) * steps).ceil().clamp(1, steps) / steps).to(device)


class GaussianDiffusion:
    """Forward process of a schedule, the line between a network's output F and x0, and the density of training times.

    A parameterisation is two numbers per time, x0 = c_skip x_t + c_out F:

    ==========  ======  ============  =======================
    prediction  c_skip  c_out         F estimates
    ==========  ======  ============  =======================
    x0          0       1             x0
    eps         1/alpha -sigma/alpha  eps (Ho et al. 2020)
    v           alpha   -sigma        alpha eps - sigma x0 (Salimans & Ho 2022)
    ==========  ======  ============  =======================

    Times t are (B,) in [0, 1], clean at 0; data and noise are (B, ...).

    Args:
        schedule: log-SNR over time; cosine when None.
        prediction: what the network's output estimates.
        steps: T, the number of training times k / T.
        time_density: how training draws k; uniform when None.

    Raises:
        ValueError: unknown prediction, or steps < 1.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction = "eps",
        steps: int = 1000,
        time_density: TimeDensity | None = None,
    ) -> None:
        if prediction not in ("x0", "eps", "v"):
            raise InputError(f"Expected prediction 'x0', 'eps' or 'v'. Got {prediction!r}.")
        if steps < 1:
            raise InputError(f"Expected steps >= 1. Got {steps}.")
        self.schedule = schedule or CosineSchedule()
        self.prediction = prediction
        self.steps = steps
        self.time_density = time_density or UniformTime()

    def draw_t(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """n training times, (n,) float32 in {1/T, ..., 1}."""
        return self.time_density.draw(n, steps=self.steps, device=device, generator=generator)

    def index(self, t: Tensor) -> Tensor:
        """The 0-based index t T - 1 that networks embed: float, fractional between the training times."""
        return t * self.steps - 1

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, Ho et al. (2020), eq. 4."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def to_x0(self, F: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that the network output F means: c_skip x_t + c_out F."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        match self.prediction:
            case "x0":
                return F.to(torch.promote_types(F.dtype, x_t.dtype))
            case "eps":
                return (x_t - sigma * F) / alpha
            case _:
                return alpha * x_t - sigma * F

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What F is regressed on: the line of `to_x0` solved for F at the true x0."""
        match self.prediction:
            case "x0":
                return x0
            case "eps":
                return eps
            case _:
                alpha, sigma = self._alpha_sigma(t, x0)
                return alpha * eps - sigma * x0

    def _alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return per_sample(alpha, x), per_sample(sigma, x)


def noise_like(x: Tensor, *, generator: Streams | None = None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device, drawn on the generator's device."""
    return fill_like(x, lambda rows, stream: rows.normal_(generator=stream), generator)
