"""Agreement of an image with the attributes that its caption states, as an oracle reads them from the image.

Values are indices; -1 is "unstated" in a caption and "unreadable" in an image, which is never right.
"""

import torch
from torch import Tensor


def stated_match(read: Tensor, stated: Tensor) -> Tensor:
    """Return the share of a caption's stated attributes that its image shows.

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
    """Return (N,) bool: every stated attribute is right. The arguments are those of :func:`stated_match`."""
    return ((read == stated) | (stated < 0)).all(-1)


def attribute_accuracy(read: Tensor, stated: Tensor) -> Tensor:
    """Return the (A,) accuracy of each attribute over the captions that state it; NaN if none does.

    The arguments are those of :func:`stated_match`.
    """
    is_stated = stated >= 0
    return ((read == stated) & is_stated).sum(0) / is_stated.sum(0)
