"""Fit of an image to its caption by the features of a CLIP: the mean cosine, and retrieval.

Never score with the CLIP that conditions the decoder: give the features of a judge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from unclip_pl.errors import InputError

TIE = 1e-6  # cosines that float32 encoders cannot tell apart: one image encoded in two batches differs by about 1e-7
ROWS = 1024  # of a similarity matrix at a time


def clip_scores(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """Return 100 · cos of each image (B, d) and its caption (B, d), at any scale: (B,) in [-100, 100]."""
    return 100 * F.cosine_similarity(image_embed.float(), text_embed.float(), dim=-1)


class CLIPScore(Metric):
    """Mean of 100 · cos(image, caption), not clamped, no prompt before the caption.

    torchmetrics' ``CLIPScore`` differs in that it clamps a negative *mean* to 0. Hessel et al. (2021) differ:
    2.5 · max(cos, 0), clamped per sample, captions behind "A photo depicts".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def update(self, image_embed: Tensor, text_embed: Tensor) -> None:
        """Add pairs of embeddings, each (B, d)."""
        scores = clip_scores(image_embed, text_embed)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Return the mean, in [-100, 100]."""
        return self.total / self.count


def retrieval_ranks(query: Tensor, target: Tensor) -> Tensor:
    """Count the other targets that are at least as similar to query i as target i is; 0 means found.

    Ties count against: a model that gives every caption the same embedding finds nothing, rather than everything. Give
    distinct targets, since equal ones count as misses too.

    Args:
        query: (N, d) at any scale.
        target: (N, d) at any scale; target i belongs to query i.

    Returns:
        (N,) int64 in [0, N − 1]. Recall at k of each query is ``ranks < k``.
    """
    # float64: neither autocast nor TF32 may move a rank
    query, target = F.normalize(query.double(), dim=-1), F.normalize(target.double(), dim=-1)
    ranks = []
    for rows, own in zip(query.split(ROWS), target.split(ROWS), strict=True):
        cosine = (rows * own).sum(-1, keepdim=True)  # (R, 1)
        ranks.append((rows @ target.mT >= cosine - TIE).sum(-1) - 1)  # less the target itself
    return torch.cat(ranks)


class RetrievalRecall(Metric):
    """Recall at k: the share of queries that have their own target among the k most similar of all N.

    It falls as N grows: compare at equal N. With several samples per caption, keep one metric for each sampling seed.

    Args:
        k: number of nearest targets that count as found, at least 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"Expected k >= 1. Got {k}: use a larger one.")
        self.k = k
        self.add_state("query", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")
        self.query: list[Tensor]
        self.target: list[Tensor]

    def update(self, query: Tensor, target: Tensor) -> None:
        """Keep pairs of embeddings, each (B, d)."""
        self.query.append(query)
        self.target.append(target)

    def compute(self) -> Tensor:
        """Return the share, in [0, 1]."""
        return (retrieval_ranks(dim_zero_cat(self.query), dim_zero_cat(self.target)) < self.k).double().mean()
