"""Source shards: webdataset tars of ``key.png`` + ``key.txt`` (+ ``key.json``), local or behind URLs.

Tars are read by their headers alone: nothing is unpacked to disk.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import cache
from glob import glob, has_magic
from itertools import pairwise, product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import urlsplit

import fsspec
from torch import Tensor

from unclip_pl.data.transforms import BadSample, load_square
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import EDGES, alone, clean_lines, require_unpacked

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_TEXT = 2**20  # bytes of a caption or JSON member
MAX_IMAGE = 2**28  # bytes of an image file
MAX_HEADER = 2**14  # bytes of a long name and what else a tar says of one file
#: Size of a file whose server does not say.
UNKNOWN = -1

log = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: Names of compressed tars and other archives.
_ARCHIVE = re.compile(r"\.(t(ar\.\w+|[abglx]z2?|zst)|zip|7z|rar)$", re.IGNORECASE)
#: Names that file systems give to the mark by which two versions of a file differ, the surest first.
_MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
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
    """Part of a data set that a sample belongs to."""

    TRAIN = 0
    VAL = 1
    HELDOUT = 2


class Stamp(NamedTuple):
    """Size and mark of a file, which tell a changed shard apart without reading it."""

    size: int  # bytes, or UNKNOWN
    mark: str  # ETag, time or the like of a remote file; empty for a local one, whose times are looked at themselves


class Shard(NamedTuple):
    """One tar of a source."""

    address: str  # a local path, or a URL

    def __str__(self) -> str:
        return self.address

    @property
    def remote(self) -> bool:
        """Whether it is behind a URL."""
        return "://" in self.address

    @property
    def name(self) -> str:
        """File name, without a URL's query."""
        return os.path.basename(urlsplit(self.address).path if self.remote else self.address)

    @property
    def path(self) -> Path:
        """The local file.

        Raises:
            InputError: the shard is remote.
        """
        if self.remote:
            raise InputError(f"Expected local shards, whose images can be read in any order. Got {self}: download it.")
        return Path(self.address)

    def stamp(self) -> Stamp:
        """Look up size and mark as they are now.

        Raises:
            InputError: the shard is not there, or its server does not answer.
        """
        if not self.remote:
            return Stamp(self.path.stat().st_size, "")
        info = _asked(self, lambda system, path: system.info(path))
        size = info.get("size")
        mark = next((str(info[key]) for key in _MARKS if info.get(key)), "")
        return Stamp(UNKNOWN if size is None else int(size), mark)

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read the bytes at some (offset, size).

        Raises:
            InputError: the shard is not there, or its server cannot give parts of a file.
        """
        if not self.remote:
            with self.path.open("rb") as file:
                found = [read_span(file, *span) for span in spans]
        else:
            starts, ends = [offset for offset, _ in spans], [offset + size for offset, size in spans]

            def parts(system: Any, path: str) -> list[bytes]:
                answers = system.cat_ranges([path] * len(spans), starts, ends)
                for error in answers:  # fsspec hands errors back among the answers
                    if isinstance(error, Exception):
                        raise error
                return answers

            found = _asked(self, parts)
        if any(len(data) != size for data, (_, size) in zip(found, spans, strict=True)):
            raise InputError(
                f"Parts of {self} cannot be read: it was cut short, or its server gives whole files only. Download it."
            )
        return found

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the shard to be read once, from its beginning to its end.

        Raises:
            InputError: the shard is not there, or its server does not answer.
        """
        if not self.remote:
            with self.path.open("rb") as file:
                yield file
            return
        whole = {"block_size": 0} if self.address.startswith("http") else {}  # one request, and not one for each block
        with _asked(self, lambda system, path: system.open(path, "rb", **whole)) as file:
            yield io.BufferedReader(file, MAX_TEXT)  # a tar is read in small pieces

    @contextmanager
    def fetched(self, folder: Path) -> Iterator[Path]:
        """Give the local file, or for a remote shard a copy of the same name in ``folder``, which is removed again.

        A second process that wants a copy at the same place waits for the first.

        Raises:
            InputError: the shard is not there, or cannot be read to its end.
        """
        if not self.remote:
            yield self.path
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        copy = folder / self.name
        with alone(folder.with_name(f"{folder.name}.lock")):
            folder.mkdir(exist_ok=True)
            try:
                _asked(self, lambda system, path: system.get_file(path, str(copy)))
                yield copy
            finally:
                copy.unlink(missing_ok=True)
                with suppress(OSError):  # others are still in there
                    folder.rmdir()


