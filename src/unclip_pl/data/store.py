"""The embedding store: frozen CLIP features of a whole source, mapped from disk and gathered batch by batch.

A store is a folder: one safetensors file for each source shard, ``manifest.jsonl`` with one line for each of them, and
the statistics that ``EmbeddingSpace`` reads. Rows count the images of all shards, sorted by shard name; within a shard
train stands before val before held-out. A row's caption is chosen by its draw: ``draw % captions``.

A store may leave out the token states, which take most of its bytes: their width W is 0 then, in its files and in its
batches.

Legend: N images, M distinct captions, P (image, caption) pairs, T text tokens of all captions, d CLIP's embedding
dimension, W its text width. Ragged values lie end to end, with offsets: item i is ``values[offsets[i]:offsets[i+1]]``.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import get_worker_info

from unclip_pl.data.sampler import BLOCK, Blocks, RowBatch
from unclip_pl.data.shards import UNKNOWN, Shard, Split, encode_text, list_shards, parse_json
from unclip_pl.data.transforms import BadSample, load_square, to_pixels
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import UnknownFormatError, replacing, require_format, sha256, write_text
from unclip_pl.nn.space import Moments
from unclip_pl.types import DecoderBatch, EvaluationBatch, PriorBatch, TextFeatures, UpsamplerBatch

MANIFEST, STATISTICS = "manifest.jsonl", "statistics.safetensors"
#: Format of a shard's features and of its record. Records of before there was an entry have the first one.
FORMAT = 1
#: Bytes at the beginning of a shard that are compared each time a store is opened.
HEAD = 2**14
#: Shards that are mapped at a time; the system allows a process 65,530 maps.
OPEN = 256

_DTYPES = {"F16": "<f2", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}
_MOMENTS = "moments."
_HEAD = "shard"


# --- The manifest


class ShardRecord(NamedTuple):
    """Facts about one source shard; only ``source_mark`` may depend on this machine."""

    shard: str  # file name of the tar
    source_size: int  # bytes
    source_mark: str  # of a remote tar, see `Stamp`
    source_sha256: str
    file: str  # in the store's folder
    sha256: str  # of what that file holds, see `Contents.checksum`
    clip: str  # fingerprint
    images: int
    splits: list[int]  # images of each `Split`, in that order, which is their order in the file
    captions: int  # distinct ones
    dtype: str
    skipped: dict[str, int]  # bad samples by reason; their keys are in the file's header
    version: str  # of unclip_pl
    format: int = FORMAT
    caption_key: str = ""  # see `index_shard`
    others: list[str] = []  # see `ShardIndex`
    states: bool = True  # False where the token states are left out
    source_head: str = ""  # see `head_of`; records of before there was an entry have none

    @classmethod
    def parse(cls, values: dict[str, Any], path: Path) -> "ShardRecord":
        """Make a record of its JSON.

        Raises:
            UnknownFormatError: another version of the package wrote it.
            TypeError: the values are no record.
        """
        require_format(dict(values).get("format", 1), FORMAT, path)
        return cls(**values)

    @classmethod
    def of(cls, contents: "Contents", **source: Any) -> Self:
        """Return the record of a shard's contents.

        Args:
            contents: arrays and bad samples of the shard.
            **source: the fields that they do not tell.
        """
        features = contents.features
        return cls(
            sha256=contents.checksum(),
            images=len(features.image_embed),
            splits=np.bincount(features.split, minlength=len(Split)).tolist(),
            captions=len(features.text_embed),
            dtype=str(features.image_embed.dtype),
            skipped={reason: len(keys) for reason, keys in contents.skipped.items()},
            version=tool_version(),
            **source,
        )

    def describes(self, shard: Shard, file: Path) -> bool:
        """Say whether a tar is the one that was embedded.

        Tars are padded, so those of two sources are often of one size; their first bytes tell them apart.
        A local tar that was touched after its features were written is read again; if it is the same after all, its
        features are touched, so that this happens once.

        Args:
            shard: the tar, in its present state.
            file: the features.
        """
        if shard.remote:
            stamp = shard.stamp()
            return stamp.mark == self.source_mark and stamp.size in (self.source_size, UNKNOWN)
        stat = shard.path.stat()
        if stat.st_size != self.source_size or (self.source_head and head_of(shard.path) != self.source_head):
            return False
        if max(stat.st_mtime_ns, stat.st_ctime_ns) < file.stat().st_mtime_ns:
            return True
        looked_ns = time.time_ns()
        same = sha256(shard.path) == self.source_sha256
        if same:
            with suppress(OSError):  # a store that this user may only read
                os.utime(file, ns=(looked_ns, looked_ns))
        return same


def head_of(path: Path) -> str:
    """Return a hash of a file's first bytes: a tar's first header and what follows it."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(HEAD)).hexdigest()[:16]


