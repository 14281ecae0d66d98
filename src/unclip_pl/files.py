"""Files: written whole or not at all, read back as plain data only, and told apart by their hashes."""

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.generation.bundle import STATE, exists, inside, read_member


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


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write plain data as JSON, whole or not at all.

    Args:
        path: file to write; its folder is made where it is missing.
        content: numbers, texts, lists and dictionaries.
        indent: spaces of one level; None writes one line.
    """
    separators = (",", ":") if indent is None else None
    with replacing(path) as temporary:
        text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
        temporary.write_text(text + "\n", encoding="utf-8")


def previous_of(path: Path) -> Path:
    """Where the file that a checkpoint has replaced is kept: ``last.previous.ckpt`` beside ``last.ckpt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def check_archive(path: str | Path) -> None:
    """Compare every member of a ``torch.save`` file with its checksum, which torch itself does not do.

    Raises:
        ValueError: one does not agree.
        zipfile.BadZipFile: the file is cut off, or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"wrong checksum of {damaged}")


def read_checkpoint(path: str | Path, *, map_location: str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Tensors, numbers, texts and containers of a file written by ``torch.save``; nothing in it can run.

    Args:
        path: the file, or a member of a bundle.
        map_location: device of the tensors.
        mmap: leave the tensors in the file until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, damaged, no checkpoint at all, or holds more than plain data.
    """
    if place := inside(path):
        tensors, content = read_member(place, map_location)
        state = {name.removeprefix(STATE): tensors.pop(name) for name in list(tensors) if name.startswith(STATE)}
        return content | tensors | {"state_dict": state}
    if not Path(path).is_file():
        raise MissingFileError(f"No checkpoint at {path}.")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise InputError(f"a {type(checkpoint).__name__} instead of a dictionary")
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: {reason:.200}).") from error
    return checkpoint


class Tensors(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(path: str | Path, names: Iterable[str], *, what: str, command: str, device: str = "cpu") -> Tensors:
    """The tensors of those names, and the file's texts.

    Args:
        path: the file, or a member of a bundle.
        names: all have to be there.
        what: the file holds, for the error.
        command: that makes it.
        device: of the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another kind of file.
    """
    if not exists(path):
        raise MissingFileError(f"No {what} at {path}: run `{command}` first.")
    if place := inside(path):
        return Tensors(*read_member(place, device))
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return Tensors({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is damaged or holds no {what} ({error}): run `{command}` again.") from error
