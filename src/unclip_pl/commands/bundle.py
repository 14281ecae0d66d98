"""``unclip bundle``: a run as one file."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unclip_pl.clip import ClipEncoder
from unclip_pl.data.store import map_features, read_manifest
from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint, replacing
from unclip_pl.generation.bundle import STATE, Member, some_rows, write_bundle
from unclip_pl.generation.provenance import STAGES, commit
from unclip_pl.generation.run import RUN, read_run

#: What sampling needs of a checkpoint, beside its weights.
KEPT = ("hyper_parameters", "global_step", "train_seconds", "posterior_mse")
#: Settings that name files: a checkpoint holds what was in them, and their paths are nobody else's business.
FILES = ("statistics", "codec")


def bundle(paths: list[str], out: str = "") -> None:
    """Write a run's CLIP, decoder and priors as one file, the matrices in half precision.

    Of CLIP's text embedding it holds the tokens that occur in the captions of the run's store, if there is one: words
    with any other token are left out of a prompt, with a warning.

    Args:
        paths: the run's folder.
        out: safetensors file to write; without it, the run's folder with that ending.
    """
    if len(paths) != 1:
        raise InputError(f"Expected one run, such as: unclip bundle runs/quickstart. Got {len(paths)}.")
    root = Path(paths[0])
    run = read_run(root)
    description = json.loads((root / RUN).read_text())
    parts = {key: value for key, value in description.items() if key not in ("judge", "store")}
    files = {
        name: _within(name, number) for number, name in enumerate(dict.fromkeys(_texts(parts))) if _is_file(root, name)
    }
    members = {RUN: Member({}, _renamed(parts, {name: f"./{place}" for name, place in files.items()}))}
    for name, place in files.items():
        clip = run.clip.within(root).load() if name == run.clip.pretrained else None
        members[place] = _clip(clip, root / run.store if run.store else None) if clip else _member(root / name)
    path = Path(out or f"{root}.safetensors")
    with replacing(path) as temporary:
        write_bundle(temporary, members, _provenance(root))
    numbers = sum(value.numel() for member in members.values() for value in member.tensors.values())
    print(f"{len(files)} files of {root}, {numbers:,} numbers, {path.stat().st_size / 1e6:.1f} MB: {path}")


def _texts(node: Any) -> Iterator[str]:
    """Every text in there."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


def _is_file(root: Path, name: str) -> bool:
    return bool(name) and (root / name).is_file()


def _within(name: str, number: int) -> str:
    """A file's path in the bundle: its own, or, of one that lies elsewhere, a number's."""
    path = Path(name)
    return f"elsewhere/{number}/{path.name}" if path.is_absolute() or ".." in path.parts else path.as_posix()


def _renamed(node: Any, names: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    return names.get(node, node) if isinstance(node, str) else node


def _member(path: Path) -> Member:
    """A part's checkpoint, or its safetensors file."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return Member(load_file(path), file.metadata() or {})
    checkpoint = read_checkpoint(path)
    tensors: dict[str, Tensor] = {STATE + name: value for name, value in checkpoint["state_dict"].items()}
    content = {name: checkpoint[name] for name in KEPT if name in checkpoint}
    tensors |= {name: content.pop(name) for name in list(content) if isinstance(content[name], Tensor)}
    settings = content["hyper_parameters"]
    return Member(tensors, content | {"hyper_parameters": settings | {name: "" for name in FILES if name in settings}})


def _clip(clip: ClipEncoder, store: Path | None) -> Member:
    """CLIP with the rows of its text embedding that the store's captions need."""
    tensors = {f"{STATE}net.{name}": value for name, value in clip.model.state_dict().items()}
    member = Member(tensors, {"fingerprint": clip.fingerprint})
    records = read_manifest(store).values() if store else ()
    tokens = [np.unique(map_features(store / record.file).text_tokens) for record in records] if store else []
    if not tokens:
        return member
    rows = torch.from_numpy(np.unique(np.concatenate([*tokens, *clip.tokenize([""]).numpy()])).astype(np.int64))
    return some_rows(member, next(name for name in tensors if name.endswith("token_embedding.weight")), rows)


def _provenance(root: Path) -> dict[str, Any]:
    """Where the weights come from, as far as ``reproduce`` and the comparison have noted it."""
    stages = json.loads(path.read_text()) if (path := root / STAGES).is_file() else {}
    report = json.loads(path.read_text()) if (path := root / "report.json").is_file() else {}
    return {
        "run": root.resolve().name,
        "commits": list(dict.fromkeys(name for record in stages.values() for name in record["commits"])),
        "hardware": report.get("meta", {}).get("hardware", ""),
        "seconds": sum(record["seconds"] for record in stages.values() if record["command"][0] == "fit"),
        "recipe": {
            name: f"unclip {shlex.join(record['command'])}".replace(str(root), "{run}")
            for name, record in stages.items()
        },
        "bundled": commit(),
    }
