"""Probes, where what they should read is written in by hand."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.errors import InputError
from unclip_pl.evaluation.probe import AttributeProbe
from unclip_pl.shapes.render import VALUES, draw_attributes, encode
from unclip_pl.types import PriorBatch

SIZE = sum(map(len, VALUES.values()))


class Written:
    """A store whose embeddings are sums of one direction for each attribute's value, and some noise."""

    def __init__(self, n: int, noise: float) -> None:
        self.attributes = draw_attributes(n, split="train", rng=np.random.default_rng(0))
        truth = encode(self.attributes)
        whole = torch.cat([F.one_hot(c, len(v)).float() for c, v in zip(truth.T, VALUES.values(), strict=True)], dim=1)
        generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(SIZE + 8, SIZE + 8, generator=generator)).Q[:SIZE]
        self.truth, self.embeds = truth, whole @ turn + noise * torch.randn(n, SIZE + 8, generator=generator)

    def rows(self, split: object) -> np.ndarray:
        return np.arange(len(self.attributes))

    def prior_batch(self, batch: RowBatch) -> PriorBatch:
        return PriorBatch(self.embeds[batch.rows], cast(Any, None))

    def metadata(self, batch: RowBatch) -> list[dict[str, Any]]:
        return [{"attributes": self.attributes[row]._asdict()} for row in batch.rows]


def right(noise: float) -> Tensor:
    store = Written(600, noise)
    probe = AttributeProbe.fit(cast(EmbeddingStore, store))
    return (probe.read(5 * store.embeds) == store.truth).float().mean(0)  # norms say nothing


def test_every_attribute_is_read() -> None:
    assert right(noise=0.01).eq(1).all()


def test_what_drowns_in_noise_is_not_read() -> None:
    """In sample: 600 rows leave a regression in few dimensions little to learn by heart."""
    assert right(noise=20.0).mean() < 0.6


def test_samples_keep_their_shape() -> None:
    store = Written(100, 0.01)
    read = AttributeProbe.fit(cast(EmbeddingStore, store)).read(store.embeds.view(2, 50, -1))
    assert read.shape == (2, 50, store.truth.shape[1])
    assert torch.equal(read.flatten(0, 1), store.truth)


def test_pictures_without_attributes_cannot_be_probed() -> None:
    store = Written(10, 0.01)
    store.metadata = lambda batch: [{} for _ in batch.rows]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no `attributes`"):
        AttributeProbe.fit(cast(EmbeddingStore, store))


def test_probes_need_training_pictures() -> None:
    empty = Written(1, 0.0)
    empty.attributes = []
    with pytest.raises(InputError, match="Got none: add train shards"):
        AttributeProbe.fit(cast(EmbeddingStore, empty))
