"""Source shards: webdataset tars of ``key.png`` + ``key.txt`` (+ ``key.json``), read by their headers alone."""

import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from torch import Tensor

from unclip_pl.data.transforms import BadSample, load_square

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_TEXT = 2**20  # bytes of a caption or JSON member
MAX_IMAGE = 2**28  # bytes of an image file
MAX_HEADER = 2**14  # bytes of a long name and what else a tar says of one file

_MEMBER = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$", re.DOTALL)
_UNSAFE = re.compile(r"^/|(?:^|/)\.\.(?:/|$)|[\x00-\x1f\x7f-\x9f]")  # a key becomes a file's name sooner or later
_NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class Split(IntEnum):
    """Which part of a data set a sample belongs to."""

    TRAIN = 0
    VAL = 1
    HELDOUT = 2


class Span(NamedTuple):
    """A file inside a tar."""

    offset: int
    size: int


#: A file that a tar names and does not hold.
NOWHERE = Span(0, 0)


class Entry(NamedTuple):
    """One usable sample of a shard, and where its files lie in the tar."""

    key: str
    image: Span
    json: Span  # of size 0 where there is none
    captions: list[str]
    split: Split


class ShardIndex(NamedTuple):
    """A shard's samples, split by split and in their order, and the keys of the bad ones by reason."""

    entries: list[Entry]
    skipped: dict[str, list[str]]


def split_of_file(name: str) -> Split | None:
    """The split that a shard's name announces, if any: ``train*``, ``val*``, ``heldout*`` or ``test*``."""
    names = {"train": Split.TRAIN, "val": Split.VAL, "heldout": Split.HELDOUT, "test": Split.HELDOUT}
    return next((split for word, split in names.items() if name.startswith(word)), None)


def split_of_key(key: str) -> Split:
    """96 % train, 2 % val, 2 % held-out, by a hash of the key: adding samples moves none."""
    point = int.from_bytes(hashlib.blake2b(encode_text(key), digest_size=8).digest()) / 2**64
    return Split.TRAIN if point < 0.96 else Split.VAL if point < 0.98 else Split.HELDOUT


def encode_text(text: str) -> bytes:
    """UTF-8; what a tar held in another encoding passes through unchanged."""
    return text.encode("utf-8", "surrogateescape")


def index_shard(path: Path) -> ShardIndex:
    """Where each sample of a shard lies, and its captions.

    Members are grouped as webdataset does, at the first dot of the base name. Nothing is unpacked to disk, and what is
    skipped, and why, depends on the shard's bytes alone. A tar that breaks off gives what lies before the break; a
    file that is no tar at all gives nothing. Both are named as "broken tar".
    """
    skipped: dict[str, list[str]] = defaultdict(list)
    groups: dict[str, dict[str, Span]] = defaultdict(dict)
    seen: Counter[tuple[str, str]] = Counter()  # a second sample of one key repeats all its suffixes, and is bad once
    repeats: Counter[str] = Counter()
    for name, span in _members(path, skipped):
        match = _MEMBER.match(name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if suffix in groups[key]:
            seen[key, suffix] += 1
            if seen[key, suffix] > repeats[key]:
                repeats[key] += 1
                skipped["duplicate key"].append(key)
            continue
        groups[key][suffix] = span

    entries, split = [], split_of_file(path.name)
    with path.open("rb") as file:
        for key, members in groups.items():
            try:
                if _UNSAFE.search(key):
                    raise BadSample("unsafe name")
                image = _image(members)
                captions = _captions(file, members)
            except BadSample as reason:
                skipped[str(reason)].append(key)
                continue
            json_span = members.get("json", NOWHERE)
            entries.append(Entry(key, image, json_span, captions, split_of_key(key) if split is None else split))
    entries.sort(key=lambda entry: entry.split)  # each split is one run of rows, which two numbers describe
    return ShardIndex(entries, dict(skipped))


class _Header(tarfile.TarInfo):
    """Without the headers by which a crafted tar makes ``tarfile`` read backwards, or match expressions for hours."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _NAME_TYPES and info.size > MAX_HEADER):
            raise tarfile.TarError(f"header of {info.size} bytes")
        return info


def _members(path: Path, skipped: dict[str, list[str]]) -> Iterator[tuple[str, Span]]:
    """Name and place of each file in a tar; links, devices and sparse files are ``NOWHERE``.

    A header that cannot be right ends the tar.
    """
    length, end = path.stat().st_size, 0
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                for info in tar:
                    if not end <= info.offset < tar.offset <= length + tarfile.BLOCKSIZE or info.size < 0:
                        raise tarfile.TarError("a member that overlaps another or the end")
                    end = tar.offset
                    if info.isreg() and not info.issparse():
                        if info.offset_data + info.size > length:
                            raise tarfile.TarError("a member cut short")
                        yield info.name, Span(info.offset_data, info.size)
                    elif not info.isdir():
                        yield info.name, NOWHERE
        except Exception:  # what damaged headers raise inside tarfile ranges from TarError to IndexError
            end = length + 1
        # tarfile takes a header that it cannot read for the end of the archive; the true end is a block of zeros.
        file.seek(min(end, length))
        if end > length or file.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
            skipped["broken tar"].append(path.name)


def _image(members: dict[str, Span]) -> Span:
    found = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if found is None:
        raise BadSample("no image")
    if found == NOWHERE:
        raise BadSample("image is a link, a device or sparse")
    if found.size > MAX_IMAGE:
        raise BadSample("image too large")
    return found


def _captions(file: BinaryIO, members: dict[str, Span]) -> list[str]:
    """``captions`` or ``caption`` of ``key.json``, else the lines of ``key.txt``."""
    span = members.get("json", NOWHERE)
    captions = _listed(read_span(file, *span)) if 0 < span.size <= MAX_TEXT else []
    if "txt" in members and not captions:
        if members["txt"].size > MAX_TEXT:
            raise BadSample("caption too long")
        try:
            captions = read_span(file, *members["txt"]).decode("utf-8").splitlines()
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
