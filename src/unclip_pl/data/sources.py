"""Where shards are: folders, globs and ranges of tars, as local paths or as URLs that fsspec opens."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob, has_magic
from itertools import pairwise, product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import fsspec

from unclip_pl.errors import InputError, MissingFileError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
#: What file systems call the mark by which two versions of a file differ, the surest first.
_MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
#: Size of a file whose server does not say.
UNKNOWN = -1


class Stamp(NamedTuple):
    """What tells a changed shard apart without reading it."""

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
        """File name; a URL's query does not count."""
        return os.path.basename(urlsplit(self.address).path if self.remote else self.address)

    @property
    def path(self) -> Path:
        """The local file.

        Raises:
            ValueError: it is not local.
        """
        if self.remote:
            raise InputError(f"Expected local shards, whose images can be read in any order. Got {self}: download it.")
        return Path(self.address)

    def stamp(self) -> Stamp:
        """Size and mark as they are now.

        Raises:
            OSError: it is not there, or its server does not answer.
        """
        if not self.remote:
            return Stamp(self.path.stat().st_size, "")
        info = _asked(self, lambda system, path: system.info(path))
        size = info.get("size")
        return Stamp(
            UNKNOWN if size is None else int(size), next((str(info[key]) for key in _MARKS if info.get(key)), "")
        )

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes at some (offset, size).

        Raises:
            OSError: it is not there, or its server cannot give parts of a file.
        """
        if not self.remote:
            with self.path.open("rb") as file:
                found = [_read_span(file, *span) for span in spans]
        else:
            starts, ends = [offset for offset, _ in spans], [offset + size for offset, size in spans]
            found = _asked(self, lambda system, path: system.cat_ranges([path] * len(spans), starts, ends))
        if any(len(data) != size for data, (_, size) in zip(found, spans, strict=True)):
            raise InputError(f"Parts of {self} cannot be read: it was cut short, or its server gives whole files only.")
        return found

    @contextmanager
    def fetched(self, folder: Path) -> Iterator[Path]:
        """The local file; for a remote shard a copy of the same name in ``folder``, read in one go and removed again.

        Raises:
            OSError: it is not there, or it cannot be read to its end.
        """
        if not self.remote:
            yield self.path
            return
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / self.name
        try:
            _asked(self, lambda system, path: system.get_file(path, str(copy)))
            yield copy
        finally:
            copy.unlink(missing_ok=True)
            with suppress(OSError):  # others are still in there
                folder.rmdir()


def _read_span(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _asked(shard: Shard, question: Any) -> Any:
    """What its file system answers; what goes wrong there is an OSError that names the shard."""
    try:
        return question(*fsspec.url_to_fs(shard.address))
    except Exception as error:  # each file system has errors of its own
        # fsspec's HTTP says "not found" also where no server answered, and gives the reason as the cause
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError):
            raise MissingFileError(f"Shard {shard} does not exist.") from error
        raise InputError(f"Shard {shard} cannot be read: {type(error).__name__}: {error}") from error


def list_shards(source: str) -> list[Shard]:
    """The shards of a source, sorted by file name.

    Args:
        source: a folder of ``.tar`` files, one tar, a glob, or a range such as ``train-{000000..000012}.tar``; local,
            or a URL of any file system that fsspec knows. The tars of a remote range are not looked for before they
            are read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two have one name.
        OSError: a server that does not answer.
    """
    source = source.removeprefix("file://")
    match = _remote_matches if "://" in source else _local_matches
    shards = [Shard(found) for pattern in _expand(source) for found in match(pattern)]
    if not shards:
        raise MissingFileError(
            f"No shards at {source!r}: expected a folder of .tar files, a glob, or a range such as "
            "train-{000000..000012}.tar. `unclip pack` makes them."
        )
    shards.sort(key=lambda shard: shard.name)
    for one, other in pairwise(shards):
        if one.name == other.name:
            raise InputError(f"Expected shards of different names. Got {one} and {other}: rename one of them.")
    return shards


def _expand(pattern: str) -> list[str]:
    """Numeric brace ranges, as the shell would: ``a-{08..10}`` → a-08 a-09 a-10."""
    parts = _RANGE.split(pattern)
    texts, ends = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    ranges = [[f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)] for low, high in ends]
    return ["".join(a + b for a, b in zip(texts, (*numbers, ""), strict=True)) for numbers in product(*ranges)]


def _local_matches(pattern: str) -> Sequence[str]:
    path = Path(pattern)
    if path.is_dir():
        return [str(found) for found in path.glob("*.tar")]
    if has_magic(pattern):
        return glob(pattern)
    if not path.is_file():
        raise MissingFileError(f"Shard {pattern} does not exist.")
    return [pattern]


def _remote_matches(pattern: str) -> Sequence[str]:
    path = urlsplit(pattern).path  # a question mark may begin a query
    if path.endswith(".tar") and not has_magic(path):
        return [pattern]

    def search(system: Any, path: str) -> list[str]:
        found = system.glob(path) if has_magic(path) else system.glob(f"{path.rstrip('/')}/*.tar")
        return [system.unstrip_protocol(each) for each in found]

    return _asked(Shard(pattern), search)
