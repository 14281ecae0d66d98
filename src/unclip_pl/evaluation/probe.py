"""Read attributes out of embeddings, without a decoder: linear probes, fitted on real embeddings."""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.errors import InputError
from unclip_pl.evaluation.scores import true_attributes
from unclip_pl.nn.ridge import fit_ridge
from unclip_pl.shapes.render import ATTRIBUTES, VALUES

#: Training pictures that a probe is fitted on.
ROWS = 4096


class AttributeProbe:
    """One ridge regression for each attribute, from unit-norm z_i to its one-hot values; the largest answer is read.

    Args:
        heads: weight (V, d) and bias (V,) of each attribute.
    """

    def __init__(self, heads: list[tuple[Tensor, Tensor]]) -> None:
        self.heads = heads

    @classmethod
    def fit(cls, store: EmbeddingStore) -> Self:
        """Fit on pictures of the training split, whose json says what they show.

        Raises:
            InputError: there is no training split.
        """
        rows = store.rows(Split.TRAIN)[:ROWS]
        if not len(rows):
            raise InputError(
                "Expected training pictures, to fit probes of the attributes on. Got none: add train shards."
            )
        batch = RowBatch(rows, np.zeros(len(rows), np.uint64))
        image_embed, truth = store.prior_batch(batch).image_embed, true_attributes(store.metadata(batch))
        return cls(
            [
                fit_ridge(image_embed, F.one_hot(column, len(VALUES[name])).float(), ridge=1e-4)
                for name, column in zip(ATTRIBUTES, truth.T, strict=True)
            ]
        )

    def read(self, image_embed: Tensor) -> Tensor:
        """Read (..., d) embeddings into (..., A) indices."""
        unit = F.normalize(image_embed.double(), dim=-1)
        return torch.stack([(unit @ weight.T + bias).argmax(-1) for weight, bias in self.heads], dim=-1)