def tool_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("unclip_pl")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def read_manifest(store: Path) -> dict[str, ShardRecord]:
    """Read the records by shard name; there are none where there is no store yet.

    Raises:
        InputError: a line is no record, or of an unknown format.
    """
    path = store / MANIFEST
    records: dict[str, ShardRecord] = {}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = ShardRecord.parse(json.loads(line), path)
        except UnknownFormatError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number} is no shard record ({error}): delete the manifest and run `unclip precompute`, "
                "which makes it again from the files beside it."
            ) from error
        records[record.shard] = record
    return records


def write_manifest(store: Path, records: Iterable[ShardRecord]) -> None:
    """Put a new manifest in the old one's place, sorted by shard name."""
    lines = [json.dumps(record._asdict()) + "\n" for record in sorted(records, key=lambda record: record.shard)]
    write_text(store / MANIFEST, "".join(lines))


def require_one_clip(store: Path, records: Iterable[ShardRecord], fingerprint: str) -> None:
    """Raise InputError where the store holds another CLIP's embeddings."""
    foreign = sorted({record.clip for record in records} - {fingerprint})
    if foreign:
        raise InputError(
            f"Embeddings in {store} were made by CLIP {foreign[0]!r}, but this run uses {fingerprint!r}. Run "
            "`unclip precompute` with another --store for it (and name that as data.store), or change the clip."
        )


def require_caption_key(store: Path, records: Iterable[ShardRecord], caption_key: str) -> None:
    """Raise InputError where captions in the store were found at another ``caption_key``, see ``index_shard``."""
    foreign = sorted({record.caption_key for record in records} - {caption_key})
    if foreign:
        raise InputError(
            f"Captions in {store} were read with caption_key {foreign[0]!r}, but this run uses {caption_key!r}: set "
            f"data.caption_key to {foreign[0]!r}, or run `unclip precompute --caption_key '{caption_key}'`."
        )


def require_states(store: Path, records: Iterable[ShardRecord], states: bool) -> None:
    """Raise InputError where a store has token states and none are wanted, or the reverse."""
    if any(record.states != states for record in records):
        kept, asked = ("no", "yes") if states else ("yes", "no")
        raise InputError(
            f"Expected --states {kept}, as {store} was made. Got {asked}: give --states {kept}, or another --store."
        )


# --- One shard's features


class ShardFeatures(NamedTuple):
    """Raw embeddings of a shard's images and captions, and where everything came from."""

    image_embed: np.ndarray  # (N, d) float16
    text_embed: np.ndarray  # (M, d) float16
    text_states: np.ndarray  # (T, W) float16, real tokens only; W is 0 where they are left out
    text_tokens: np.ndarray  # (T,) int32
    text_offsets: np.ndarray  # (M + 1,) int64, into the T tokens
    caption_rows: np.ndarray  # (P,) int32, into the M captions
    caption_offsets: np.ndarray  # (N + 1,) int64, into the P pairs
    captions: np.ndarray  # uint8, UTF-8
    captions_offsets: np.ndarray  # (M + 1,) int64
    keys: np.ndarray  # uint8, UTF-8
    keys_offsets: np.ndarray  # (N + 1,) int64
    image_offset: np.ndarray  # (N,) int64, of the image file in the tar
    image_size: np.ndarray  # (N,) int64, bytes
    json_offset: np.ndarray  # (N,) int64, of key.json in the tar
    json_size: np.ndarray  # (N,) int64, bytes; 0 where there is none
    split: np.ndarray  # (N,) uint8, a `Split`


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """Return (n + 1,) int64: where each of n ragged items begins, and where the last ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def pack_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Lay texts end to end as UTF-8 bytes, and return them with their (n + 1,) offsets."""
    encoded = [encode_text(text) for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), offsets_of(map(len, encoded))


