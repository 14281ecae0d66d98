"""Files that are written whole or not at all, read back as plain data, and told apart by their hashes."""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import lock_descriptor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError

#: Format of the safetensors files that this package writes. A file without an entry has the first one.
FORMAT = "1"
#: Entries of a safetensors file's header.
_FORMAT, _CHECKPOINT = "format", "checkpoint"
#: What the names of a checkpoint's weights begin with in a safetensors file.
_STATE = "state_dict."
#: Space around a caption. Editors on Windows begin a file with a byte order mark.
EDGES = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"
#: Types of the storages in a TorchScript archive.
_STORAGES = {
    **{"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    "Bool": torch.bool,
}
#: First bytes of a pointer that git-lfs leaves in a file's place.
LFS = b"version https://git-lfs"
#: First bytes of files that stand in for another one: what they are, and what to do.
_WRAPPED = (
    (LFS, "a pointer of git-lfs", "run `git lfs pull`"),
    (rb"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2", "unpack it with bunzip2"),
    (rb"\xfd7zXZ\0", "compressed with xz", "unpack it with unxz"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with unlz4"),
)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and move it over ``path`` on success.

    Readers see the old file or the whole new one, also after a crash. The temporary name is always the same: whoever
    writes the file after a kill leaves nothing of that attempt behind. A second writer of the file waits for the first.

    Raises:
        InputError: there is a folder or a device at ``path``.
    """
    path = path.resolve()  # a link stays, and its file is replaced
    if path.exists() and not path.is_file():
        raise InputError(f"Expected a file to write. Got {path}, which is none: name another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with alone(path.with_name(f".{path.name}.lock")) as mode:
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors lets nobody but the owner read what it writes
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _flush_folder(path.parent)


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold a lock file and give its mode. The system lets go of it when this process dies.

    Args:
        path: lock file, which is created and removed again.
        wait: wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is off.
    """
    while True:
        with path.open("ab") as file:
            held = True
            with suppress(OSError):  # a file system without locks
                held = lock_descriptor(file.fileno(), blocking=wait)
            if not held:
                raise BlockingIOError(f"{path} is held by another process.")
            if not _is_at(path, file):  # its holder removed it while this process waited
                continue
            try:
                yield os.fstat(file.fileno()).st_mode
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    path.unlink()
            return


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _flush_folder(path: Path) -> None:
    """Write a folder's entries to the disk: a rename outlives a power cut only then."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_unpacked(path: str | Path, what: str) -> None:
    """Raise InputError where a file is compressed, or a pointer of git-lfs.

    Args:
        path: file to look at.
        what: content that is expected, for the error.
    """
    with Path(path).open("rb") as file:
        head = file.read(512)
    for magic, kind, advice in _WRAPPED:
        if re.match(magic, head) and head[257:262] != b"ustar":  # the name of a tar's first file may begin so
            raise InputError(f"Expected {what}. Got {path}, which is {kind}: {advice}.")


def read_lines(path: str | Path, what: str) -> list[str]:
    """Read the lines of a UTF-8 file that are not blank, without byte order marks and outer spaces.

    Args:
        path: text file.
        what: content that is expected, for the errors.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not UTF-8, or holds nothing.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"No {what} at {path}: name a text file with one a line.")
    try:
        lines = clean_lines(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"Expected {what} in UTF-8. Got another encoding in {path}: save it as UTF-8.") from error
    if not lines:
        raise InputError(f"Expected {what}, one a line. Got nothing in {path}: write some.")
    return lines


def clean_lines(text: str) -> list[str]:
    """Return the lines of a text that are not blank, without byte order marks and outer spaces."""
    return [line for part in text.splitlines() if (line := part.strip(EDGES))]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write plain data as JSON, whole or not at all.

    Args:
        path: file to write; its folder is made where it is missing.
        content: numbers, texts, lists and dictionaries.
        indent: spaces of one level; None writes one line.
    """
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, separators=separators) + "\n")


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse numbers that a diverged training leaves.

    Args:
        tensors: arrays by name.
        what: their origin, for the error.

    Raises:
        InputError: one of them holds NaN or an infinite number.
    """
    floats = {name: value for name, value in tensors.items() if value.is_floating_point() and not value.is_meta}
    broken = [name for name, value in floats.items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"Expected finite numbers in {what}. Got NaN or infinity in {broken[0]} and {len(broken) - 1} more: its "
            "training diverged, or the file is damaged. Give another one, such as an earlier checkpoint."
        )


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before this one is kept: ``last.previous.ckpt`` beside ``last.ckpt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def check_archive(path: str | Path) -> None:
    """Compare every member of a ``torch.save`` file with its checksum, which torch itself does not do.

    Raises:
        InputError: a checksum differs.
        zipfile.BadZipFile: the file is cut off, or no such archive.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"Expected the checksum of {damaged} to agree. It does not: make the file again.")


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint as plain data: nothing in it can run.

    Args:
        path: file written by ``torch.save`` or by :func:`write_checkpoint`, with any suffix.
        mmap: leave the tensors in the file until they are used.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged, no checkpoint, or holds more than plain data.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"No checkpoint at {path}: give the path of one.")
    try:
        if is_checkpoint(path):
            return _from_tensors(_read_all(path, "cpu"))
        checkpoint = load_plain(path, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"a {type(checkpoint).__name__} instead of a dictionary")
    except UnknownFormatError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({why_not_plain(error)}): give another one.") from error
    return checkpoint


def load_plain(path: str | Path, *, mmap: bool = False) -> Any:
    """Load weights as plain data, by anyone: tensors, NumPy's numbers and arrays, texts, and containers of them.

    A TorchScript archive gives its tensors by name. Nothing in a file can run. Errors of a file that is damaged or
    holds more are of many types; :func:`why_not_plain` puts them in words.

    Args:
        path: safetensors file, TorchScript archive, or file of ``torch.save``.
        mmap: leave the tensors of a ``torch.save`` file in it until they are used.
    """
    require_unpacked(path, "weights")
    with Path(path).open("rb") as file:
        head = file.read(9)
    if head[:2] == b"PK":
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if data := next((name for name in archive.namelist() if name.endswith("/constants.pkl")), ""):
                return _script_tensors(archive, data.removesuffix("constants.pkl"))
    elif head[8:] == b"{":
        return load_file(path)
    with torch.serialization.safe_globals(_numpy_globals()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def why_not_plain(error: Exception) -> str:
    """Say in words what kept :func:`load_plain` from reading a file."""
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    if found := re.search(r"(?:GLOBAL|global|class) ([A-Za-z_][\w.]+\.\w+)", text):
        return (
            f"it holds a {found[1]}, which is no plain data: where you trust its source, load it with "
            "weights_only=False, and save its state_dict alone"
        )
    return f"{type(error).__name__}: {text.partition('. ')[0]:.200}"


def _numpy_globals() -> list[Any]:
    """Return what torch has to know to read NumPy's numbers and arrays, under the names of NumPy 1 and 2."""
    kinds = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFD"]
    makers: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
    named = [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in makers for core in ("core", "_core")]
    return [np.dtype, np.ndarray, *kinds, *named]


def _script_tensors(archive: zipfile.ZipFile, root: str) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by name, without running its code as ``torch.jit.load`` does."""

    class Module:
        """A module's attributes."""

    def tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)

    known = {("torch._utils", "_rebuild_tensor_v2"): tensor, ("collections", "OrderedDict"): OrderedDict}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.split(".")[0] == "__torch__":
                return Module
            if module == "torch" and name.removesuffix("Storage") in _STORAGES:
                return _STORAGES[name.removesuffix("Storage")]
            if module == "torch.jit._pickle":  # lists of one type
                return lambda value, *_: value
            if (module, name) in known:
                return known[module, name]
            raise pickle.UnpicklingError(f"class {module}.{name}")

        def persistent_load(self, pid: Any) -> Tensor:
            _, dtype, key, *_ = pid
            data = bytearray(archive.read(f"{root}data/{key}"))
            return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def named(module: Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(module).items():
            if isinstance(value, Module):
                yield from named(value, f"{prefix}{name}.")
            elif isinstance(value, Tensor):
                yield prefix + name, value

    return dict(named(Reader(archive.open(f"{root}data.pkl")).load(), ""))


def state_of(content: Any) -> dict[str, Tensor]:
    """Return the weights in what a training wrote, without the prefixes of ``torch.compile`` and ``DataParallel``.

    Args:
        content: result of :func:`load_plain`.

    Raises:
        TypeError: it holds no weights by name.
    """
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__} in place of weights by name")
    state = {str(key).replace("_orig_mod.", ""): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise TypeError("no weights by name")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint as safetensors, whole or not at all.

    Args:
        path: file to write; a bundle keeps the names of the files that it was made of, so any suffix will do.
        checkpoint: ``state_dict``, further tensors, and what JSON can hold.
    """
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in checkpoint.items() if name not in tensors and name != "state_dict"}
    tensors |= {_STATE + name: value for name, value in checkpoint["state_dict"].items()}
    write_tensors(path, tensors, {_CHECKPOINT: json.dumps(plain)})


def is_checkpoint(path: str | Path) -> bool:
    """Say whether :func:`write_checkpoint` wrote a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return _CHECKPOINT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _from_tensors(content: "Tensors") -> dict[str, Any]:
    state = {name.removeprefix(_STATE): value for name, value in content.tensors.items() if name.startswith(_STATE)}
    others = {name: value for name, value in content.tensors.items() if not name.startswith(_STATE)}
    return json.loads(content.metadata[_CHECKPOINT]) | others | {"state_dict": state}


class Tensors(NamedTuple):
    """Content of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with a format version, whole or not at all.

    Args:
        path: file to write; its folder is made where it is missing.
        tensors: arrays by name.
        metadata: texts by name, for the file's header.

    Raises:
        InputError: the disk is full.
    """
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, {_FORMAT: FORMAT, **(metadata or {})})
        except SafetensorError as error:
            raise InputError(f"{path} cannot be written ({error}): free some space.") from error


