"""Training objectives: one number per sample, (B,), the mean over its dimensions.

The Tasks in ``unclip_pl.tasks`` train by them.
"""

import math

import torch
from torch import Tensor

from unclip_pl.diffusion.process import GaussianDiffusion
from unclip_pl.diffusion.schedule import per_sample, widen

BOUND_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal (2021), eq. 16
HALF_BIN = 1 / 255  # 256 pixel values on [-1, 1]
MIN_PROBABILITY = 1e-12  # OpenAI's code too: a pixel missed by more teaches nothing


def simple_loss(F: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of F (B, ...) as (B,): L_simple of Ho et al. (2020), eq. 14."""
    return (F - target).square().flatten(1).mean(1)


def hybrid_loss(
    diffusion: GaussianDiffusion, F: Tensor, frac_raw: Tensor, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """Return L_simple + lambda T L_t for a network that also learns its variance, Nichol & Dhariwal (2021), eq. 16.

    L_vlb is a sum over T times, so one uniform draw of t estimates it as T times its term: at T = 1000 the weight of
    the term is 1000 lambda = 1 (OpenAI's RESCALED_MSE). The bound trains the variance only.

    Args:
        diffusion: diffusion of the training.
        F: network output, (B, ...), in the diffusion's prediction.
        frac_raw: variance output, same shape; 1 is beta and -1 is beta_tilde.
        x0, x_t, eps: data, noised data and its noise.
        t: training times k / T, (B,).
    """
    bound = variational_bound(diffusion, F.detach(), frac_raw, x0, x_t, t)
    return simple_loss(F, diffusion.target(x0, eps, t)) + BOUND_WEIGHT * diffusion.steps * bound


def variational_bound(
    diffusion: GaussianDiffusion, F: Tensor, frac_raw: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """Return the term of the variational bound at each t, in bits per dimension, (B,); float32 or wider.

    KL(q(x_s | x_t, x0) || p(x_s | x_t)), s = t - 1/T; at the first time the likelihood of 8-bit pixels x0 in [-1, 1]
    (Ho et al. 2020, eq. 5 and 13). The variance of p is exp(frac log beta + (1 - frac) log beta_tilde).
    """
    F, frac_raw, x0, x_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (F, frac_raw, x0, x_t))
    k = widen(t * diffusion.steps).round()  # exact on the grid: t - 1/T in float32 is not
    q = diffusion.schedule.posterior(k / diffusion.steps, (k - 1) / diffusion.steps)
    # beta_tilde is 0 at the first time; OpenAI's code takes the second's there.
    second = k.clamp(min=2) / diffusion.steps
    beta_tilde = diffusion.schedule.posterior(second, second - 1 / diffusion.steps).beta_tilde
    coefficients = (q.c_x0, q.beta.log(), beta_tilde.log())
    c_x0, log_beta, log_beta_tilde = (per_sample(c.to(x0.dtype), x0) for c in coefficients)

    log_var = log_beta_tilde + 0.5 * (frac_raw + 1) * (log_beta - log_beta_tilde)
    error = x0 - diffusion.to_x0(F, x_t, t)
    gap = log_var - log_beta_tilde
    kl = 0.5 * (gap + (-gap).expm1() + (c_x0 * error).square() * (-log_var).exp())
    first = per_sample(k == 1, x0)
    # Errors at high noise are huge: keep them out of the likelihood, or its unused branch puts nan into the gradient.
    nll = _pixel_nll(x0, torch.where(first, error, 0.0), log_var)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def _pixel_nll(x0: Tensor, error: Tensor, log_var: Tensor) -> Tensor:
    """Return -log of the mass of N(x0 - error, var) on x0's bin; the bins of -1 and 1 are open to infinity."""
    inv_std = (-0.5 * log_var).exp()
    # The mass is even in the error: in the lower tail the difference of the two does not cancel.
    upper = torch.special.ndtr(inv_std * (HALF_BIN - error.abs()))
    lower = torch.special.ndtr(inv_std * (-HALF_BIN - error.abs()))
    black = torch.special.ndtr(inv_std * (HALF_BIN + error))
    white = torch.special.ndtr(inv_std * (HALF_BIN - error))
    mass = torch.where(x0 < -0.999, black, torch.where(x0 > 0.999, white, upper - lower))
    return -mass.clamp(min=MIN_PROBABILITY).log()
