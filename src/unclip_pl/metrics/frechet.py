"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

The number is called ``fid`` only for the Inception weights of FID, and by its features otherwise. The distance is
biased upward, more so for small n: compare at equal n only. Everything is float64, which neither autocast nor TF32
touches.
"""

import numpy as np
import torch
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpstrf, dsygst
from torch import Tensor
from torchmetrics import Metric

from unclip_pl.errors import InputError
from unclip_pl.metrics.interval import Interval, recentred_interval


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Compute ‖μ1 − μ2‖² + Tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½); leading dimensions broadcast.

    Args:
        mean1: (..., F).
        cov1: (..., F, F), of which the lower triangle is read.
        mean2: (..., F).
        cov2: (..., F, F), of which the lower triangle is read.

    Returns:
        (...) float64.
    """
    mean1, cov1, mean2, cov2 = mean1.double(), cov1.double(), mean2.double(), cov2.double()
    traces = cov1.diagonal(dim1=-2, dim2=-1).sum(-1) + cov2.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean1 - mean2).square().sum(-1) + traces - 2 * _overlap(cov1, cov2)


def _overlap(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Compute Tr (Σ1 Σ2)^½, the sum of singular values of A1ᵀ A2, for any A1, A2 with A Aᵀ = Σ.

    Real and stable where the eigenvalues of the non-symmetric product Σ1 Σ2 are not. Cholesky's A2 is the cheapest, and
    then the singular values are roots of the eigenvalues of A2ᵀ Σ1 A2. Covariances of fewer samples than features have
    no such A, and roots of rounding would add up.
    """
    (_, singular1), (root2, singular2) = (torch.linalg.cholesky_ex(cov) for cov in (cov1, cov2))
    if singular1.any() or singular2.any():
        return torch.linalg.svdvals(_root(cov1).mT @ _root(cov2)).sum(-1)
    return torch.linalg.eigvalsh(_between(root2, cov1)).clamp_min(0).sqrt().sum(-1)


def _root(cov: Tensor) -> Tensor:
    """Return A, (..., F, rank), with A Aᵀ = Σ of any rank: Cholesky's with pivots, which ends where the rank does."""
    roots = torch.zeros(cov.shape, dtype=cov.dtype, device="cpu")
    ranks = [0]
    for root, matrix in zip(*(x.reshape(-1, *x.shape[-2:]).cpu().numpy() for x in (roots, cov)), strict=True):
        factor, pivots, rank, _ = dpstrf(matrix.T)
        root[pivots - 1, :rank] = np.tril(factor.T)[:, :rank]
        ranks.append(rank)
    return roots[..., : max(ranks)].to(cov.device)


def _between(root: Tensor, cov: Tensor) -> Tensor:
    """Compute Aᵀ Σ A of a lower triangle A and a symmetric Σ, of which lower triangles are read and filled."""
    if cov.device.type != "cpu":
        return root.mT @ (cov.tril() + cov.tril(-1).mT) @ root
    root, cov = torch.broadcast_tensors(root, cov)
    squares = torch.empty(cov.shape, dtype=cov.dtype)
    # LAPACK counts columns first: what is a lower triangle here is an upper one there. A third of the operations.
    for square, a, b in zip(*(x.reshape(-1, *x.shape[-2:]).numpy() for x in (squares, cov, root)), strict=True):
        square[:] = dsygst(a.T, b.T, itype=2)[0].T
    return squares


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows, (F, F), to ``total`` in place; on a CPU its lower triangle alone, which is half the work."""
    if total.device.type == "cpu":
        dsyrk(1.0, rows.detach().numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=True)
    else:
        total.addmm_(rows.mT, rows)


class FrechetDistance(Metric):
    """Fréchet distance of real and generated features, pooled over batches and processes through sums.

    Args:
        num_features: width F of the features.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        # The first feature is a constant 1, so one matrix holds count, sum and second moment: [n, Σxᵀ; Σx, Σxxᵀ]. It is
        # symmetric: what stands above the diagonal is never read.
        moments = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.add_state("real", moments.clone(), dist_reduce_fx="sum")
        self.add_state("fake", moments.clone(), dist_reduce_fx="sum")
        self.real: Tensor
        self.fake: Tensor

    def update(self, features: Tensor, *, real: bool) -> None:
        """Add features (B, F) of real or of generated images.

        Raises:
            InputError: the features are not (B, num_features).
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InputError(
                f"Expected features of shape (B, {self.num_features}). Got {tuple(features.shape)}: set num_features."
            )
        _add_gram(self.real if real else self.fake, _with_ones(features))

    def compute(self) -> Tensor:
        """Return the distance, a float64 scalar, with the unbiased covariances (n − 1) of FID.

        Raises:
            InputError: fewer than two samples on either side.
        """
        return moments_distance(self.real, self.fake)


class FeatureMoments(Metric):
    """Count, sum and second moment of features, pooled over batches and processes: all that a Fréchet distance reads.

    Args:
        num_features: width F of the features.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        moments = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx="sum")
        self.moments: Tensor

    def update(self, features: Tensor) -> None:
        """Add features (B, F)."""
        _add_gram(self.moments, _with_ones(features))

    def compute(self) -> Tensor:
        """Return the (F + 1, F + 1) float64 moments [n, Σxᵀ; Σx, Σxxᵀ], of which the lower triangle counts."""
        return self.moments


