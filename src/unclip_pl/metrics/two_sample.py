"""Tell two sets of features apart by a classifier: at chance, they have one distribution for all that it can see.

Source: Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests".
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
#: Ridge of the classifier, in parts of the kernel's mean diagonal and the number of rows.
RIDGE = 1e-3


def told_apart(real: Tensor, fake: Tensor) -> Tensor:
    """Return how often a classifier tells each row's two pictures: (N,), 0, ½ or 1; ½ on average is chance.

    The classifier is a kernel ridge regression to ±1 on unit-norm features with the kernel (1 + cos)³, by 5-fold
    cross-validation. Folds are of rows: both pictures of a row are tested together, since one that was seen would give
    the other a false name. A caption of several rows may lie in several folds.

    Args:
        real: (N, F) features at any scale, row i of both belongs to one caption.
        fake: (N, F).
    """
    count = len(real)
    rows = F.normalize(torch.cat([real, fake]).double(), dim=-1)
    kernel = (1 + rows @ rows.T) ** 3
    label = torch.cat([torch.ones(count), -torch.ones(count)]).to(kernel)
    fold = (torch.arange(count, device=real.device) % FOLDS).repeat(2)
    right = torch.zeros_like(label)
    for k in range(FOLDS):
        seen, tested = fold != k, fold == k
        gram = kernel[seen][:, seen]
        ridge = RIDGE * len(gram) * gram.diagonal().mean()
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), label[seen])
        right[tested] = ((kernel[tested][:, seen] @ weights).sign() == label[tested]).double()
    return right.unflatten(0, (2, count)).mean(0)
