"""Embeddings that somebody else made, as a store: clip-retrieval's and LAION's dumps, and plain .npy files.

A dump is cut into pieces of :data:`ROWS` rows. A piece is done when its file is in place, so a killed import goes on.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from unclip_pl.data.shards import Split, encode_text, split_of_key
from unclip_pl.data.store import (
    STATISTICS,
    Contents,
    ShardFeatures,
    ShardRecord,
    moments_of,
    offsets_of,
    pack_texts,
    read_manifest,
    read_moments,
    read_record,
    write_features,
    write_manifest,
)
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

#: Rows of a piece: 200 MB of two sides at d = 768.
ROWS = 2**16
#: Rows whose moments are computed at a time.
CHUNK = 2**12
#: Columns that name a row, the first one that is there.
KEYS = ("key", "image_path")


class Columns(NamedTuple):
    """Names in a dump."""

    image: str = "img_emb"  # files of z_i
    text: str = "text_emb"  # files of z_t
    caption: str = "caption"  # column of the metadata; empty reads none


class Array:
    """A .npy file of embeddings, mapped: rows are read when they are asked for.

    Raises:
        InputError: it is damaged, or no (N, d) of float16 or float32.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise InputError(f"{path} is damaged or no .npy file ({error}): copy it again.") from error
        if not isinstance(self.values, np.ndarray):
            raise InputError(f"Expected one array. Got {path}, which holds several: save each by np.save.")
        if self.values.ndim != 2 or not self.values.shape[1] or self.values.dtype not in (np.float16, np.float32):
            raise InputError(
                f"Expected embeddings (N, d) of float16 or float32. Got {self.values.dtype} {self.values.shape} in "
                f"{path}: convert it, or name other files."
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Width d of an embedding."""
        return self.values.shape[1]

    def mark(self) -> bytes:
        """Return what tells two files apart: shape, type, first row and last row."""
        ends = self.values[[0, -1]].tobytes() if len(self) else b""
        return f"{self.values.shape} {self.values.dtype}".encode() + ends


class Table:
    """A parquet file of keys and captions, of which one run of row groups is in memory at a time.

    Raises:
        InputError: it is damaged, or the caption's column is not there.
    """

    def __init__(self, path: Path, caption: str) -> None:
        if find_spec("pyarrow") is None:
            raise InputError(f"{path} cannot be read without pyarrow: run `pip install pyarrow`, the extra [dumps].")
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self.file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged or no parquet file ({error}): copy it again.") from error
        names = self.file.schema_arrow.names
        if caption and caption not in names:
            raise InputError(
                f"Expected a column {caption!r} of captions in {path}. Got {', '.join(names)}: name one with "
                "--caption_column, or none with --caption_column ''."
            )
        self.caption = caption
        self.key = next((name for name in KEYS if name in names), "")
        metadata = self.file.metadata
        groups = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self.starts = np.cumsum([0, *groups])
        self._groups = lru_cache(1)(self._read)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def texts(self, column: str, first: int, stop: int) -> list[str]:
        """Return some rows of a column as texts, empty where there is no value."""
        low, high = np.searchsorted(self.starts, (first, stop - 1), side="right") - 1
        table = self._groups(int(low), int(high) + 1)
        values = table.column(column).slice(first - self.starts[low], stop - first).to_pylist()
        return ["" if value is None else str(value) for value in values]

    def _read(self, first: int, stop: int) -> Any:
        return self.file.read_row_groups(
            range(first, stop), columns=[name for name in (self.caption, self.key) if name]
        )


class Files(NamedTuple):
    """Files whose rows belong together by their position."""

    embeds: Array
    table: Table | None


def _mark_of(parts: list[Files]) -> str:
    """Hash name, size and time of files."""
    paths = [path for part in parts for path in (part.embeds.path, part.table and part.table.path) if path]
    stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


class Piece(NamedTuple):
    """Rows of one file, which become one file of the store."""

    name: str
    part: int
    first: int
    stop: int


class Dump:
    """Pairs of embeddings, row by row in the order of the image side's files.

    Rows of the two sides belong together by position. Where each side has metadata of its own with keys, they do so by
    key.

    Args:
        images: files of z_i, with keys and captions.
        texts: files of z_t, with keys where they are joined by key.
        joined: join by key.

    Raises:
        InputError: counts or widths do not agree.
    """

    def __init__(self, images: list[Files], texts: list[Files], *, joined: bool) -> None:
        self.images, self.texts, self.joined = images, texts, joined
        for side in (images, texts):
            widths = {part.embeds.width: part.embeds.path for part in side}
            if len(widths) > 1:
                named = " and ".join(f"{width} in {path}" for width, path in list(widths.items())[:2])
                raise InputError(f"Expected embeddings of one width. Got {named}: import them one by one.")
        for part in [*images, *texts]:
            if part.table is not None:
                _require_equal(part.embeds, part.table)
        for image, text in [] if joined else zip(images, texts, strict=True):
            _require_equal(image.embeds, text.embeds)

    @cached_property
    def fingerprint(self) -> str:
        """What tells these pairs apart from others: first and last rows and counts of every file."""
        digest = hashlib.sha256()
        for part in [*self.images, *self.texts]:
            digest.update(part.embeds.mark())
        return f"import-{digest.hexdigest()[:16]}"

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in order."""
        for number, part in enumerate(self.images):
            for i, first in enumerate(range(0, len(part.embeds), ROWS)):
                yield Piece(f"{number:05d}-{i:05d}", number, first, min(first + ROWS, len(part.embeds)))

    def mark(self, piece: Piece) -> str:
        """Return what changes when a file that a piece is read from does: its size and time."""
        text = self._text_mark if self.joined else _mark_of([self.texts[piece.part]])
        return f"{_mark_of([self.images[piece.part]])} {text}"

    @cached_property
    def _text_mark(self) -> str:
        return _mark_of(self.texts)

    def read(self, piece: Piece) -> Contents:
        """Return a piece's embeddings without its bad rows, whose keys are named by their reason."""
        keys = self.keys(piece)
        image = np.asarray(self.images[piece.part].embeds.values[piece.first : piece.stop])
        where, found = self._partners(piece, keys)
        text = self._gather(*where)
        table = self.images[piece.part].table
        captions = [""] * len(keys)
        if table and table.caption:
            captions = table.texts(table.caption, piece.first, piece.stop)
        with np.errstate(over="ignore"):
            half = image.astype(np.float16), text.astype(np.float16)
        finite = np.logical_and.reduce([np.isfinite(side).all(1) for side in half])
        long = np.logical_and.reduce([(side != 0).any(1) for side in half])
        reasons = {"no partner": ~found, "not finite in float16": found & ~finite, "all zeros": found & finite & ~long}
        skipped = {reason: [keys[row] for row in np.flatnonzero(bad)] for reason, bad in reasons.items() if bad.any()}
        good = np.flatnonzero(found & finite & long)
        split = np.array([split_of_key(keys[row]) for row in good], np.uint8)
        rows = good[split.argsort(kind="stable")]
        named, said = [keys[row] for row in rows], [captions[row] for row in rows]
        features = _features(half[0][rows], half[1][rows], named, said, np.sort(split))
        training = features.image_embed[features.split == Split.TRAIN]
        parts = np.array_split(training, -(-len(training) // CHUNK) or 1)  # in float64 a whole piece takes gigabytes
        return Contents(features, reduce(Moments.plus, map(moments_of, parts)), skipped)

    def keys(self, piece: Piece) -> list[str]:
        """Return the key of each row; its place where the metadata have none."""
        table = self.images[piece.part].table
        if table is None or not table.key:
            return [f"{piece.part:05d}-{row:09d}" for row in range(piece.first, piece.stop)]
        return table.texts(table.key, piece.first, piece.stop)

    def _partners(self, piece: Piece, keys: list[str]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Return file and row of each key's z_t, and whether there is one."""
        count = piece.stop - piece.first
        if not self.joined:
            return (np.full(count, piece.part), np.arange(piece.first, piece.stop)), np.ones(count, bool)
        wanted, index = _hashes(keys), self._index
        at = np.searchsorted(index.hashes, wanted).clip(max=len(index.hashes) - 1)
        return (index.part[at], index.row[at]), index.hashes[at] == wanted

    def _gather(self, part: np.ndarray, row: np.ndarray) -> np.ndarray:
        first = self.texts[0].embeds
        embeds = np.empty((len(row), first.width), np.result_type(*(one.embeds.values.dtype for one in self.texts)))
        for number in np.unique(part):
            here = part == number
            embeds[here] = self.texts[number].embeds.values[row[here]]
        return embeds

    @cached_property
    def _index(self) -> "Index":
        """Where z_t of each key lies, for a join: 20 bytes a row."""
        hashes, parts, rows = [], [], []
        for number, part in enumerate(self.texts):
            assert part.table is not None
            for first in range(0, len(part.embeds), ROWS):
                stop = min(first + ROWS, len(part.embeds))
                hashes.append(_hashes(part.table.texts(part.table.key, first, stop)))
                parts.append(np.full(stop - first, number, np.int32))
                rows.append(np.arange(first, stop))
        every = np.concatenate(hashes)
        order = every.argsort(kind="stable")
        index = Index(every[order], np.concatenate(parts)[order], np.concatenate(rows)[order])
        twice = np.flatnonzero(index.hashes[1:] == index.hashes[:-1])
        if len(twice):
            row = int(index.row[twice[0]])
            table = self.texts[int(index.part[twice[0]])].table
            assert table is not None
            raise InputError(
                f"Expected each key once among the texts. Got {table.texts(table.key, row, row + 1)[0]!r} of "
                f"{table.path} twice: leave one of them out."
            )
        return index


class Index(NamedTuple):
    """Rows by the hash of their key, ascending."""

    hashes: np.ndarray  # (N,) uint64
    part: np.ndarray  # (N,) int32, number of the file
    row: np.ndarray  # (N,) int64


def _hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(encode_text(key), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _require_equal(one: Array, other: Array | Table) -> None:
    if len(one) != len(other):
        raise InputError(
            f"Expected as many rows in {one.path} as in {other.path}. Got {len(one)} and {len(other)}: take both from "
            "one dump, and copy them whole."
        )


def _features(
    image: np.ndarray, text: np.ndarray, keys: list[str], captions: list[str], split: np.ndarray
) -> ShardFeatures:
    """Return pairs as a shard's features: a caption of its own for each, no tokens, no pictures."""
    count = len(keys)
    packed_captions, captions_offsets = pack_texts(captions)
    packed_keys, keys_offsets = pack_texts(keys)
    nothing = np.zeros(count, np.int64)
    return ShardFeatures(
        image_embed=image,
        text_embed=text,
        text_states=np.empty((0, 0), np.float16),
        text_tokens=np.empty(0, np.int32),
        text_offsets=np.zeros(count + 1, np.int64),
        caption_rows=np.arange(count, dtype=np.int32),
        caption_offsets=offsets_of([1] * count),
        captions=packed_captions,
        captions_offsets=captions_offsets,
        keys=packed_keys,
        keys_offsets=keys_offsets,
        image_offset=nothing,
        image_size=nothing,
        json_offset=nothing,
        json_size=nothing,
        split=split,
    )


# --- Finding the files


def find_dump(paths: list[str], columns: Columns) -> Dump:
    """Find the files of a dump.

    Args:
        paths: a folder with both sides; or two folders, the images' first; or two .npy files in that order.
        columns: names of the files and of the captions.

    Raises:
        MissingFileError: a path or a side is not there.
        InputError: a file is damaged, or files do not fit each other.
    """
    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise MissingFileError(f"No file or folder at {path}: correct the path.")
    if len(given) == 2 and all(path.is_file() for path in given):
        image, text = ([Files(Array(path), None)] for path in given)
        return Dump(image, text, joined=False)
    if len(given) not in (1, 2) or not all(path.is_dir() for path in given):
        raise InputError(
            "Expected one folder, two folders, or two .npy files (the images' first). Got "
            f"{' '.join(paths) or 'nothing'}: name them."
        )
    files = {
        side: _numbered(folder, name, "npy", option)
        for side, folder, name, option in (
            ("image", given[0], columns.image, "--image_column"),
            ("text", given[-1], columns.text, "--text_column"),
        )
    }
    tables = [_numbered(folder, "metadata", "parquet", "") for folder in dict.fromkeys(given)]
    joined = len(tables) == 2 and all(tables) and all(_has_key(table) for table in tables)
    first, last = tables[0] or tables[-1], tables[-1] if joined else {}
    if not joined:
        _require_same(files["image"], files["text"])
    return Dump(_parts(files["image"], first, columns.caption), _parts(files["text"], last, ""), joined=joined)


def _numbered(folder: Path, name: str, ending: str, option: str) -> dict[int, Path]:
    """Return the files of a name by their number: NAME.npy, NAME_0.npy, NAME/NAME_0000.npy, NAME/0000.npy, …"""
    inside = [(path, f"(?:{re.escape(name)}[_-]?)?") for path in (folder / name).glob(f"*.{ending}")]
    beside = [(path, f"{re.escape(name)}[_-]?") for path in folder.glob(f"*.{ending}")]
    found: dict[int, Path] = {}
    for path, pattern in sorted(inside + beside):
        if match := re.fullmatch(rf"{pattern}(\d*)", path.stem):
            number = int(match[1] or 0)
            if number in found:
                raise InputError(
                    f"Expected one file {name} of number {number}. Got {found[number]} and {path}: move one."
                )
            found[number] = path
    if not found and option:
        others = sorted({re.sub(r"[_-]?\d*$", "", path.stem) for path in folder.rglob(f"*.{ending}")})
        raise MissingFileError(
            f"Expected {name}_*.{ending} in {folder}. Got {', '.join(others[:8]) or 'no such file'}: name the column "
            f"with {option}."
        )
    return dict(sorted(found.items()))


def _has_key(tables: dict[int, Path]) -> bool:
    return all(Table(path, "").key for path in tables.values())


def _require_same(one: dict[int, Path], other: dict[int, Path]) -> None:
    lonely = sorted(one.keys() ^ other.keys())
    if lonely:
        path = (one | other)[lonely[0]]
        raise MissingFileError(
            f"{path} has no counterpart of its number on the other side: copy it too, or move this one."
        )


def _parts(files: dict[int, Path], tables: dict[int, Path], caption: str) -> list[Files]:
    if tables:
        _require_same(files, tables)
    return [Files(Array(path), Table(tables[i], caption) if tables else None) for i, path in files.items()]


# --- Writing the store


def import_embeddings(paths: list[str], store: Path, columns: Columns, max_bad_fraction: float) -> list[str]:
    """Write a store of a dump's pairs. Run again, it goes on where it stopped, and reads again what has changed.

    Args:
        paths: files or folders, see :func:`find_dump`.
        store: folder to write.
        columns: names of the files and of the captions.
        max_bad_fraction: largest share of rows that cannot be used.

    Returns:
        Lines that say what was imported.

    Raises:
        MissingFileError: a path or a side is not there.
        InputError: a file is damaged, files do not fit each other, too many rows are bad, or the store holds others.
    """
    dump = find_dump(paths, columns)
    pieces = list(dump.pieces())
    marks = {piece: f"{columns.caption} {dump.joined} {dump.mark(piece)}" for piece in pieces}
    done = {piece: read_record(store / f"{piece.name}.safetensors") for piece in pieces}
    for known in [*read_manifest(store).values(), *filter(None, done.values())]:
        if known.clip != dump.fingerprint:
            raise InputError(
                f"{store} holds the embeddings {known.clip!r}, and these are {dump.fingerprint!r}: name another --out."
            )
    norms: list[list[tuple[int, float, float, float]]] = [[], []]  # rows, smallest, largest and sum of each piece
    records = []
    for piece in tqdm(pieces, "importing", unit="file", disable=None):
        record = done[piece]
        if record and record.source_mark == marks[piece]:
            records.append(record)
        else:
            contents = dump.read(piece)
            source = dump.images[piece.part].embeds.path
            records.append(_write(store, piece, contents, source, clip=dump.fingerprint, mark=marks[piece]))
            for reason, keys in contents.skipped.items():
                log.warning("%s: skipped %d row(s), %s: %s", piece.name, len(keys), reason, ", ".join(keys[:3]))
            for side, embeds in zip(norms, (contents.features.image_embed, contents.features.text_embed), strict=True):
                every = np.linalg.norm(embeds.astype(np.float32), axis=1)
                side.append((len(every), every.min(initial=np.inf), every.max(initial=0), every.sum(dtype=float)))
    _finish(store, records, dump.fingerprint, max_bad_fraction)
    return _summary(records, dump, norms)


def _write(store: Path, piece: Piece, contents: Contents, source: Path, *, clip: str, mark: str) -> ShardRecord:
    stat = source.stat()
    record = ShardRecord.of(
        contents,
        shard=piece.name,
        source_size=stat.st_size,
        source_mark=mark,
        source_sha256="",
        file=f"{piece.name}.safetensors",
        clip=clip,
        states=False,
    )
    write_features(store / record.file, contents, record, stat.st_mtime_ns)
    return record


def _finish(store: Path, records: list[ShardRecord], fingerprint: str, max_bad_fraction: float) -> None:
    """Write statistics first, then the manifest, by which the store opens."""
    reasons: Counter[str] = sum((Counter(record.skipped) for record in records), Counter())
    good, bad = sum(record.splits[Split.TRAIN] for record in records), reasons.total()
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common()) or "no rows"
    if not good:
        raise InputError(f"Expected pairs to train on. Got none that is good ({named}): give other files.")
    if bad > max_bad_fraction * (bad + sum(record.images for record in records)):
        raise InputError(
            f"{bad} rows cannot be used ({named}), more than max_bad_fraction = {max_bad_fraction}. What is imported "
            "is kept: correct the dump, or run the command again with a larger --max_bad_fraction."
        )
    moments = reduce(Moments.plus, (read_moments(store / record.file) for record in records))
    nothing = torch.empty(1, 0)
    null = TextFeatures(nothing.long(), nothing[..., None], nothing.bool(), nothing)
    write_statistics(store / STATISTICS, moments=moments, null_text=null, fingerprint=fingerprint)
    write_manifest(store, records)


def _summary(records: list[ShardRecord], dump: Dump, norms: list[list[tuple[int, float, float, float]]]) -> list[str]:
    train, val, heldout = np.sum([record.splits for record in records], axis=0).tolist()
    skipped = sum(sum(record.skipped.values()) for record in records)
    lines = [
        f"{train + val + heldout:,} pairs: {train:,} train, {val:,} val, {heldout:,} held out; {skipped:,} rows "
        f"skipped; fingerprint {dump.fingerprint}"
    ]
    for name, side, found in (("z_i", dump.images, norms[0]), ("z_t", dump.texts, norms[1])):
        told = "all were there already"
        if count := sum(rows for rows, *_ in found):
            low, high, mean = min(one[1] for one in found), max(one[2] for one in found), sum(one[3] for one in found)
            told = f"norms {low:.3f} to {high:.3f}, mean {mean / count:.3f}"
        lines.append(f"{name} of {side[0].embeds.width} numbers: {told}")
    return lines
