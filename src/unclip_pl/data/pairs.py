"""Image-caption pairs straight from the shards, on which a CLIP is trained."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Entry, Split, decode_entries, index_shard, list_shards, no_samples, read_span
from unclip_pl.data.store import offsets_of
from unclip_pl.data.transforms import BadSample, load_square, to_pixels
from unclip_pl.errors import InputError
from unclip_pl.types import ClipBatch

log = logging.getLogger(__name__)


class PairStore:
    """Images and token ids of a source by row; rows count the samples of all shards, sorted by shard name.

    Images are decoded once and kept if they fit into ``memory``, otherwise batch by batch.

    Args:
        source: local shards, see ``list_shards``.
        tokenize: maker of (n, context) int64 token ids of captions.
        image_size: side of the images.
        caption_key: place of the captions, see ``index_shard``.
        memory: bytes that decoded images may take.

    Raises:
        InputError: no usable sample.
    """

    def __init__(
        self,
        source: str,
        tokenize: Callable[[list[str]], Tensor],
        *,
        image_size: int,
        caption_key: str = "",
        memory: int = 2**31,
    ) -> None:
        self.image_size = image_size
        self.entries: list[tuple[Path, Entry]] = []
        self.images: Tensor | None = None
        indices = [(shard.path, index_shard(shard.path, caption_key)) for shard in list_shards(source)]
        skipped: Counter[str] = Counter()
        for _, index in indices:
            skipped.update({reason: len(keys) for reason, keys in index.skipped.items()})
        if sum(len(index.entries) for _, index in indices) * 3 * image_size**2 <= memory:
            self.images = self._decode([(shard, index.entries) for shard, index in indices], skipped)
        else:
            self.entries = [(shard, entry) for shard, index in indices for entry in index.entries]
        if skipped:
            log.warning("%s: skipped %d sample(s): %s", source, skipped.total(), dict(skipped))
        if not self.entries:
            others = [name for _, index in indices for name in index.others]
            raise no_samples(source, len(indices), skipped, others)
        self.splits = np.array([entry.split for _, entry in self.entries], np.uint8)
        captions = list(dict.fromkeys(caption for _, entry in self.entries for caption in entry.captions))
        place = {caption: row for row, caption in enumerate(captions)}
        self.tokens = tokenize(captions)
        self.caption_rows = np.array([place[caption] for _, entry in self.entries for caption in entry.captions])
        self.caption_offsets = offsets_of(len(entry.captions) for _, entry in self.entries)

    def rows(self, split: Split) -> np.ndarray:
        """Return the (n,) rows of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def batch(self, batch: RowBatch, *, shift: int = 0) -> ClipBatch:
        """Gather pairs, each image moved by its draw.

        Args:
            batch: rows and draws.
            shift: largest move in pixels, both ways on both axes; the edge's pixels fill the gap.
        """
        images, good = self._load(batch.rows)
        rows, draws = batch.rows[good], batch.draws[good]
        first = self.caption_offsets[rows]
        pair = first + (draws % (self.caption_offsets[rows + 1] - first).astype(np.uint64)).astype(np.int64)
        tokens = self.tokens[torch.from_numpy(self.caption_rows[pair])]
        return ClipBatch(to_pixels(_shifted(images, draws, shift) if shift else images), tokens)

    def _decode(self, shards: list[tuple[Path, list[Entry]]], skipped: Counter[str]) -> Tensor:
        """Decode all images to (N, 3, H, H) uint8, and list their entries."""
        images = [torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)]
        for shard, entries in shards:
            for batch in decode_entries(shard, entries, self.image_size, 256):
                skipped.update(str(image) for _, image in batch if isinstance(image, BadSample))
                good = [(entry, image) for entry, image in batch if isinstance(image, Tensor)]
                self.entries += [(shard, entry) for entry, _ in good]
                images += [torch.stack([image for _, image in good])] if good else []
        return torch.cat(images)

    def _load(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Load a readable image for each row, and return their places; a good image fills in for a bad one."""
        if self.images is not None:
            return self.images[torch.from_numpy(rows)], np.arange(len(rows))
        images, good = [], []
        for place, row in enumerate(rows):
            shard, entry = self.entries[row]
            try:
                with shard.open("rb") as file:
                    images.append(load_square(read_span(file, *entry.image), self.image_size))
            except BadSample as error:
                log.warning("%s: skipped %s, %s", shard, entry.key, error)
                continue
            good.append(place)
        if not images:
            raise InputError(
                f"Expected readable images in {self.entries[rows[0]][0]}. Got a whole batch of bad ones: pack it again."
            )
        # Others in their places: ranks exchange their batches, which have to be of one size.
        again = np.resize(np.arange(len(good)), len(rows))
        return torch.stack(images)[torch.from_numpy(again)], np.array(good)[again]


def _shifted(images: Tensor, draws: np.ndarray, shift: int) -> Tensor:
    """Move each image by (dy, dx) in [-shift, shift], fixed by its draw's upper bits (the lower pick the caption)."""
    span = np.uint64(2 * shift + 1)
    size = images.shape[-1]

    def index(bit: int) -> Tensor:
        move = torch.from_numpy(((draws >> np.uint64(bit)) % span).astype(np.int64)) - shift
        return (torch.arange(size) + move[:, None]).clamp(0, size - 1)  # clamping repeats the edge

    y, x = index(32), index(44)
    sample, channel = torch.arange(len(images))[:, None, None, None], torch.arange(3)[:, None, None]
    return images[sample, channel, y[:, None, :, None], x[:, None, None, :]]
