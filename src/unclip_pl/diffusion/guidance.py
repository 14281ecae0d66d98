"""Wrappers of a denoiser: classifier-free guidance and clipping. Solvers know neither."""

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoise, Denoised
from unclip_pl.errors import InputError


def check_guidance(scale: float) -> float:
    """Return the guidance scale if it is one.

    Raises:
        InputError: it is negative, which would lead away from the caption.
    """
    if not scale >= 0:
        raise InputError(
            f"Expected guidance >= 0. Got {scale}: give 1 for no guidance, 0 to ignore the condition, or more than 1."
        )
    return scale


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