def _asked(shard: Shard, question: Callable[[Any, str], Any]) -> Any:
    """Return what a shard's file system answers; its errors become one that names the shard."""
    try:
        return question(*fsspec.url_to_fs(shard.address))
    except Exception as error:  # each file system has errors of its own
        # fsspec's HTTP says "not found" also where no server answered, and gives the reason as the cause
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError):
            raise MissingFileError(f"Shard {shard} does not exist: correct the source, or make the shard.") from error
        raise InputError(f"Shard {shard} cannot be read ({type(error).__name__}: {error}): try again.") from error


def list_shards(source: str) -> list[Shard]:
    """List the shards of a source, sorted by file name.

    A path that exists is taken as it is: a pattern begins after the last folder that exists. Hidden files of a folder
    are no shards. Compressed ones are left aside with a warning.

    Args:
        source: a folder of ``.tar`` files, one tar, a glob, or a range such as ``train-{000000..000012}.tar``; local,
            or a URL of any file system that fsspec knows. The tars of a remote range are not looked for before they
            are read.

    Raises:
        MissingFileError: there is no shard.
        InputError: two shards have one name, all are compressed, or a server does not answer.
    """
    source = source.removeprefix("file://")
    if "://" in source:
        shards = [Shard(found) for pattern in _expand(source) for found in _remote_matches(pattern)]
    else:
        root, rest = _rooted(Path(source))
        shards = [Shard(found) for pattern in _expand(rest) for found in _local_matches(root / pattern)]
    if not shards:
        raise MissingFileError(
            f"Expected a folder of .tar files, a glob, or a range such as train-{{000000..000012}}.tar. Got no shards "
            f"at {source!r}: make them with `unclip pack`."
        )
    shards.sort(key=lambda shard: shard.name)
    for one, other in pairwise(shards):
        if one.name == other.name:
            raise InputError(f"Expected shards of different names. Got {one} and {other}: rename one of them.")
    return shards


def _expand(pattern: str) -> list[str]:
    """Expand numeric brace ranges like the shell: ``a-{08..10}`` → a-08 a-09 a-10."""
    parts = _RANGE.split(pattern)
    texts, ends = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in ends]
    return ["".join(a + b for a, b in zip(texts, (*numbers, ""), strict=True)) for numbers in product(*ranges)]


def _rooted(path: Path) -> tuple[Path, str]:
    """Split a path after the last part that exists."""
    root = path
    while not os.path.lexists(root):
        root = root.parent
    return root, "" if root == path else str(path.relative_to(root))


def _local_matches(path: Path) -> Sequence[str]:
    if path.is_dir():
        return _tars([str(found) for found in path.iterdir() if not found.is_dir()], str(path))
    root, pattern = _rooted(path)
    if has_magic(pattern):
        names = glob(pattern, root_dir=root) or glob(pattern.replace("[", "[[]"), root_dir=root)
        found = [str(root / name) for name in names]
        return _tars(found, str(path)) or found
    if pattern:
        raise MissingFileError(f"Shard {path} does not exist: correct the source, or make the shard.")
    return [str(path)]


def _remote_matches(pattern: str) -> Sequence[str]:
    path = urlsplit(pattern).path  # a question mark may begin a query
    name = path.rpartition("/")[2]
    if _ARCHIVE.search(name) and not has_magic(name):
        return _tars([pattern], pattern)
    single = name.lower().endswith(".tar") and not has_magic(name)
    if single and not has_magic(path):
        return [pattern]

    def search(system: Any, path: str) -> list[str]:
        folder, _, wanted = path.rpartition("/")
        if not wanted or not has_magic(path) or system.isdir(path):
            folder, wanted = path.rstrip("/"), "*"
        if has_magic(folder) and not system.isdir(folder):
            found = system.glob(f"{folder}/{wanted}")
        else:
            listed = [entry["name"] for entry in system.ls(f"{folder}/", detail=True) if entry["type"] != "directory"]
            found = [each for each in listed if fnmatchcase(Shard(each).name, wanted) or Shard(each).name == wanted]
        return [system.unstrip_protocol(each) for each in found]

    found = _asked(Shard(pattern), search)
    return _tars(found, pattern) or ([pattern] if single else found if has_magic(name) else [])


def _tars(found: Sequence[str], source: str) -> list[str]:
    """Return the tars of a listing. Archives that are left aside are named, once."""
    visible = {path: name for path in found if not (name := Shard(path).name).startswith(".")}
    tars = [path for path, name in visible.items() if name.lower().endswith(".tar")]
    others = sorted(name for name in visible.values() if _ARCHIVE.search(name))
    if others and not tars:
        raise InputError(f"Expected uncompressed tars at {source}. Got {_few(others)}: unpack them to .tar files.")
    if others:
        _warn_once(f"{source}: left aside {_few(others)}, which are compressed: unpack them to .tar files.")
    return tars


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


# --- What a shard holds


