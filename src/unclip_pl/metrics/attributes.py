"""Does the image show what its caption states? For images that an oracle reads back into attributes.

Values are indices; -1 is "unstated" in a caption and "unreadable" in an image, which is never right.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class AttributeScores(NamedTuple):
    """Means over captions, in [0, 1]."""

    match: Tensor  # share of the stated attributes that are right, scalar
    captions_right: Tensor  # share of the captions of which every stated attribute is right, scalar
    accuracy: Tensor  # (A,) of each attribute, over the captions that state it; NaN if none does


def stated_match(read: Tensor, stated: Tensor) -> Tensor:
    """Share of a caption's stated attributes that its image shows.

    Args:
        read: (N, A) integer values read from the images.
        stated: (N, A) integer values in the captions, -1 where unstated.

    Returns:
        (N,) float in [0, 1]; 1 for a caption that states nothing.
    """
    is_stated = stated >= 0
    count = is_stated.sum(-1)
    right = ((read == stated) & is_stated).sum(-1)
    return torch.where(count > 0, right / count.clamp_min(1), 1.0)


def captions_right(read: Tensor, stated: Tensor) -> Tensor:
    """(N,) bool: every stated attribute is right. Arguments as :func:`stated_match`."""
    return ((read == stated) | (stated < 0)).all(-1)


def attribute_accuracy(read: Tensor, stated: Tensor) -> Tensor:
    """(A,) accuracy of each attribute over the captions that state it; NaN if none does.

    Arguments as :func:`stated_match`.
    """
    is_stated = stated >= 0
    return ((read == stated) & is_stated).sum(0) / is_stated.sum(0)


class AttributeMatch(Metric):
    """Stated attributes against read ones, over all captions seen by all processes.

    Args:
        num_attributes: A.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, num_attributes: int) -> None:
        super().__init__()
        self.add_state("match", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("all_right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("captions", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros(num_attributes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("stated", torch.zeros(num_attributes, dtype=torch.int64), dist_reduce_fx="sum")
        self.match: Tensor
        self.all_right: Tensor
        self.captions: Tensor
        self.right: Tensor
        self.stated: Tensor

    def update(self, read: Tensor, stated: Tensor) -> None:
        """Count in values (B, A) read from images and stated by their captions."""
        self.match += stated_match(read, stated).double().sum()
        self.all_right += captions_right(read, stated).sum()
        self.captions += len(stated)
        is_stated = stated >= 0
        self.right += ((read == stated) & is_stated).sum(0)
        self.stated += is_stated.sum(0)

    def compute(self) -> AttributeScores:
        """Scores of all captions."""
        return AttributeScores(
            self.match / self.captions, self.all_right / self.captions, accuracy=self.right / self.stated
        )
