"""Checkpoint files: only plain data come out, and only if every byte is as it was written."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from unclip_pl.bundle import STATE, inside, read_member


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
        raise ValueError(f"wrong checksum of {damaged}")


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
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"a {type(checkpoint).__name__} instead of a dictionary")
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {reason:.200}).") from error
    return checkpoint
