"""Batches whose captions stand where the images would."""

import os
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.data.shards import Split
from unclip_pl.data.store import STATISTICS as IMAGES
from unclip_pl.data.text_embedding import STATISTICS, TextEmbeddingDataModule
from unclip_pl.nn.space import EmbeddingSpace, Moments, write_statistics
from unclip_pl.types import DecoderBatch


class Keeper(LightningModule):
    """Keeps what it is given."""

    batch_type = DecoderBatch

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[DecoderBatch] = []

    def test_step(self, batch: DecoderBatch) -> None:
        self.seen.append(batch)


@pytest.fixture
def data(source: Path, store: Path, clip: ClipSpec) -> TextEmbeddingDataModule:
    (store / STATISTICS).unlink(missing_ok=True)
    return TextEmbeddingDataModule(str(source), str(store), clip, batch_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_caption_s_embedding_is_in_the_image_s_place(data: TextEmbeddingDataModule, workers: int) -> None:
    keeper, data.num_workers = Keeper(), workers
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    Trainer(**options).test(keeper, data, verbose=False)  # type: ignore[arg-type]
    assert sum(len(batch.image) for batch in keeper.seen) == 7
    for batch in keeper.seen:
        assert isinstance(batch, DecoderBatch)
        assert torch.equal(batch.image_embed, batch.text.embed)


def test_statistics_are_the_captions_own_and_made_once(data: TextEmbeddingDataModule) -> None:
    z_t: Tensor = torch.cat([text for _, text in data.embeddings.embed_chunks(Split.TRAIN, 16)])
    path = Path(data.statistics)
    space = EmbeddingSpace(str(path), "whiten")
    torch.testing.assert_close(space.mean, F.normalize(z_t, dim=-1).mean(0), atol=1e-6, rtol=1e-5)
    assert space.fingerprint == data.embeddings.fingerprint
    made = path.stat().st_mtime_ns
    assert Path(data.statistics).stat().st_mtime_ns == made


def test_statistics_are_made_again_when_the_store_is(data: TextEmbeddingDataModule, store: Path) -> None:
    path = Path(data.statistics)
    whole = path.read_bytes()
    images = EmbeddingSpace(str(store / IMAGES))
    few = Moments.of(torch.randn(9, 64))
    write_statistics(path, moments=few, null_text=images.null_text, fingerprint=images.fingerprint)
    made = (store / IMAGES).stat().st_mtime_ns
    os.utime(path, ns=(made - 1, made - 1))
    assert Path(data.statistics).read_bytes() == whole


def test_statistics_of_another_clip_are_made_again(data: TextEmbeddingDataModule) -> None:
    path = Path(data.statistics)
    null = EmbeddingSpace(str(path)).null_text
    write_statistics(path, moments=Moments.of(torch.randn(9, 64)), null_text=null, fingerprint="another")
    assert EmbeddingSpace(data.statistics).fingerprint == data.embeddings.fingerprint
