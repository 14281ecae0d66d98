"""z_t in the place of z_i, to train a decoder that needs no prior (§5.1 of the paper, FID 9.16)."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.nn.space import EmbeddingSpace, Moments, write_statistics

STATISTICS = "text-statistics.safetensors"


class TextEmbeddingDataModule(UnclipDataModule):
    """Data whose batches have the captions' z_t where the images' z_i would be, with z_t's own statistics.

    The arguments are those of ``UnclipDataModule``.
    """

    @property
    def statistics(self) -> str:
        """Path of z_t's mean and principal axes over the training split.

        It is made where it is missing, another CLIP's, or older than the images' statistics, which a store writes again
        when shards are added or changed.
        """
        source, path = Path(super().statistics), Path(self.store) / STATISTICS
        images = EmbeddingSpace(str(source))
        stale = not path.is_file() or path.stat().st_mtime_ns < source.stat().st_mtime_ns
        if stale or EmbeddingSpace(str(path)).fingerprint != images.fingerprint:
            moments = reduce(Moments.plus, (Moments.of(z_t) for _, z_t in self.embeddings.embed_chunks(Split.TRAIN)))
            write_statistics(path, moments=moments, null_text=images.null_text, fingerprint=images.fingerprint)
        return str(path)

    def _assemble(self) -> Callable[[RowBatch], Any]:
        return _Swapped(super()._assemble())


class _Swapped:
    """Maker of batches that worker processes can be sent."""

    def __init__(self, make: Callable[[RowBatch], Any]) -> None:
        self.make = make

    def __call__(self, rows: RowBatch) -> Any:
        batch = self.make(rows)
        return batch._replace(image_embed=batch.text.embed)