def moments_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the distance of two sets, of any two sizes, by the moments that :class:`FeatureMoments` gives.

    Returns:
        A float64 scalar, with the unbiased covariances (n − 1) of FID.

    Raises:
        InputError: fewer than two samples on either side.
    """
    counts = int(real[0, 0]), int(fake[0, 0])
    if min(counts) < 2:
        raise InputError(
            f"Expected at least 2 real and 2 generated samples. Got {counts[0]} and {counts[1]}: add some."
        )
    return frechet_distance(*_mean_and_cov(real), *_mean_and_cov(fake))


def _with_ones(features: Tensor) -> Tensor:
    """Return (B, 1 + F) float64, the first column ones."""
    rows = torch.empty(len(features), features.shape[1] + 1, dtype=torch.float64, device=features.device)
    rows[:, 0] = 1
    # NumPy copies on one thread. Torch's would go on spinning on the cores that BLAS wants.
    if rows.device.type == "cpu":
        known = torch.promote_types(features.dtype, torch.float32)  # NumPy has no bfloat16
        rows.numpy()[:, 1:] = features.detach().to(known).numpy()
    else:
        rows[:, 1:] = features
    return rows


def _mean_and_cov(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance of moments; only lower triangles are filled, before and after."""
    count = moments[0, 0]
    mean = moments[1:, 0] / count
    return mean, torch.addr(moments[1:, 1:], mean, mean, alpha=-count.item()).div_(count - 1)


def frechet_resamples(
    real: Tensor, fakes: dict[str, Tensor], resamples: int = 200, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Compute distances on bootstrap resamples of the captions: every name sees the same resamples (paired).

    The difference of two names' resamples is thus a bootstrap of their difference, with what they share cancelled.

    Args:
        real: (N, F), row i belongs to caption i.
        fakes: name → (N, F), or (S, N, F) for S sampling seeds: the distance is then the mean over seeds.
        resamples: number R of resamples.
        generator: source of the resamples.

    Returns:
        Distances by name, (R + 1,) float64; element 0 is the estimate on all captions, the others are resamples.

    Raises:
        InputError: a name has another N or F than ``real``: distances compare at equal n only.
    """
    for name, fake in fakes.items():
        if fake.ndim not in (2, 3) or fake.shape[-2:] != real.shape:
            raise InputError(
                f"Expected {name!r} of shape {tuple(real.shape)}. Got {tuple(fake.shape)}: use equal numbers."
            )
    count = len(real)
    device = generator.device if generator is not None else None
    index = torch.randint(count, (resamples, count), generator=generator, device=device)
    times = torch.zeros_like(index).scatter_add_(1, index, torch.ones_like(index))  # how often each caption was drawn
    weights = torch.cat([times.new_ones(1, count), times]).to(real.device, torch.float64)  # (R + 1, N)
    rows = torch.cat([side.double().reshape(-1, *real.shape) for side in (real, *fakes.values())])  # (1 + seeds, N, F)
    rows = rows - rows[0].mean(0)  # no distance moves, and second moments cancel less
    distances = []
    for weight in weights:
        mean, cov = _moments(rows, weight)
        distances.append(frechet_distance(mean[0], cov[0], mean[1:], cov[1:]))
    seeds = [fake.numel() // real.numel() for fake in fakes.values()]
    per_name = torch.stack(distances, dim=1).split(seeds)  # each (S, R + 1)
    return {name: per_seed.mean(0) for name, per_seed in zip(fakes, per_name, strict=True)}


def without_bias(distances: Tensor) -> Tensor:
    """Return distances whose estimates are 2 · FD − the mean of the resamples; the resamples stay.

    A Fréchet distance of n samples is too large, the more so the more they vary: guidance that makes samples alike
    lowers this bias and hides its harm. A resample of n has about that bias once more (Efron & Tibshirani 1993, §10.3).

    Args:
        distances: (..., 1 + R) from :func:`frechet_resamples`.
    """
    estimate, resamples = distances[..., :1], distances[..., 1:]
    return torch.cat([2 * estimate - resamples.mean(-1, keepdim=True), resamples], dim=-1)


def _moments(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean (K, F) and unbiased covariance (K, F, F) of rows (K, N, F); row i occurs ``weight[i]`` times."""
    count = len(weight)
    weighted = rows.mT * weight  # (K, F, N)
    mean = weighted.sum(-1) / count
    return mean, (weighted @ rows - count * mean.unsqueeze(-1) * mean.unsqueeze(-2)) / (count - 1)


def frechet_interval(
    real: Tensor, fakes: dict[str, Tensor], resamples: int = 200, *, generator: torch.Generator | None = None
) -> dict[str, Interval]:
    """Compute each name's distance at this n with its 95 % interval over captions, recentred on the full estimate.

    Arguments and errors are those of :func:`frechet_resamples`. Compare two names by the differences of its results:
    their intervals may overlap where the paired difference is clear. Each resample decomposes F × F matrices, so use
    it for features up to a few hundred.
    """
    distances = frechet_resamples(real, fakes, resamples, generator=generator)
    return {name: recentred_interval(value[0].item(), value[1:]) for name, value in distances.items()}
