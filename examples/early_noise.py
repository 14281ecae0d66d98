"""A solver of your own: DDIM with fresh noise while x_t is mostly noise, and without it afterwards."""

from torch import Tensor

from unclip_pl.diffusion import Denoised, GaussianDiffusion
from unclip_pl.diffusion.process import noise_like
from unclip_pl.diffusion.solvers import OneLook, StepFunction, check_eta, ddim_path
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams


class EarlyNoise(OneLook):
    """DDIM whose first steps add noise, which mends early mistakes, and whose last steps do not, which are few.

    Args:
        steps: number of times that it visits, one network evaluation each.
        eta: share of fresh noise in the first steps; 1 is ancestral sampling.
        until: time in [0, 1] at which the noise ends; at 1 there is none, at 0 it is in every step.

    Raises:
        InputError: eta or until outside [0, 1], or steps < 1.
    """

    def __init__(self, steps: int = 15, eta: float = 1.0, until: float = 0.5) -> None:
        super().__init__(steps, "strided")
        if not 0 <= until <= 1:
            raise InputError(f"Expected 0 <= until <= 1. Got {until}: give a time, 1 for no noise at all.")
        self.eta = check_eta(eta)
        self.until = until

    def plan(self, times: list[float], diffusion: GaussianDiffusion) -> StepFunction:
        """Return the step from each time to the next; the last estimate is the sample, so no step leads to 0."""
        noisy = ddim_path(diffusion.schedule, times[:-1], self.eta)
        plain = ddim_path(diffusion.schedule, times[:-1])
        path = [a if end >= self.until else b for end, a, b in zip(times[1:], noisy, plain, strict=False)]

        def step(i: int, x_t: Tensor, denoised: Denoised, generator: Streams | None) -> Tensor:
            c_x0, c_xt, std = path[i]
            x_s = c_x0 * denoised.x0 + c_xt * x_t
            return x_s + std * noise_like(x_t, generator=generator) if std > 0 else x_s

        return step