def unpack_texts(packed: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return the texts of some rows."""
    spans = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
    return [packed[start:stop].tobytes().decode("utf-8", "surrogateescape") for start, stop in spans]


class Contents(NamedTuple):
    """Everything in a shard's file but the record in its header."""

    features: ShardFeatures
    moments: Moments  # of its training images
    skipped: dict[str, list[str]]  # keys of the bad samples by reason

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays by their name in the file."""
        moments = {_MOMENTS + name: value.numpy() for name, value in self.moments._asdict().items()}
        arrays = self.features._asdict() | moments
        return {name: np.asarray(value, order="C") for name, value in arrays.items()}  # a scalar stays one

    def checksum(self) -> str:
        """Return SHA-256 over every array with its name, type and shape, and the bad samples' keys."""
        digest = hashlib.sha256(json.dumps(self.skipped, sort_keys=True).encode())
        for name, value in self.tensors().items():
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def write_features(path: Path, contents: Contents, record: ShardRecord, opened_ns: int) -> None:
    """Write a shard's file and put it in place.

    Args:
        path: file to write.
        contents: arrays and bad samples of the shard.
        record: the manifest's line. It also goes into the file's header, where no kill can part the two.
        opened_ns: time at which the source was opened. It becomes the file's: a source that is newer may have changed.

    Raises:
        OSError: the disk is full, or must not be written to.
    """
    head = json.dumps({"record": record._asdict(), "skipped": contents.skipped})
    with replacing(path) as temporary:
        try:
            save_file(contents.tensors(), temporary, metadata={_HEAD: head})  # one entry: of several the order varies
        except SafetensorError as error:
            raise InputError(f"{path} cannot be written ({error}): free some space, or use another store.") from error
        os.utime(temporary, ns=(opened_ns, opened_ns))


def read_record(path: Path) -> ShardRecord | None:
    """Read the record in a file's header; None where there is no file, or none that is whole.

    Raises:
        UnknownFormatError: another version of the package wrote the file.
    """
    try:
        return ShardRecord.parse(_head(path)["record"], path)
    except UnknownFormatError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def read_contents(path: Path) -> Contents:
    """Read all of a shard's file.

    Raises:
        InputError: the file is damaged or of another layout.
    """
    return Contents(map_features(path), read_moments(path), _head(path)["skipped"])


def _head(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {})[_HEAD])


def map_features(path: Path) -> ShardFeatures:
    """Return a shard's arrays as views of the mapped file: nothing is read until it is used.

    Raises:
        InputError: the file is damaged or of another layout.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks header and length
            pass
        buffer = np.asarray(np.memmap(path, np.uint8, mode="r"))
        base = 8 + int(buffer[:8].view("<u8")[0])
        header = json.loads(buffer[8:base].tobytes())
        arrays = {}
        for name in ShardFeatures._fields:
            start, stop = header[name]["data_offsets"]
            view = buffer[base + start : base + stop].view(_DTYPES[header[name]["dtype"]])
            arrays[name] = view.reshape(header[name]["shape"])
        return ShardFeatures(**arrays)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error!r}): run `unclip precompute`, which makes it again."
        ) from error


def read_moments(path: Path) -> Moments:
    """Read the moments of a shard's training images."""
    with safe_open(path, framework="pt") as file:
        return Moments(*(file.get_tensor(_MOMENTS + name) for name in Moments._fields))


def moments_of(image_embed: np.ndarray) -> Moments:
    """Compute the moments of (N, d) float16 embeddings."""
    return Moments.of(torch.from_numpy(image_embed.astype(np.float32)))


# --- The store


class _ShardRows(NamedTuple):
    """Rows of a batch that lie in one shard."""

    shard: Shard
    features: ShardFeatures
    where: np.ndarray  # (n,) places in the batch
    rows: np.ndarray  # (n,) rows of the shard
    captions: np.ndarray  # (n,) rows of the shard's captions


