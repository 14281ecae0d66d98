"""Wrappers of a denoiser: guidance, by no condition or by a weaker network, and clipping.

A solver sees a denoiser alone. Guidance of the AR prior acts on probabilities: ``guided_probability`` in
``unclip_pl.nn.ar_prior``.
"""

import math

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoise, Denoised
from unclip_pl.diffusion.schedule import Schedule
from unclip_pl.errors import InputError


def check_guidance(scale: float) -> float:
    """Return the guidance scale if it is one.

    Raises:
        InputError: it is negative, which would lead away from the caption, or not finite.
    """
    if not 0 <= scale < math.inf:
        raise InputError(
            f"Expected guidance >= 0. Got {scale}: give 1 for no guidance, 0 to ignore the condition, or more than 1."
        )
    return scale


def check_interval(interval: tuple[float, float] | None) -> None:
    """Refuse what is no interval of noise levels; None is all of them.

    Raises:
        InputError: an end is negative, or the ends are exchanged.
    """
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        low, high = interval
        raise InputError(
            f"Expected guidance_interval [low, high], noise levels sigma/alpha with 0 <= low <= high. Got [{low:g}, "
            f"{high:g}]: put the lower one first."
        )


def in_interval(interval: tuple[float, float] | None, schedule: Schedule, t: float) -> bool:
    """Return whether the noise level at t lies in an interval, ends included; None is all levels.

    Networks get t in float32, which moves a level by up to 1e-4 of itself near t = 1: an end counts as reached within
    that.
    """
    if interval is None:
        return True
    level = schedule.level(torch.tensor(t, dtype=torch.float64, device="cpu")).item()
    return interval[0] * (1 - 1e-4) <= level <= interval[1] * (1 + 1e-4)


def within(interval: tuple[float, float] | None, schedule: Schedule, inside: Denoise, outside: Denoise) -> Denoise:
    """Return a denoiser with guidance at some noise levels alone, Kynkaanniemi et al. (2024).

    Args:
        interval: lowest and highest noise level sigma / alpha of `inside`; None is all levels.
        schedule: schedule of the levels.
        inside: denoiser with guidance.
        outside: denoiser without, which asks the network once.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:  # solvers ask at one time for all samples
        return (inside if in_interval(interval, schedule, t[0].item()) else outside)(x_t, t)

    return inside if interval is None else denoise


def autoguided(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Return a denoiser that is led away from a weaker network under the same condition, Karras et al. (2024).

    Args:
        strong: denoiser that is guided.
        weak: denoiser of a network that makes the same errors, only larger ones.
        scale: guidance scale; 1 is off. The learned variance stays the stronger network's.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = strong(x_t, t)
        return Denoised(weak(x_t, t).x0.lerp(x0, scale), frac)

    return denoise


def guided(denoise_both: Denoise, scale: float) -> Denoise:
    """Return a denoiser with classifier-free guidance, Ho & Salimans (2022): away from the unconditional x0.

    Args:
        denoise_both: denoiser that gets x_t and t twice, (2B, ...), and conditions the first half only.
        scale: guidance scale; 1 is off, 0 ignores the condition. It acts on the mean only: the learned variance stays
            conditional.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = denoise_both(torch.cat([x_t, x_t]), torch.cat([t, t]))
        cond, uncond = x0.chunk(2)
        return Denoised(uncond.lerp(cond, scale), None if frac is None else frac.chunk(2)[0])

    return denoise


def clip_x0(denoise: Denoise, bound: float = 1.0) -> Denoise:
    """Return a denoiser whose estimate of x0 is clamped to [-bound, bound]."""

    def clipped(x_t: Tensor, t: Tensor) -> Denoised:
        x0, frac = denoise(x_t, t)
        return Denoised(x0.clamp(-bound, bound), frac)

    return clipped
