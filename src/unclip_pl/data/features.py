"""One source shard's features as one file: a safetensors container, written at once and mapped into memory.

Legend: N images, M distinct captions, P (image, caption) pairs, T text tokens of all captions, d CLIP's embedding
dimension, W its text width. Ragged values lie end to end, with offsets: item i is ``values[offsets[i]:offsets[i+1]]``.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unclip_pl.data.manifest import ShardRecord
from unclip_pl.data.shards import encode_text
from unclip_pl.errors import InputError
from unclip_pl.files import replacing
from unclip_pl.nn.space import Moments

_DTYPES = {"F16": "<f2", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}
_MOMENTS = "moments."
_HEAD = "shard"


class ShardFeatures(NamedTuple):
    """Raw embeddings of a shard's images and captions, and where everything came from."""

    image_embed: np.ndarray  # (N, d) float16
    text_embed: np.ndarray  # (M, d) float16
    text_states: np.ndarray  # (T, W) float16, real tokens only
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
    """(n + 1,) int64: where each of n ragged items begins, and where the last ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def pack_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts end to end as UTF-8 bytes, and their (n + 1,) offsets."""
    encoded = [encode_text(text) for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), offsets_of(map(len, encoded))


def unpack_texts(packed: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> list[str]:
    """The texts of some rows."""
    spans = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
    return [packed[start:stop].tobytes().decode("utf-8", "surrogateescape") for start, stop in spans]


class Contents(NamedTuple):
    """All that a shard's file holds, but for the record in its head."""

    features: ShardFeatures
    moments: Moments  # of its training images
    skipped: dict[str, list[str]]  # keys of the bad samples by reason

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays by their name in the file."""
        moments = {_MOMENTS + name: value.numpy() for name, value in self.moments._asdict().items()}
        arrays = self.features._asdict() | moments
        return {name: np.asarray(value, order="C") for name, value in arrays.items()}  # a scalar stays one

    def checksum(self) -> str:
        """SHA-256 over every array with its name, type and shape, and the bad samples' keys."""
        digest = hashlib.sha256(json.dumps(self.skipped, sort_keys=True).encode())
        for name, value in self.tensors().items():
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def write_features(path: Path, contents: Contents, record: ShardRecord, opened_ns: int) -> None:
    """Write a shard's file and put it in place.

    Args:
        path: the file.
        contents: what it shall hold.
        record: what the manifest shall say of it; it also goes into the file's head, where no kill can part the two.
        opened_ns: when the source was opened. It becomes the file's time: a source that is newer may have changed.

    Raises:
        OSError: the disk is full, or must not be written to.
    """
    head = json.dumps({"record": record._asdict(), "skipped": contents.skipped})
    with replacing(path) as temporary:
        try:
            save_file(contents.tensors(), temporary, metadata={_HEAD: head})  # one entry: of several the order varies
        except SafetensorError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
        os.utime(temporary, ns=(opened_ns, opened_ns))


def read_record(path: Path) -> ShardRecord | None:
    """The record in a file's head; None where there is no file, or none that is whole."""
    try:
        return ShardRecord(**_head(path)["record"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def read_contents(path: Path) -> Contents:
    """All of a shard's file.

    Raises:
        ValueError: it is damaged or of another layout.
    """
    return Contents(map_features(path), read_moments(path), _head(path)["skipped"])


def _head(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {})[_HEAD])


def map_features(path: Path) -> ShardFeatures:
    """A shard's arrays as views of the mapped file: nothing is read until it is used.

    Raises:
        ValueError: the file is damaged or of another layout.
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
    """Moments of a shard's training images."""
    with safe_open(path, framework="pt") as file:
        return Moments(*(file.get_tensor(_MOMENTS + name) for name in Moments._fields))


def moments_of(image_embed: np.ndarray) -> Moments:
    """Moments of (N, d) float16 embeddings, as stored."""
    return Moments.of(torch.from_numpy(image_embed.astype(np.float32)))
