"""Ridge regression in closed form, and the file that a linear prior is kept in."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.files import write_tensors


def fit_ridge(text_embed: Tensor, image_embed: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weight (d, d) and bias (d,) of argmin ‖Z_t Wᵀ + b − Z_i‖² / N + ridge·‖W‖², unit-norm rows, float64.

    Args:
        text_embed: z_t, (N, d).
        image_embed: z_i, (N, d).
        ridge: penalty in units of the text embeddings' mean variance per coordinate.
    """
    x, y = F.normalize(text_embed.double(), dim=-1), F.normalize(image_embed.double(), dim=-1)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x)
    penalty = ridge * gram.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram + penalty, x.T @ y / len(x)).T
    return weight, y_mean - weight @ x_mean


def save_linear_prior(path: Path, weight: Tensor, bias: Tensor, *, fingerprint: str, seconds: float) -> None:
    """Write the file that ``LinearPriorSpec`` reads."""
    tensors = {"weight": weight.float(), "bias": bias.float()}
    write_tensors(path, tensors, {"fingerprint": fingerprint, "seconds": f"{seconds:.3f}"})