class _Decoded(NamedTuple):
    """Images that are read and decoded once, and kept."""

    images: Tensor  # (N, 3, H, H) uint8
    there: np.ndarray  # (N,) bool, True where the image has been decoded


class EmbeddingStore:
    """Batches of float32 features (raw, as CLIP gave them) and images, by row.

    It is cheap to send to a worker process, which maps the files itself.

    Args:
        path: folder that ``unclip precompute`` or ``unclip import embeddings`` wrote.
        source: shards that it was made of, see ``list_shards``. Empty takes all that is there, without pictures: the
            shards are not looked for.
        image_size: side of the images in batches that have some.
        image_memory: bytes that decoded images may take. Where all fit, each is decoded once; else, at every use.

    Raises:
        MissingFileError: no store or no shards there.
        InputError: the store does not cover the source, mixes CLIPs, or a file of it is damaged.
    """

    def __init__(self, path: str | Path, source: str = "", *, image_size: int = 1, image_memory: int = 2**31) -> None:
        self.path = Path(path)
        self.source = source
        self.image_size = image_size
        self.image_memory = image_memory
        self.shards = list_shards(source) if source else self._all_shards()
        self.records = self._records()
        self.counts = np.array([record.splits for record in self.records], np.int64)  # (S, splits)
        self.starts = np.cumsum([0, *(record.images for record in self.records)])  # (S + 1,), of each shard's rows
        self.features = lru_cache(OPEN)(self._map)
        for shard in range(min(OPEN, len(self.shards))):  # damage shows now where looking costs little
            self.features(shard)

    def __reduce__(self) -> tuple[object, ...]:
        options = {"image_size": self.image_size, "image_memory": self.image_memory}
        return partial(type(self), self.path, self.source, **options), ()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the CLIP that made the embeddings."""
        return self.records[0].clip

    @property
    def embed_dim(self) -> int:
        """Width d of the image embeddings."""
        return self.features(0).image_embed.shape[1]

    @property
    def text_embed_dim(self) -> int:
        """Width of the text embeddings: d, unless two models made the two sides."""
        return self.features(0).text_embed.shape[1]

    @property
    def has_states(self) -> bool:
        """Whether the captions' token states are there."""
        return self.records[0].states

    @property
    def text_shape(self) -> tuple[int, int]:
        """Width of the token states, and how many the longest caption has; both 0 where they are left out."""
        if not self.has_states:
            return 0, 0
        longest = (int(np.diff(self.features(shard).text_offsets).max(initial=0)) for shard in range(len(self.shards)))
        return self.features(0).text_states.shape[1], max(longest)

    @property
    def statistics(self) -> Path:
        """Path of the file that ``EmbeddingSpace`` reads."""
        return self.path / STATISTICS

    def count(self, split: Split) -> int:
        """Count the images of a split."""
        return int(self.counts[:, split].sum())

    def rows(self, split: Split) -> np.ndarray:
        """Return the (n,) rows of a split, ascending."""
        runs = self.blocks(split, max(1, len(self)))
        return runs.rows(np.arange(len(runs.first)))

    def blocks(self, split: Split, size: int = BLOCK) -> Blocks:
        """Cut the rows of a split into blocks of at most ``size`` neighbours of one shard."""
        first = self.starts[:-1] + self.counts[:, :split].sum(1)
        return Blocks.between(first, first + self.counts[:, split], size)

    def embed_chunks(self, split: Split, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield raw (image_embed, text_embed) of a split in order, each image with its first caption."""
        blocks = self.blocks(split, size)
        for first, stop in zip(*blocks, strict=True):
            rows = np.arange(first, stop)
            parts = self._by_shard(RowBatch(rows, np.zeros(len(rows), np.uint64)))
            text = np.empty((len(rows), self.text_embed_dim), np.float16)
            for part in parts:
                text[part.where] = part.features.text_embed[part.captions]
            yield self._image_embed(parts, len(rows)), torch.from_numpy(text).float()

    def prior_batch(self, batch: RowBatch) -> PriorBatch:
        """Gather embeddings and captions."""
        parts, size = self._by_shard(batch), len(batch.rows)
        return PriorBatch(self._image_embed(parts, size), self._text(parts, size))

    def decoder_batch(self, batch: RowBatch) -> DecoderBatch:
        """Gather embeddings, captions and images."""
        parts, size = self._by_shard(batch), len(batch.rows)
        return DecoderBatch(self._images(batch), self._image_embed(parts, size), self._text(parts, size))

    def evaluation_batch(self, batch: RowBatch) -> EvaluationBatch:
        """Gather a decoder's batch, the captions as text and the samples' JSON."""
        return EvaluationBatch(*self.decoder_batch(batch), self.captions(batch), self.metadata(batch))

    def pictureless_batch(self, batch: RowBatch) -> EvaluationBatch:
        """Gather embeddings and captions as for an evaluation, with pictures of side 0 and without JSON."""
        prior = self.prior_batch(batch)
        nothing = torch.empty(len(batch.rows), 3, 0, 0)
        return EvaluationBatch(nothing, *prior, self.captions(batch), [{} for _ in batch.rows])

    def upsampler_batch(self, batch: RowBatch) -> UpsamplerBatch:
        """Gather images alone."""
        return UpsamplerBatch(self._images(batch))

    def captions(self, batch: RowBatch) -> list[str]:
        """Return the caption of each row, as text."""
        texts = np.empty(len(batch.rows), object)
        for part in self._by_shard(batch):
            texts[part.where] = unpack_texts(part.features.captions, part.features.captions_offsets, part.captions)
        return texts.tolist()

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the keys of (n,) rows."""
        keys = np.empty(len(rows), object)
        for part in self._by_shard(RowBatch(rows, np.zeros(len(rows), np.uint64))):
            keys[part.where] = unpack_texts(part.features.keys, part.features.keys_offsets, part.rows)
        return keys.tolist()

    def caption_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return how many captions each of (n,) rows has."""
        counts = np.empty(len(rows), np.uint64)
        for part in self._by_shard(RowBatch(rows, np.zeros(len(rows), np.uint64))):
            counts[part.where] = np.diff(part.features.caption_offsets)[part.rows]
        return counts

    def metadata(self, batch: RowBatch) -> list[dict[str, Any]]:
        """Return the JSON object of each row, empty where it has none."""
        found: list[dict[str, Any]] = [{} for _ in batch.rows]
        for shard, features, where, rows, _ in self._by_shard(batch):
            spans = zip(features.json_offset[rows].tolist(), features.json_size[rows].tolist(), strict=True)
            for place, data in zip(where, shard.read(list(spans)), strict=True):
                found[place] = parse_json(data)
        return found

    def _by_shard(self, batch: RowBatch) -> list[_ShardRows]:
        shard_of = np.searchsorted(self.starts, batch.rows, side="right") - 1
        parts = []
        for shard in np.unique(shard_of):
            features, where = self.features(int(shard)), np.flatnonzero(shard_of == shard)
            rows = batch.rows[where] - self.starts[shard]
            first = features.caption_offsets[rows]
            count = (features.caption_offsets[rows + 1] - first).astype(np.uint64)
            pair = first + (batch.draws[where] % count).astype(np.int64)
            parts.append(_ShardRows(self.shards[shard], features, where, rows, features.caption_rows[pair]))
        return parts

    def _image_embed(self, parts: list[_ShardRows], size: int) -> Tensor:
        embed = np.empty((size, self.embed_dim), np.float16)
        for part in parts:
            embed[part.where] = part.features.image_embed[part.rows]
        return torch.from_numpy(embed).float()

    def _text(self, parts: list[_ShardRows], size: int) -> TextFeatures:
        """Pad ragged text features by index arithmetic alone."""
        first, length = np.empty(size, np.int64), np.empty(size, np.int64)
        for part in parts:
            first[part.where] = part.features.text_offsets[part.captions]
            length[part.where] = part.features.text_offsets[part.captions + 1] - first[part.where]
        position = np.arange(length.max(initial=0))
        mask = position < length[:, None]  # (B, L)
        width = self.features(0).text_states.shape[1]
        tokens, states = np.zeros(mask.shape, np.int64), np.zeros((*mask.shape, width), np.float32)
        embed = np.empty((size, self.text_embed_dim), np.float16)
        for part in parts:
            row, column = mask[part.where].nonzero()
            source = first[part.where][row] + column
            row = part.where[row]
            tokens[row, column] = part.features.text_tokens[source]
            # torch converts faster than NumPy. Shard by shard, since batches of halves would fragment the heap.
            states[row, column] = torch.from_numpy(part.features.text_states[source]).float().numpy()
            embed[part.where] = part.features.text_embed[part.captions]
        return TextFeatures(
            torch.from_numpy(tokens),
            torch.from_numpy(states),
            torch.from_numpy(mask),
            torch.from_numpy(embed).float(),
        )

    def _images(self, batch: RowBatch) -> Tensor:
        """Return (B, 3, H, H) in [-1, 1]: the crop that CLIP saw, decoded once where all images fit into memory."""
        decoded = None if get_worker_info() else self._decoded  # a worker would fill a memory of its own
        if decoded is None:
            return to_pixels(self._decode(batch))
        missing = np.unique(batch.rows[~decoded.there[batch.rows]])
        if len(missing):
            decoded.images[torch.from_numpy(missing)] = self._decode(
                RowBatch(missing, np.zeros(len(missing), np.uint64))
            )
            decoded.there[missing] = True
        return to_pixels(decoded.images[torch.from_numpy(batch.rows)])

    @cached_property
    def _decoded(self) -> _Decoded | None:
        """Room for the images of all rows; None where they would take more than ``image_memory``."""
        shape = (len(self), 3, self.image_size, self.image_size)
        if math.prod(shape) > self.image_memory:
            return None
        return _Decoded(torch.empty(shape, dtype=torch.uint8), np.zeros(len(self), bool))

    def _decode(self, batch: RowBatch) -> Tensor:
        """Return (B, 3, H, H) uint8, read from the source tars."""
        images = torch.empty(len(batch.rows), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for shard, features, where, rows, _ in self._by_shard(batch):
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
        return images

    def _map(self, shard: int) -> ShardFeatures:
        record = self.records[shard]
        features = map_features(self.path / record.file)
        _check(self.path / record.file, record, features)
        return features

    def _all_shards(self) -> list[Shard]:
        shards = [Shard(name) for name in sorted(read_manifest(self.path))]
        if not shards:
            raise MissingFileError(
                f"Expected a finished store at {self.path}. Got none: make one with `unclip precompute` or `unclip "
                "import embeddings`."
            )
        return shards

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
                raise MissingFileError(f"{self.path / record.file} is gone: run `unclip precompute` again.")
            if self.source and not shard.remote and not record.describes(shard, self.path / record.file):
                raise InputError(
                    f"{shard} is not the file that was embedded as {self.path / record.file}: run `unclip precompute` "
                    "again, which embeds what has changed."
                )
        found = [records[shard.name] for shard in self.shards]
        require_one_clip(self.path, found, found[0].clip)
        if len({record.states for record in found}) > 1:
            raise InputError(
                f"{self.path} holds the token states of some shards and not of others: run `unclip precompute` with "
                "another --store."
            )
        return found


def _ascends(offsets: np.ndarray) -> bool:
    return bool(offsets[0] == 0 and (offsets[1:] >= offsets[:-1]).all())


def _lies_in(values: np.ndarray, count: int) -> bool:
    return bool((values >= 0).all() and (values < count).all())


def _check(path: Path, record: ShardRecord, features: ShardFeatures) -> None:
    """Compare the manifest's counts with the file's, and the file's with each other."""
    images, captions = len(features.image_embed), len(features.text_embed)
    agree = (
        (images, captions) == (record.images, record.captions)
        and images == len(features.split) == len(features.image_offset) == len(features.json_offset)
        and images + 1 == len(features.caption_offsets) == len(features.keys_offsets)
        and captions + 1 == len(features.text_offsets) == len(features.captions_offsets)
        and features.caption_offsets[-1] == len(features.caption_rows)
        and features.text_offsets[-1] == len(features.text_states) == len(features.text_tokens)
        and record.states == (features.text_states.shape[1] > 0)
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
