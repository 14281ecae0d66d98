"""Source shards: webdataset tars of ``key.png`` + ``key.txt`` (+ ``key.json``), read by their headers alone."""

import hashlib
import json
import re
import tarfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from glob import glob, has_magic
from itertools import pairwise, product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from unclip_pl.data.transforms import BadSample, load_square

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_TEXT = 2**20  # bytes of a caption or JSON member

_MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Split(IntEnum):
    """Which part of a data set a sample belongs to."""

    TRAIN = 0
    VAL = 1
    HELDOUT = 2


class Span(NamedTuple):
    """A file inside a tar."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One usable sample of a shard, and where its files lie in the tar."""

    key: str
    image: Span
    json: Span  # of size 0 where there is none
    captions: list[str]
    split: Split


class ShardIndex(NamedTuple):
    """A shard's samples in their order, and the keys of the bad ones by reason."""

    entries: list[Entry]
    skipped: dict[str, list[str]]


def list_shards(source: str) -> list[Path]:
    """The shards of a source, sorted by file name.

    Args:
        source: a folder of ``.tar`` files, one tar, a glob, or a range such as ``train-{000000..000012}.tar``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two have one name, or they are remote.
    """
    if "://" in source:
        raise ValueError(f"Expected local shards. Got {source!r}: download them first.")
    paths = [Path(found) for pattern in _expand(source) for found in _matches(pattern)]
    if not paths:
        raise FileNotFoundError(
            f"No shards at {source!r}: expected a folder of .tar files, a glob, or a range such as "
            "train-{000000..000012}.tar. `unclip pack` makes them."
        )
    paths.sort(key=lambda path: path.name)
    for one, other in pairwise(paths):
        if one.name == other.name:
            raise ValueError(f"Expected shards of different names. Got {one} and {other}: rename one of them.")
    return paths


def _expand(pattern: str) -> list[str]:
    """Numeric brace ranges, as the shell would: ``a-{08..10}`` → a-08 a-09 a-10."""
    parts = _RANGE.split(pattern)
    texts, ends = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in ends]
    return ["".join(a + b for a, b in zip(texts, (*numbers, ""), strict=True)) for numbers in product(*ranges)]


def _matches(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():
        return [str(found) for found in path.glob("*.tar")]
    if has_magic(pattern):
        return glob(pattern)
    if not path.is_file():
        raise FileNotFoundError(f"Shard {pattern} does not exist.")
    return [pattern]


def split_of_file(path: Path) -> Split | None:
    """The split that a shard's name announces, if any: ``train*``, ``val*``, ``heldout*`` or ``test*``."""
    names = {"train": Split.TRAIN, "val": Split.VAL, "heldout": Split.HELDOUT, "test": Split.HELDOUT}
    return next((split for name, split in names.items() if path.name.startswith(name)), None)


def split_of_key(key: str) -> Split:
    """96 % train, 2 % val, 2 % held-out, by a hash of the key: adding samples moves none."""
    point = int.from_bytes(hashlib.blake2b(encode_text(key), digest_size=8).digest()) / 2**64
    return Split.TRAIN if point < 0.96 else Split.VAL if point < 0.98 else Split.HELDOUT


def encode_text(text: str) -> bytes:
    """UTF-8; what a tar held in another encoding passes through unchanged."""
    return text.encode("utf-8", "surrogateescape")


def index_shard(path: Path) -> ShardIndex:
    """Where each sample of a shard lies, and its captions.

    Members are grouped as webdataset does, at the first dot of the base name.

    Raises:
        ValueError: the file is no tar at all. A tar that breaks off gives what lies before the break.
    """
    skipped: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, dict[str, Span]] = defaultdict(dict)
    for name, span in _members(path, skipped):
        match = _MEMBER.match(name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if suffix in groups[key]:
            skipped["duplicate key"].append(key)
            continue
        groups[key][suffix] = span

    entries, split = [], split_of_file(path)
    with path.open("rb") as file:
        for key, members in groups.items():
            try:
                image = _image(members)
                captions = _captions(file, members)
            except BadSample as reason:
                skipped[str(reason)].append(key)
                continue
            json_span = members.get("json", Span(0, 0))
            entries.append(Entry(key, image, json_span, captions, split_of_key(key) if split is None else split))
    return ShardIndex(entries, dict(skipped))


def _members(path: Path, skipped: dict[str, list[str]]) -> Iterator[tuple[str, Span]]:
    """Name and place of each regular file in a tar."""
    length, end = path.stat().st_size, 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for info in tar:
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if info.isreg() and info.offset_data + info.size <= length:
                        yield info.name, Span(info.offset_data, info.size)
            except tarfile.TarError:
                end = length + 1
            # tarfile takes a header that it cannot read for the end of the archive; the true end is a block of zeros.
            file.seek(min(end, length))
            if end > length or file.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
                skipped["broken tar"].append(path.name)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file ({error}): fetch or pack it again, or take it away.") from error


def _image(members: dict[str, Span]) -> Span:
    found = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if found is None:
        raise BadSample("no image")
    return found


def _captions(file: BinaryIO, members: dict[str, Span]) -> list[str]:
    """``captions`` or ``caption`` of ``key.json``, else the lines of ``key.txt``."""
    captions = _listed(read_span(file, *members["json"])) if "json" in members else []
    if "txt" in members and not captions:
        try:
            captions = read_span(file, *members["txt"])[:MAX_TEXT].decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadSample("undecodable caption") from error
    captions = list(dict.fromkeys(stripped for caption in captions if (stripped := caption.strip())))
    if not captions:
        raise BadSample("no caption")
    return captions


def _listed(data: bytes) -> list[str]:
    meta = parse_json(data)
    found = meta.get("captions") or meta.get("caption")
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        return []
    return [caption.encode("utf-8", "replace").decode() for caption in found]  # JSON can spell half a character


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a ``key.json``; empty where it is none, damaged or larger than ``MAX_TEXT``."""
    try:
        meta = json.loads(data) if len(data) <= MAX_TEXT else {}
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def read_span(file: BinaryIO, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``."""
    file.seek(offset)
    return file.read(size)


def decode_entries(
    path: Path, entries: Sequence[Entry], size: int, batch_size: int
) -> Iterator[list[tuple[Entry, Tensor | BadSample]]]:
    """Decode a shard's images batch by batch in threads, one batch ahead of the consumer.

    Yields:
        Per entry its (3, size, size) uint8 image, or what is wrong with it.
    """
    waiting: deque[list[tuple[Entry, Future[Tensor | BadSample]]]] = deque()
    with path.open("rb") as file, ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), batch_size):
            chunk = entries[start : start + batch_size]
            data = [read_span(file, *entry.image) for entry in chunk]
            waiting.append([(e, pool.submit(_try, load_square, d, size)) for e, d in zip(chunk, data, strict=True)])
            if len(waiting) > 1:
                yield [(entry, future.result()) for entry, future in waiting.popleft()]
        while waiting:
            yield [(entry, future.result()) for entry, future in waiting.popleft()]


def _try(load: Callable[[bytes, int], Tensor], data: bytes, size: int) -> Tensor | BadSample:
    try:
        return load(data, size)
    except BadSample as reason:
        return reason
