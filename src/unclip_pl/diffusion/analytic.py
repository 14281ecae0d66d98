"""The uncertainty of x0 at each noise level, which the analytic reverse variance needs."""

import numpy as np
import torch
from torch import Tensor

from unclip_pl.diffusion.schedule import widen
from unclip_pl.errors import InputError


class PosteriorMSE:
    """Estimate of c_t = E tr Cov[x0 | x_t] / d at every training time from the errors of a trained network.

    For the exact denoiser, the error E |x0 - x0_hat|^2 / d *is* c_t (Bao et al. 2022 estimate it from |eps|^2, which
    at high noise multiplies the Monte-Carlo error by 1 / abar). Give it the validation errors, and set
    `GaussianDiffusion.posterior_mse` to `compute()`. Over several ranks, add up `sums`, (3, buckets), before that.

    Args:
        steps: T, the number of training times.
        buckets: number of averages; T / buckets neighbouring times share one.

    Raises:
        InputError: not 1 <= buckets <= steps.
    """

    def __init__(self, steps: int = 1000, buckets: int = 50) -> None:
        if not 1 <= buckets <= steps:
            raise InputError(f"Expected 1 <= buckets <= steps. Got buckets={buckets}, steps={steps}: change one.")
        self.steps = steps
        self.buckets = buckets
        self.reset()

    def reset(self) -> None:
        """Forget all errors."""
        self.sums = torch.zeros(3, self.buckets, device="cpu")

    def update(self, t: Tensor, mse: Tensor) -> None:
        """Add errors.

        Args:
            t: times in (0, 1], any shape.
            mse: mean of (x0 - x0_hat)^2 over each sample's dimensions, same shape.
        """
        index = widen(t).flatten() * self.steps - 1
        bucket = (index.round() * self.buckets / self.steps).long().clamp(0, self.buckets - 1)
        values = torch.stack([mse.detach().flatten().to(index), index, torch.ones_like(index)])
        self.sums = self.sums.to(index).index_add(1, bucket, values)

    def compute(self, *, bound: float | None = None) -> Tensor:
        """Return c_t at the indices 0..T-1, (T,) float32 on the CPU: the buckets' means, joined by straight lines.

        Args:
            bound: largest value that c_t can take, the data's own variance: for embeddings of norm `scale`,
                (scale^2 - |mean x0|^2) / d; for data in [-1, 1], 1.

        Raises:
            InputError: no errors were added.
        """
        total, index, count = self.sums.cpu().double().numpy()
        seen = count > 0
        if not seen.any():
            raise InputError("Expected errors of a trained network. Got none: call update(t, mse) first.")
        c_t = np.interp(np.arange(self.steps), index[seen] / count[seen], total[seen] / count[seen])
        return torch.from_numpy(c_t.clip(0, bound)).float()
