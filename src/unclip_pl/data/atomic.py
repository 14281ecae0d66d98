"""Files that are whole or not there."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, moved over it on success and removed on error.

    Readers, and whoever comes after a crash, see the old file or the whole new one. The temporary name is always the
    same, so that whoever writes the file after a kill leaves nothing of that attempt behind; a second process that
    writes the same file waits for the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with _held(temporary):
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors lets nobody but the owner read what it writes
            _flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _flush(path.parent)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Create a file, and keep it to this process; the kernel lets go of it when the process dies."""
    while True:
        with path.open("ab") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is(path, file):
                yield
                return  # else it was moved into place while this process waited for it


def _is(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _flush(path: Path) -> None:
    """To the disk itself: a rename that outlives a power cut needs the file's bytes and the folder's entry there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
