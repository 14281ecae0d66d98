"""Noise schedules: how much signal and noise x_t holds, as pure functions of time, clean at t = 0."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(c_x0 x0 + c_xt x_t, beta_tilde), Ho et al. (2020), eq. 6 and 7, for any s < t."""

    c_x0: Tensor
    c_xt: Tensor
    beta: Tensor  # variance of q(x_t | x_s): the upper bound of the reverse variance
    beta_tilde: Tensor  # variance of q(x_s | x_t, x0): the lower bound; 0 at s = 0


class Schedule(ABC):
    """A Gaussian diffusion q(x_t | x0) = N(alpha x0, sigma^2) with alpha, sigma functions of t in [0, 1].

    To add one, write `alpha_sigma`. Solvers and losses need nothing else. A variance-preserving schedule is easier
    still: see `VariancePreserving`.
    """

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t (any shape), in t's shape and dtype; 1 and 0 at t = 0."""

    def level(self, t: Tensor) -> Tensor:
        """Return sigma / alpha at t, the noise in units of the data, in t's shape and dtype; 0 at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def power(self, t: Tensor) -> Tensor:
        """Return alpha^2 + sigma^2, the variance of x_t for data of variance 1, in t's shape and dtype."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha.square() + sigma.square()

    def posterior(self, t: Tensor, s: Tensor) -> Posterior:
        """Return the coefficients of q(x_s | x_t, x0) for s < t (same shape), in t's dtype; computed in float64."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(widen(t)), self.alpha_sigma(widen(s))
        ratio = alpha_t / alpha_s  # q(x_t | x_s) = N(ratio x_s, beta)
        beta = self.power(widen(t)) - ratio.square() * self.power(widen(s))
        shrink = (sigma_s / sigma_t).square()
        q = Posterior(c_x0=alpha_s * beta / sigma_t.square(), c_xt=ratio * shrink, beta=beta, beta_tilde=beta * shrink)
        return Posterior(*(c.to(t.dtype) for c in q))


class VariancePreserving(Schedule):
    """A schedule with alpha^2 + sigma^2 = 1, defined by its log-SNR alone.

    What follows is computed from log(alpha^2 / sigma^2), where nothing cancels at either end.
    """

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2) at t (any shape, in [0, 1]), in t's dtype; +inf at t = 0."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha = sqrt(abar) and sigma = sqrt(1 - abar) at t; computed in float64."""
        log_snr = self.log_snr(widen(t))
        return log_snr.sigmoid().sqrt().to(t.dtype), (-log_snr).sigmoid().sqrt().to(t.dtype)

    def power(self, t: Tensor) -> Tensor:
        """Return 1 at every t: the variance is preserved."""
        return torch.ones_like(t)

    def posterior(self, t: Tensor, s: Tensor) -> Posterior:
        """Return what `Schedule.posterior` does, without its cancellation."""
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


class CosineSchedule(VariancePreserving):
    """abar = f(t) / f(0), f(t) = cos^2((t + 0.008) / 1.008 * pi / 2), Nichol & Dhariwal (2021), eq. 17.

    Sines of t and 1 - t keep both ends exact. The paper's bound beta <= 0.999 touches only the last of the 1000 table
    entries. Here it is a floor under abar, the value of that entry, 2.4288e-9.
    """

    OFFSET = 0.008
    SCALE = math.pi / 2 / (1 + OFFSET)
    MIN_ABAR = 1e-3 * (math.sin(SCALE * 1e-3) / math.cos(SCALE * OFFSET)) ** 2  # 1e-3 * abar(0.999)
    MIN_LOG_SNR = math.log(MIN_ABAR) - math.log1p(-MIN_ABAR)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(abar / (1 - abar)) at t."""
        signal = (self.SCALE * (1 - t)).sin().square()
        noise = (self.SCALE * t).sin() * (self.SCALE * (t + 2 * self.OFFSET)).sin()  # sin^2(u) - sin^2(u0)
        return (signal.log() - noise.log()).clamp(min=self.MIN_LOG_SNR)


class LinearSchedule(VariancePreserving):
    """beta from 1e-4 to 0.02 over 1000 steps, Ho et al. (2020), as the closed form of its continuous limit.

    -log abar = 0.1 t + 9.95 t^2 (Song et al. 2021, eq. 33); within 8.2e-4 of the table's abar.
    """

    BETA_MIN = 0.1
    BETA_MAX = 20.0

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(abar / (1 - abar)) at t."""
        return -(self.BETA_MIN * t + 0.5 * (self.BETA_MAX - self.BETA_MIN) * t.square()).expm1().log()


class StraightPath(Schedule):
    """alpha = 1 - sigma: straight lines from data to noise, rectified flow (Liu et al. 2023; Lipman et al. 2023).

    x_t / sqrt(alpha^2 + sigma^2) is a variance-preserving process of log-SNR 2 log((1 - sigma) / sigma).

    Args:
        shift: s of sigma = s t / (1 + (s - 1) t), sigma = t at 1. Above 1 training and sampling spend more of their
            times near noise, which hides an image of many dimensions less: sqrt(d / 4096) for d numbers (Esser et al.
            2024; Zheng et al. 2025).

    Raises:
        InputError: shift is not positive.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise InputError(f"Expected shift > 0. Got {shift}: give 1 for none.")
        self.shift = shift

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t; computed in float64, both without cancellation."""
        wide = widen(t)
        whole = 1 + (self.shift - 1) * wide
        return ((1 - wide) / whole).to(t.dtype), (self.shift * wide / whole).to(t.dtype)


def widen(x: Tensor) -> Tensor:
    """Return x in float64, or in float32 on Apple's GPU, which has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape one coefficient per sample, (B,), to multiply x, (B, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