def read_tensors(path: str | Path, names: Iterable[str], *, what: str, command: str, device: str = "cpu") -> Tensors:
    """Read some tensors of a file, and its texts. Halves become float32.

    Args:
        path: safetensors file.
        names: tensors to read; all have to be there.
        what: content of the file, for the error.
        command: command that makes the file, for the error.
        device: device of the tensors.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is damaged, or of another kind or format.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"No {what} at {path}: run `{command}` first.")
    try:
        require_unpacked(path, what)
        content = _read_all(path, device, names)
    except UnknownFormatError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is damaged or holds no {what} ({error}): run `{command}` again.") from error
    require_finite(content.tensors, str(path))
    return content


def _read_all(path: str | Path, device: str, names: Iterable[str] | None = None) -> Tensors:
    with safe_open(str(path), framework="pt", device=device) as file:
        metadata = file.metadata() or {}
        require_format(metadata.get(_FORMAT, FORMAT), FORMAT, path)
        tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    halves = {name: value.float() for name, value in tensors.items() if value.dtype == torch.half}
    return Tensors(tensors | halves, metadata)


class UnknownFormatError(InputError):
    """Says that another version of this package wrote a file."""


def require_format(found: object, known: object, path: str | Path) -> None:
    """Raise :class:`UnknownFormatError` where a file's format is not the known one."""
    if found != known:
        raise UnknownFormatError(
            f"Expected {path} in format {known!r}. Got {found!r}: install the version of unclip_pl that wrote it."
        )
