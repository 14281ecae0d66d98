"""The embedding store: frozen CLIP features of a whole source, mapped from disk and gathered batch by batch.

Rows count the images of all shards, sorted by shard name; within a shard train stands before val before held-out. A
row's caption is chosen by its draw: ``draw % captions``.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip_pl.data.features import ShardFeatures, map_features, unpack_texts
from unclip_pl.data.manifest import ShardRecord, read_manifest, require_one_clip
from unclip_pl.data.sampler import BLOCK, Blocks, RowBatch
from unclip_pl.data.shards import Split, parse_json
from unclip_pl.data.sources import Shard, list_shards
from unclip_pl.data.transforms import BadSample, load_square, to_pixels
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.types import DecoderBatch, EvaluationBatch, PriorBatch, TextFeatures, UpsamplerBatch

STATISTICS = "statistics.safetensors"

#: Shards that are mapped at a time; the system allows a process 65,530 maps.
OPEN = 256


class _Part(NamedTuple):
    """The rows of a batch that lie in one shard."""

    shard: Shard
    features: ShardFeatures
    where: np.ndarray  # (n,) places in the batch
    rows: np.ndarray  # (n,) rows of the shard
    captions: np.ndarray  # (n,) rows of the shard's captions


class EmbeddingStore:
    """Batches of float32 features (raw, as CLIP gave them) and images, by row.

    Cheap to send to a worker process, which maps the files anew.

    Args:
        path: the folder that ``unclip precompute`` wrote.
        source: the shards it was made of, see ``list_shards``.
        image_size: side of the images in batches that have some.

    Raises:
        FileNotFoundError: no store or no shards there.
        ValueError: the store does not cover the source, mixes CLIPs, or a file of it is damaged.
    """

    def __init__(self, path: str | Path, source: str, *, image_size: int) -> None:
        self.path = Path(path)
        self.source = source
        self.image_size = image_size
        self.shards = list_shards(source)
        self.records = self._records()
        self.counts = np.array([record.splits for record in self.records], np.int64)  # (S, splits)
        self.starts = np.cumsum([0, *(record.images for record in self.records)])  # (S + 1,), of each shard's rows
        self.features = lru_cache(OPEN)(self._map)
        for shard in range(min(OPEN, len(self.shards))):  # what is damaged shall show now where it costs little
            self.features(shard)

    def __reduce__(self) -> tuple[object, ...]:
        return _open, (self.path, self.source, self.image_size)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of the CLIP that made the embeddings."""
        return self.records[0].clip

    @property
    def embed_dim(self) -> int:
        """d."""
        return self.features(0).image_embed.shape[1]

    @property
    def statistics(self) -> Path:
        """The file that ``EmbeddingSpace`` reads."""
        return self.path / STATISTICS

    def count(self, split: Split) -> int:
        """Images of a split."""
        return int(self.counts[:, split].sum())

    def rows(self, split: Split) -> np.ndarray:
        """(n,) rows of a split, ascending."""
        runs = self.blocks(split, max(1, len(self)))
        return runs.rows(np.arange(len(runs.first)))

    def blocks(self, split: Split, size: int = BLOCK) -> Blocks:
        """The rows of a split in blocks of at most ``size`` neighbours of one shard."""
        first = self.starts[:-1] + self.counts[:, :split].sum(1)
        return Blocks.between(first, first + self.counts[:, split], size)

    def embed_chunks(self, split: Split, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw (image_embed, text_embed) of a split in order, each image with its first caption."""
        blocks = self.blocks(split, size)
        for first, stop in zip(*blocks, strict=True):
            rows = np.arange(first, stop)
            parts = self._parts(RowBatch(rows, np.zeros(len(rows), np.uint64)))
            text = np.empty((len(rows), self.embed_dim), np.float16)
            for part in parts:
                text[part.where] = part.features.text_embed[part.captions]
            yield self._image_embed(parts, len(rows)), torch.from_numpy(text).float()

    def prior_batch(self, batch: RowBatch) -> PriorBatch:
        """Embeddings and captions."""
        parts, size = self._parts(batch), len(batch.rows)
        return PriorBatch(self._image_embed(parts, size), self._text(parts, size))

    def decoder_batch(self, batch: RowBatch) -> DecoderBatch:
        """Embeddings, captions and images."""
        parts, size = self._parts(batch), len(batch.rows)
        return DecoderBatch(self._images(parts, size), self._image_embed(parts, size), self._text(parts, size))

    def evaluation_batch(self, batch: RowBatch) -> EvaluationBatch:
        """As ``decoder_batch``, with the captions as text and the samples' JSON."""
        return EvaluationBatch(*self.decoder_batch(batch), self.captions(batch), self.metadata(batch))

    def upsampler_batch(self, batch: RowBatch) -> UpsamplerBatch:
        """Images alone."""
        return UpsamplerBatch(self._images(self._parts(batch), len(batch.rows)))

    def captions(self, batch: RowBatch) -> list[str]:
        """The caption of each row, as text."""
        texts = np.empty(len(batch.rows), object)
        for part in self._parts(batch):
            texts[part.where] = unpack_texts(part.features.captions, part.features.captions_offsets, part.captions)
        return texts.tolist()

    def keys(self, batch: RowBatch) -> list[str]:
        """The key of each row."""
        texts = np.empty(len(batch.rows), object)
        for part in self._parts(batch):
            texts[part.where] = unpack_texts(part.features.keys, part.features.keys_offsets, part.rows)
        return texts.tolist()

    def metadata(self, batch: RowBatch) -> list[dict[str, Any]]:
        """The JSON object of each row, empty where it has none."""
        found: list[dict[str, Any]] = [{} for _ in batch.rows]
        for shard, features, where, rows, _ in self._parts(batch):
            spans = zip(features.json_offset[rows].tolist(), features.json_size[rows].tolist(), strict=True)
            for place, data in zip(where, shard.read(list(spans)), strict=True):
                found[place] = parse_json(data)
        return found

    def _parts(self, batch: RowBatch) -> list[_Part]:
        shard_of = np.searchsorted(self.starts, batch.rows, side="right") - 1
        parts = []
        for shard in np.unique(shard_of):
            features, where = self.features(int(shard)), np.flatnonzero(shard_of == shard)
            rows = batch.rows[where] - self.starts[shard]
            first = features.caption_offsets[rows]
            count = (features.caption_offsets[rows + 1] - first).astype(np.uint64)
            pair = first + (batch.draws[where] % count).astype(np.int64)
            parts.append(_Part(self.shards[shard], features, where, rows, features.caption_rows[pair]))
        return parts

    def _image_embed(self, parts: list[_Part], size: int) -> Tensor:
        embed = np.empty((size, self.embed_dim), np.float16)
        for part in parts:
            embed[part.where] = part.features.image_embed[part.rows]
        return torch.from_numpy(embed).float()

    def _text(self, parts: list[_Part], size: int) -> TextFeatures:
        """Ragged to padded by index arithmetic alone."""
        first, length = np.empty(size, np.int64), np.empty(size, np.int64)
        for part in parts:
            first[part.where] = part.features.text_offsets[part.captions]
            length[part.where] = part.features.text_offsets[part.captions + 1] - first[part.where]
        position = np.arange(length.max(initial=0))
        mask = position < length[:, None]  # (B, L)
        width = self.features(0).text_states.shape[1]
        tokens, states = np.zeros(mask.shape, np.int64), np.zeros((*mask.shape, width), np.float32)
        embed = np.empty((size, self.embed_dim), np.float16)
        for part in parts:
            row, column = mask[part.where].nonzero()
            source = first[part.where][row] + column
            row = part.where[row]
            tokens[row, column] = part.features.text_tokens[source]
            # torch converts faster than NumPy; shard by shard, or batches of halves would fragment the heap.
            states[row, column] = torch.from_numpy(part.features.text_states[source]).float().numpy()
            embed[part.where] = part.features.text_embed[part.captions]
        return TextFeatures(
            torch.from_numpy(tokens),
            torch.from_numpy(states),
            torch.from_numpy(mask),
            torch.from_numpy(embed).float(),
        )

    def _images(self, parts: list[_Part], size: int) -> Tensor:
        """(B, 3, H, H) in [-1, 1]: the crop that CLIP saw, from the source tars."""
        images = torch.empty(size, 3, self.image_size, self.image_size, dtype=torch.uint8)
        for shard, features, where, rows, _ in parts:
            offsets, sizes = features.image_offset[rows].tolist(), features.image_size[rows].tolist()
            files = shard.read(list(zip(offsets, sizes, strict=True)))
            for place, offset, data in zip(where, offsets, files, strict=True):
                try:
                    images[place] = load_square(data, self.image_size)
                except BadSample as error:
                    raise InputError(
                        f"{error} at byte {offset} of {shard}, which was whole when it was embedded: "
                        "run `unclip precompute` again."
                    ) from error
        return to_pixels(images)

    def _map(self, shard: int) -> ShardFeatures:
        record = self.records[shard]
        features = map_features(self.path / record.file)
        _check(self.path / record.file, record, features)
        return features

    def _records(self) -> list[ShardRecord]:
        records = read_manifest(self.path)
        missing = [shard.name for shard in self.shards if shard.name not in records]
        if missing:
            raise MissingFileError(
                f"Expected embeddings of all {len(self.shards)} shards of {self.source} in {self.path}. {len(missing)} "
                f"are missing, such as {missing[0]}: run `unclip precompute` for it."
            )
        files = {entry.name for entry in os.scandir(self.path)}
        for shard in self.shards:
            record = records[shard.name]
            if record.file not in files:
                raise MissingFileError(f"{self.path / record.file} is gone: run `unclip precompute`.")
            if not shard.remote and not record.describes(shard, self.path / record.file):
                raise InputError(
                    f"{shard} is not the file that was embedded as {self.path / record.file}: run `unclip precompute` "
                    "again, which embeds what has changed."
                )
        found = [records[shard.name] for shard in self.shards]
        require_one_clip(self.path, found, found[0].clip)
        return found


def _open(path: Path, source: str, image_size: int) -> EmbeddingStore:
    return EmbeddingStore(path, source, image_size=image_size)


def _ascends(offsets: np.ndarray) -> bool:
    return bool(offsets[0] == 0 and (offsets[1:] >= offsets[:-1]).all())


def _lies_in(values: np.ndarray, count: int) -> bool:
    return bool((values >= 0).all() and (values < count).all())


def _check(path: Path, record: ShardRecord, features: ShardFeatures) -> None:
    """Counts of the manifest against those of the file, and those of the file against each other."""
    images, captions = len(features.image_embed), len(features.text_embed)
    agree = (
        (images, captions) == (record.images, record.captions)
        and images == len(features.split) == len(features.image_offset) == len(features.json_offset)
        and images + 1 == len(features.caption_offsets) == len(features.keys_offsets)
        and captions + 1 == len(features.text_offsets) == len(features.captions_offsets)
        and features.caption_offsets[-1] == len(features.caption_rows)
        and features.text_offsets[-1] == len(features.text_states) == len(features.text_tokens)
        and all(_ascends(getattr(features, name)) for name in features._fields if name.endswith("_offsets"))
        and _lies_in(features.caption_rows, captions)
        and _lies_in(features.image_size, record.source_size)
        and _lies_in(features.json_size, record.source_size)
    )
    if not agree:
        raise InputError(
            f"{path}: expected {record.images} images and {record.captions} captions as in the manifest. Got {images} "
            f"and {captions}, or columns that do not fit each other: run `unclip precompute --verify true`."
        )
