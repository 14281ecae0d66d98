"""Noise schedules: the log-SNR of the diffusion as a pure function of time, clean at t = 0."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(c_x0 x0 + c_xt x_t, beta_tilde), Ho et al. (2020), eq. 6 and 7, for any s < t."""

    c_x0: Tensor
    c_xt: Tensor
    beta: Tensor  # variance of q(x_t | x_s): the upper bound of the reverse variance
    beta_tilde: Tensor  # variance of q(x_s | x_t, x0): the lower bound; 0 at s = 0


class Schedule(ABC):
    """A variance-preserving diffusion q(x_t | x0) = N(alpha x0, sigma^2), alpha^2 + sigma^2 = 1.

    A schedule says only how log(alpha^2 / sigma^2) falls with t in [0, 1]; all else follows from that one function.
    """

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t (any shape, in [0, 1]), in t's dtype; +inf at t = 0."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = sqrt(abar) and sigma = sqrt(1 - abar) at t, in t's shape and dtype; computed in float64."""
        log_snr = self.log_snr(widen(t))
        return log_snr.sigmoid().sqrt().to(t.dtype), (-log_snr).sigmoid().sqrt().to(t.dtype)

    def posterior(self, t: Tensor, s: Tensor) -> Posterior:
        """The coefficients of q(x_s | x_t, x0) for s < t (same shape), in t's dtype; computed in float64."""
        log_snr_t, log_snr_s = self.log_snr(widen(t)), self.log_snr(widen(s))
        log_ratio = F.logsigmoid(log_snr_t) - F.logsigmoid(log_snr_s)  # log(abar_t / abar_s)
        beta = -log_ratio.expm1()
        var_t, var_s = (-log_snr_t).sigmoid(), (-log_snr_s).sigmoid()
        q = Posterior(
            c_x0=log_snr_s.sigmoid().sqrt() * beta / var_t,
            c_xt=(0.5 * log_ratio).exp() * var_s / var_t,
            beta=beta,
            beta_tilde=beta * var_s / var_t,
        )
        return Posterior(*(c.to(t.dtype) for c in q))


class CosineSchedule(Schedule):
    """abar = f(t) / f(0), f(t) = cos^2((t + 0.008) / 1.008 * pi / 2), Nichol & Dhariwal (2021), eq. 17.

    Written with sines of t and 1 - t, so nothing cancels at either end. Their beta <= 0.999 touches only the last of
    the 1000 table entries; here it is a floor under abar, the value of that entry, 2.4288e-9.
    """

    OFFSET = 0.008
    SCALE = math.pi / 2 / (1 + OFFSET)
    MIN_ABAR = 1e-3 * (math.sin(SCALE * 1e-3) / math.cos(SCALE * OFFSET)) ** 2  # 1e-3 * abar(0.999)
    MIN_LOG_SNR = math.log(MIN_ABAR) - math.log1p(-MIN_ABAR)

    def log_snr(self, t: Tensor) -> Tensor:
        """As `Schedule.log_snr`."""
        signal = (self.SCALE * (1 - t)).sin().square()
        noise = (self.SCALE * t).sin() * (self.SCALE * (t + 2 * self.OFFSET)).sin()  # sin^2(u) - sin^2(u0)
        return (signal.log() - noise.log()).clamp(min=self.MIN_LOG_SNR)


class LinearSchedule(Schedule):
    """beta from 1e-4 to 0.02 over 1000 steps, Ho et al. (2020), as the closed form of its continuous limit.

    -log abar = 0.1 t + 9.95 t^2 (Song et al. 2021, eq. 33); within 8.2e-4 of the table's abar.
    """

    BETA_MIN = 0.1
    BETA_MAX = 20.0

    def log_snr(self, t: Tensor) -> Tensor:
        """As `Schedule.log_snr`."""
        return -(self.BETA_MIN * t + 0.5 * (self.BETA_MAX - self.BETA_MIN) * t.square()).expm1().log()


def widen(x: Tensor) -> Tensor:
    """x in float64, or in float32 on Apple's GPU, which has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient per sample, (B,), shaped to multiply x, (B, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
