"""Tensors by name from the small safetensors files that a stage makes before training."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unclip_pl.bundle import exists, inside, read_member


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
        raise FileNotFoundError(f"No {what} at {path}: run `{command}` first.")
    if place := inside(path):
        return Tensors(*read_member(place, device))
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return Tensors({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or holds no {what} ({error}): run `{command}` again.") from error
