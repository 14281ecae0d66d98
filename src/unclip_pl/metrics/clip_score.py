"""Fit of an image to its caption by the features of a CLIP: the mean cosine, and retrieval.

Never score with the CLIP that conditions the decoder: give the features of a judge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 1e-6  # cosines that float32 encoders cannot tell apart: one image encoded in two batches differs by about 1e-7
ROWS = 1024  # of a similarity matrix at a time


def clip_scores(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """Return 100 · cos of each image (B, d) and its caption (B, d), at any scale: (B,) in [-100, 100].

    Nothing is clamped, and no prompt stands before the caption. torchmetrics' ``CLIPScore`` clamps a negative *mean* to
    0. Hessel et al. (2021) differ: 2.5 · max(cos, 0), clamped per sample, captions behind "A photo depicts".
    """
    return 100 * F.cosine_similarity(image_embed.float(), text_embed.float(), dim=-1)


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


def retrieval_recall(query: Tensor, target: Tensor, k: int) -> Tensor:
    """Return recall at k: the share of queries that have their own target among the k most similar of all N.

    It falls as N grows: compare at equal N. With several samples per caption, give one sampling seed at a time.

    Args:
        query: (N, d) at any scale.
        target: (N, d) at any scale; target i belongs to query i.
        k: number of nearest targets that count as found, at least 1.
    """
    return (retrieval_ranks(query, target) < k).double().mean()
