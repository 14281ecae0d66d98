"""Fidelity and coverage apart from each other, by balls around nearest neighbours.

A sample's ball reaches to its k-th nearest neighbour of its own set, the border included: ≤, like OpenAI's evaluator
and torch-fidelity. prdc has <, which differs on duplicates only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.errors import InputError

ROWS = 1024  # of a distance matrix at a time


class PrecisionRecall(NamedTuple):
    """Float32 tensors in [0, 1], only density may exceed 1: scalars, or one value for each sample."""

    precision: Tensor  # share of generated samples inside some real ball (Kynkäänniemi et al. 2019)
    recall: Tensor  # share of real samples inside some generated ball
    density: Tensor  # real balls around a generated sample, over k (Naeem et al. 2020, eq. 3)
    coverage: Tensor  # share of real balls with a generated sample in it (eq. 4)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Average :func:`neighbour_values`, whose arguments these are."""
    return PrecisionRecall(*(values.mean() for values in neighbour_values(real, fake, k)))


def neighbour_values(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Compute each sample's share: precision and density (M,) of the generated, recall and coverage (N,) of the real.

    Args:
        real: (N, F) features.
        fake: (M, F) features.
        k: number of the neighbour that bounds a ball; 3 is customary.

    Raises:
        InputError: either set has no more than k samples.
    """
    if min(len(real), len(fake)) <= k:
        raise InputError(
            f"Expected more than k = {k} samples on either side. Got {len(real)} real, {len(fake)} fake: add some."
        )
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls that hold each generated sample
    recalled, covered = [], []
    for distance, radius in zip(_distances(real, fake), real_radius.split(ROWS), strict=True):
        inside = distance <= radius.unsqueeze(1)  # (R, M)
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance <= fake_radius).any(1))
    return PrecisionRecall(
        precision=(balls > 0).float(),
        recall=torch.cat(recalled).float(),
        density=balls.float() / k,
        coverage=torch.cat(covered).float(),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Return (N,) distances to the k-th nearest neighbour; the nearest of all is the sample itself."""
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in _distances(features, features)])


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield rows of the (N, M) distance matrix, float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    for rows in a.split(ROWS):
        # Through a matrix product, equal rows would be a rounding error apart and duplicates fall out of their ball.
        yield torch.cdist(rows.to(dtype), b.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