class Span(NamedTuple):
    """Place of a file inside a tar."""

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
    others: list[str]  # suffixes and JSON fields of samples without image or caption, the most frequent first


def split_of_file(name: str) -> Split | None:
    """Return the split that a shard's name announces, if any: ``train*``, ``val*``, ``heldout*`` or ``test*``."""
    names = {"train": Split.TRAIN, "val": Split.VAL, "heldout": Split.HELDOUT, "test": Split.HELDOUT}
    return next((split for word, split in names.items() if name.startswith(word)), None)


def split_of_key(key: str) -> Split:
    """Draw a split by a hash of the key: 96 % train, 2 % val, 2 % held-out. Adding samples moves none."""
    point = int.from_bytes(hashlib.blake2b(encode_text(key), digest_size=8).digest()) / 2**64
    if point < 0.96:
        return Split.TRAIN
    return Split.VAL if point < 0.98 else Split.HELDOUT


def split_name(name: str) -> tuple[str | None, str]:
    """Split a file's name into its sample's key and its suffix, at the first dot of the base name; None is no key."""
    match = _MEMBER.match(name)
    return (match[1], match[2].lower()) if match else (None, "")


def encode_text(text: str) -> bytes:
    """Encode as UTF-8; bytes that a tar held in another encoding pass through unchanged."""
    return text.encode("utf-8", "surrogateescape")


def _grouped(path: Path, skipped: dict[str, list[str]]) -> dict[str, dict[str, Span]]:
    """Return each key's files by their suffix, the first of one name, and note keys that come again.

    Args:
        path: tar.
        skipped: keys of bad samples by reason, which grow.
    """
    groups: dict[str, dict[str, Span]] = defaultdict(dict)
    seen: Counter[tuple[str, str]] = Counter()  # a second sample of one key repeats all its suffixes, and is bad once
    repeats: Counter[str] = Counter()
    for name, span in _members(path, skipped):
        key, suffix = split_name(name)
        if key is None:
            continue
        if suffix in groups[key]:
            seen[key, suffix] += 1
            if seen[key, suffix] > repeats[key]:
                repeats[key] += 1
                skipped["duplicate key"].append(key)
            continue
        groups[key][suffix] = span
    return groups


def index_shard(path: Path, caption_key: str = "") -> ShardIndex:
    """Find where each sample of a shard lies, and read its captions.

    Members are grouped like webdataset does, at the first dot of the base name. Which samples are skipped, and why,
    depends on the shard's bytes alone. A tar that breaks off gives what lies before the break; a file that is no tar
    gives nothing. Both are named as "broken tar".

    Without a ``caption_key`` the lines of ``key.txt`` are the captions, and where there are none ``captions`` or
    ``caption`` of ``key.json``. Where both say the same, the JSON tells where one caption ends and the next begins.

    Args:
        path: tar.
        caption_key: suffix of the captions' files, such as ``.caption``, or field of ``key.json``, such as ``prompt``;
            ``json`` for its usual fields. A file goes before a field of the same name.

    Raises:
        InputError: the tar is compressed, or a pointer of git-lfs.
    """
    require_unpacked(path, "an uncompressed tar")
    skipped: dict[str, list[str]] = defaultdict(list)
    groups = _grouped(path, skipped)
    entries, split, differing, others = [], split_of_file(path.name), 0, Counter[str]()
    with path.open("rb") as file:
        for key, members in groups.items():
            json_span = members.get("json", NOWHERE)
            meta = parse_json(read_span(file, *json_span)) if 0 < json_span.size <= MAX_TEXT else {}
            try:
                if _UNSAFE.search(key):
                    raise BadSample("unsafe name")
                image = _image(members)
                captions, differs = _captions(file, members, meta, caption_key)
            except BadSample as reason:
                skipped[str(reason)].append(key)
                if str(reason) in ("no image", "no caption"):
                    others.update(_names(members, meta, caption_key))
                continue
            differing += differs
            entries.append(Entry(key, image, json_span, captions, split_of_key(key) if split is None else split))
    if differing:
        log.warning(
            "%s: %d of %d samples have another caption in the json than in the .txt, which is taken (see caption_key).",
            path.name, differing, len(entries),
        )  # fmt: skip
    entries.sort(key=lambda entry: entry.split)  # each split is one run of rows, which two numbers describe
    return ShardIndex(entries, dict(skipped), [name for name, _ in others.most_common(12)])


def _names(members: dict[str, Span], meta: dict[str, Any], caption_key: str) -> list[str]:
    """Return where a sample's captions, or an image of another name, may be."""
    known = (*IMAGE_SUFFIXES, "json") if caption_key else (*IMAGE_SUFFIXES, "json", "txt")
    files = [f".{suffix}" for suffix in members if suffix not in known]
    return files + [name for name, text in meta.items() if _listed(text)]


