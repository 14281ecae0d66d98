"""How uncertain x0 is at each noise level: what the analytic reverse variance needs to know about the data."""

import numpy as np
import torch
from torch import Tensor



class PosteriorMSE:
    """Estimates c_t = E tr Cov[x0 | x_t] / d at every training time from the errors of a trained network.

    For the exact denoiser, the error E |x0 - x0_hat|^2 / d *is* c_t (Bao et al. 2022 estimate it from |eps|^2, which
    at high noise multiplies the Monte-Carlo error by 1 / abar). Give it the validation errors, then hand
    `compute()` to `Ancestral(variance="analytic")`. Sums are public: over several ranks add `total`, `index` and
    `count` before `compute`.

    Args:
        steps: T, the number of training times.
        buckets: neighbouring times share an average, T / buckets of them.

    Raises:
        ValueError: not 1 <= buckets <= steps.
    """

    def __init__(self, steps: int = 1000, buckets: int = 50) -> None:
        if not 1 <= buckets <= steps:
            raise ValueError(f"Expected 1 <= buckets <= steps. Got buckets={buckets}, steps={steps}.")
        self.steps = steps
        self.buckets = buckets
        self.reset()

    def reset(self) -> None:
        """Forget every error."""
        self.total, self.index, self.count = torch.zeros(3, self.buckets, device="cpu").unbind()

    def update(self, t: Tensor, mse: Tensor) -> None:
        """Add errors: t (B,) times in (0, 1], mse (B,) each the mean of (x0 - x0_hat)^2 over a sample's dimensions."""
        index = t.float() * self.steps - 1
        bucket = (index.round() * self.buckets / self.steps).long().clamp(0, self.buckets - 1)
        for name, value in (("total", mse.float()), ("index", index), ("count", torch.ones_like(index))):
            setattr(self, name, getattr(self, name).to(t.device).index_add(0, bucket, value))

    def compute(self, *, bound: float | None = None) -> Tensor:
        """c_t at the indices 0..T-1, (T,) float32 on the CPU: the buckets' means, joined by straight lines.

        Args:
            bound: largest value c_t can take, the data's own variance: for embeddings of norm `scale`,
                (scale^2 - |mean x0|^2) / d; for data in [-1, 1], 1.

        Raises:
            ValueError: no errors were added.
        """
        total, index, count = torch.stack([self.total, self.index, self.count]).double().cpu().numpy()
        seen = count > 0
        if not seen.any():
            raise ValueError("Expected errors of a trained network. Got none: call update(t, mse) first.")
        c = np.interp(np.arange(self.steps), index[seen] / count[seen], total[seen] / count[seen])
        return torch.from_numpy(c.clip(0, bound)).float()
