"""A run in one file: safetensors whose members are the files that the run is made of.

To those who read a run, ``demo.safetensors/decoder/checkpoints/last.ckpt`` is a path like any other. Tensors are named
``member:name``; what else a member holds is JSON in the file's head, so nothing in a bundle can run. Matrices of
networks are halves, and a text embedding may have only the rows of some tokens: the others are zero when it is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError

#: Entries of the head.
MEMBERS, PROVENANCE = "members", "provenance"
#: After the name of a tensor: which rows of it are there.
ROWS = "@rows"
#: What the names of a checkpoint's weights begin with.
STATE = "state_dict."


class Member(NamedTuple):
    """One file of a run."""

    tensors: dict[str, Tensor]
    content: dict[str, Any]  # all else, as JSON has it


class Place(NamedTuple):
    """A member, as a path names it."""

    bundle: Path
    member: str


def inside(path: str | Path) -> Place | None:
    """The member that a path leads to; None for a path of folders and files alone."""
    path = Path(path)
    bundle = next((parent for parent in path.parents if parent.is_file()), None)
    return Place(bundle, path.relative_to(bundle).as_posix()) if bundle else None


def exists(path: str | Path) -> bool:
    """Whether there is a file at a path, or a member of a bundle.

    Raises:
        ValueError: the path leads into a file that is no bundle.
    """
    place = inside(path)
    return Path(path).is_file() if place is None else place.member in _head(place.bundle, MEMBERS)


def read_content(place: Place) -> dict[str, Any]:
    """A member without its tensors.

    Raises:
        FileNotFoundError: there is no such member.
        ValueError: the file is no bundle, or damaged.
    """
    members = _head(place.bundle, MEMBERS)
    if place.member not in members:
        raise MissingFileError(f"{place.bundle} holds no {place.member}: expected one of {', '.join(members)}.")
    return members[place.member]


def read_member(place: Place, device: str = "cpu") -> Member:
    """A member, its halves as float32 and its matrices whole again.

    Raises:
        FileNotFoundError: there is no such member.
        ValueError: the file is no bundle, or damaged.
    """
    content, prefix = read_content(place), f"{place.member}:"
    try:
        with safe_open(place.bundle, "pt", device=device) as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no dictionary)
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _damaged(place.bundle, error) from error
    tensors = {name: value.float() if value.dtype == torch.half else value for name, value in tensors.items()}
    for name, count in content.get(ROWS, {}).items():
        some, rows = tensors[name], tensors.pop(name + ROWS).long()
        tensors[name] = some.new_zeros(count, some.shape[1]).index_copy(0, rows, some)
    return Member(tensors, content)


def read_provenance(bundle: Path) -> dict[str, Any]:
    """Where a bundle comes from.

    Raises:
        ValueError: the file is no bundle, or damaged.
    """
    return _head(bundle, PROVENANCE)


def write_bundle(path: Path, members: Mapping[str, Member], provenance: Mapping[str, Any]) -> None:
    """The file of these members. Halves are made of the matrices of networks, where they hold their values.

    Args:
        path: to write.
        members: by their path in the run.
        provenance: where they come from.
    """
    tensors = {
        f"{name}:{key}": _packed(key, value).contiguous().clone()
        for name, member in members.items()
        for key, value in member.tensors.items()
    }
    contents = {name: member.content for name, member in members.items()}
    save_file(tensors, path, {MEMBERS: json.dumps(contents), PROVENANCE: json.dumps(provenance)})


def _packed(key: str, value: Tensor) -> Tensor:
    """Vectors and statistics are few numbers, some of them large or nearly zero: they stay as they are."""
    matrix = key.startswith(f"{STATE}net.") and value.is_floating_point() and value.ndim > 1
    return half if matrix and (half := value.half()).isfinite().all() else value


def some_rows(member: Member, key: str, rows: Tensor) -> Member:
    """A member with only some rows (k,) of one matrix."""
    whole = member.tensors[key]
    tensors = member.tensors | {key: whole[rows], key + ROWS: rows.int()}
    return Member(tensors, member.content | {ROWS: {key: len(whole)}})


def _head(bundle: Path, entry: str) -> dict[str, Any]:
    try:
        with safe_open(bundle, "pt") as file:
            found = json.loads((file.metadata() or {})[entry])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(bundle, error) from error
    if not isinstance(found, dict):
        raise _damaged(bundle, TypeError(entry))
    return found


def _damaged(bundle: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{bundle} is no bundle of a run, or damaged ({reason:.200}): make one with `unclip bundle RUN`.")