def no_samples(source: str, count: int, skipped: Mapping[str, int], others: Iterable[str]) -> InputError:
    """Return the error of a source without a usable sample.

    Args:
        source: shards.
        count: number of shards.
        skipped: number of bad samples by reason.
        others: places of what may be captions, see :class:`ShardIndex`.
    """
    named = ", ".join(f"{reason}: {number}" for reason, number in skipped.items()) or "they are empty"
    places = ", ".join(dict.fromkeys(others))
    return InputError(
        f"Expected images with captions in {source}. Got no usable sample in {count} shard(s) ({named}): give key.png, "
        ".jpg or .webp, with key.txt or key.json beside it"
        + (f", or set caption_key to where the captions are. The samples also have {places}." if places else ".")
    )


class _Header(tarfile.TarInfo):
    """Tar header without the kinds by which a crafted tar makes ``tarfile`` read backwards, or match for hours."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _NAME_TYPES and info.size > MAX_HEADER):
            raise tarfile.TarError(f"header of {info.size} bytes")
        return info


def _members(path: Path, skipped: dict[str, list[str]]) -> Iterator[tuple[str, Span]]:
    """Yield name and place of each file in a tar; links, devices and sparse files are ``NOWHERE``.

    Tars that were joined end to end are read as one. A header that cannot be right ends them all.
    """
    length, begin, end = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        try:
            while begin < length or length == 0:
                file.seek(begin)
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
                # tarfile takes a header that it cannot read for the end; the true end is a block of zeros
                file.seek(min(end, length))
                if end > length or file.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
                    raise tarfile.TarError("a header that is none")
                begin = end = _after_zeros(file, length)
        except Exception:  # damaged headers raise errors from TarError to IndexError inside tarfile
            skipped["broken tar"].append(path.name)


def _after_zeros(file: BinaryIO, length: int) -> int:
    """Return where the next block begins that is not zero; the file's length where there is none."""
    while chunk := file.read(MAX_TEXT):
        if rest := chunk.lstrip(b"\0"):
            place = file.tell() - len(rest)
            return place - place % tarfile.BLOCKSIZE
    return length


def _image(members: dict[str, Span]) -> Span:
    found = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if found is None:
        raise BadSample("no image")
    if found == NOWHERE:
        raise BadSample("image is a link, a device or sparse")
    if found.size > MAX_IMAGE:
        raise BadSample("image too large")
    return found


def _captions(file: BinaryIO, members: dict[str, Span], meta: dict[str, Any], key: str) -> tuple[list[str], bool]:
    """Read a sample's captions, and say whether its text and its JSON differ, see :func:`index_shard`."""
    suffix = key.lower().removeprefix(".") or "txt"
    is_file = suffix in members and suffix != "json"
    fields = ("captions", "caption") if key in ("", "json", ".json") else (key,)
    listed = [] if is_file and key else next(filter(None, (_listed(meta.get(field)) for field in fields)), [])
    try:
        written = _lines(file, members[suffix]) if is_file else []
    except BadSample:
        if not listed:
            raise
        written = []
    if not listed and not written:
        raise BadSample("no caption")
    spelled = list(dict.fromkeys(line for caption in listed for line in clean_lines(caption)))
    differs = bool(listed) and bool(written) and spelled != written
    return (written if differs or not listed else listed), differs


def _lines(file: BinaryIO, span: Span) -> list[str]:
    if span.size > MAX_TEXT:
        raise BadSample("caption too long")
    try:
        return list(dict.fromkeys(clean_lines(read_span(file, *span).decode("utf-8"))))
    except UnicodeDecodeError as error:
        raise BadSample("undecodable caption") from error


def _listed(value: object) -> list[str]:
    """Return the captions in a JSON field: a text, or a list of texts."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        return []
    texts = (caption.encode("utf-8", "replace").decode().strip(EDGES) for caption in found)  # half a character: "?"
    return list(dict.fromkeys(filter(None, texts)))


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a ``key.json``; anything but an object of at most ``MAX_TEXT`` bytes gives an empty one."""
    try:
        meta = json.loads(data) if len(data) <= MAX_TEXT else {}
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def read_span(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read ``size`` bytes at ``offset``."""
    file.seek(offset)
    return file.read(size)


def decode_entries(
    path: Path, entries: Sequence[Entry], size: int, batch_size: int
) -> Iterator[list[tuple[Entry, Tensor | BadSample]]]:
    """Decode a shard's images batch by batch in threads, one batch ahead of the consumer.

    Yields:
        Batches of entries, each with its (3, size, size) uint8 image, or with what is wrong with it.
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
