"""Kernel distance of two sets of features (KID, Bińkowski et al. 2018): unbiased at any number of samples.

It is the squared maximum mean discrepancy with the cubic kernel k(a, b) = (1 + a·b)³ of unit-norm features. That is
KID's (1 + a·b / F)³ with features scaled to the norm √F, so it does not depend on their width F. Where a Fréchet
distance shrinks with the number of samples, this one stays, and may lie below 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError

ROWS = 512  # of a kernel matrix at a time


def kernel_values(real: Tensor, fakes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute each caption's share of the distance: (N,) float64, whose mean is the unbiased estimate.

    The estimate is the U-statistic over pairs of captions i ≠ j of k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) −
    k(y_i, x_j). No caption meets itself, so that x_i and y_i may depend on each other, as a true picture and a sample
    for its caption do. Shares are 2 h_i − mean(h), with h_i the mean over j: their spread over captions is the
    U-statistic's to first order (Hájek). Where both sets come from one distribution it is √2 times too wide.

    Args:
        real: (N, F) features at any scale, row i belongs to caption i.
        fakes: name → (N, F), or (S, N, F) for S sampling seeds, whose shares are averaged.

    Raises:
        InputError: a name has another N or F than ``real``, or there are fewer than two captions.
    """
    for name, fake in fakes.items():
        if fake.ndim not in (2, 3) or fake.shape[-2:] != real.shape or len(real) < 2:
            raise InputError(
                f"Expected {name!r} of shape {tuple(real.shape)}, 2 captions at least. Got {tuple(fake.shape)}: use "
                "equal numbers."
            )
    x = F.normalize(real.double(), dim=-1)
    among_real = _sums(x, x)[0]
    found = {}
    for name, fake in fakes.items():
        seeds = [_shares(x, among_real, F.normalize(y.double(), dim=-1)) for y in fake.reshape(-1, *real.shape)]
        found[name] = torch.stack(seeds).mean(0)
    return found


def _shares(x: Tensor, among_real: Tensor, y: Tensor) -> Tensor:
    across, back = _sums(x, y)
    own = _kernel((x * x).sum(-1)) + _kernel((y * y).sum(-1)) - 2 * _kernel((x * y).sum(-1))
    h = (among_real + _sums(y, y)[0] - across - back - own) / (len(x) - 1)
    return 2 * h - h.mean()


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_j k(a_i, b_j) for every i, and Σ_j k(a_j, b_i) for every i."""
    rows, columns = [], b.new_zeros(len(b))
    for part in a.split(ROWS):
        values = _kernel(part @ b.T)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def _kernel(dot: Tensor) -> Tensor:
    return (1 + dot) ** 3
