"""``unclip bundle``: a run as one file."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip_pl.clip import ClipEncoder
from unclip_pl.data.store import map_features, read_manifest
from unclip_pl.errors import InputError
from unclip_pl.files import is_checkpoint, read_checkpoint, write_checkpoint, write_json, write_text
from unclip_pl.generation.bundle import read_notes, write_bundle
from unclip_pl.generation.priors import TrainedPriorSpec
from unclip_pl.generation.provenance import stage_records
from unclip_pl.generation.run import RUN, RunDescription, read_run, texts_in
from unclip_pl.origin import commit
from unclip_pl.report.card import CARD, model_card
from unclip_pl.settings import expanded

#: What sampling needs of a checkpoint, beside its weights.
KEPT = ("hyper_parameters", "global_step", "train_samples", "train_seconds", "posterior_mse")
#: Settings that name files: a checkpoint holds what was in them, and their paths are nobody else's business.
FILES = ("statistics", "codec")
#: File of the AR prior's codec in the runs of our recipes; only a study needs it beside the AR prior.
CODEC = "codec.safetensors"


def bundle(paths: list[str], out: str = "", *, for_study: bool = False) -> None:
    """Write the networks of a run as one zip, their matrices in half precision, with a model card.

    CLIP's token table keeps the tokens that occur in the captions of the run's store, if there is one. The rows of
    other tokens are zeros, which take no space: a prompt with such a word is drawn with a warning.

    Args:
        paths: the run's folder.
        out: zip file to write; without it, the run's folder with the ending .zip.
        for_study: keep what a study's arms share: CLIP, judge, codec, linear prior and decoder. Without it the bundle
            keeps what draws: CLIP, decoder and all priors.
    """
    if len(paths) != 1:
        raise InputError(f"Expected one run. Write, for example, unclip bundle runs/quickstart. Got {len(paths)}.")
    root = Path(paths[0])
    run = read_run(root)
    parts = _parts(expanded(json.loads((root / RUN).read_bytes())), run, for_study=for_study)
    names = [name for name in dict.fromkeys(texts_in(parts)) if name and (root / name).is_file()]
    places = {name: _within(name, number) for number, name in enumerate(names)}
    if for_study and (root / CODEC).is_file():
        places[CODEC] = CODEC
    clip = run.clip.within(root)
    tokens = _tokens(clip.load(), root / run.store) if run.store else read_notes(root).get("tokens")
    encoders = {spec.pretrained: spec for spec in (run.clip, run.judge) if spec is not None}
    path = Path(out or f"{root if root.name.strip('.') else root.resolve()}.zip")  # not `..zip`
    if path.is_dir():
        raise InputError(f"Expected a zip file to write. Got {path}, which is a folder: name another --out.")
    use = f"unclip unbundle {path.name} RUN" if for_study else f'unclip sample "a caption" --run {path.name}'
    card = model_card(root, use)
    with TemporaryDirectory() as folder:
        for name, place in places.items():
            target = Path(folder) / place
            if name in encoders:
                write_checkpoint(target, _clip(encoders[name].within(root).load(), tokens))
            elif (root / name).suffix == ".safetensors" and not is_checkpoint(root / name):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, target)
            else:
                write_checkpoint(target, _task(read_checkpoint(root / name)))
        write_json(
            Path(folder) / RUN, _renamed(parts, {name: f"./{place}" for name, place in places.items()}), indent=2
        )
        write_text(Path(folder) / CARD, card)
        write_bundle(path, Path(folder), _provenance(root) | {"tokens": tokens})
    print(f"{len(places)} files of {root}, {path.stat().st_size / 1e6:.1f} MB: {path}")


def _parts(content: dict[str, Any], run: RunDescription, *, for_study: bool) -> dict[str, Any]:
    """Return the part of ``run.json`` that is kept."""
    if not for_study:
        return {key: value for key, value in content.items() if key not in ("judge", "store")}
    small = {name for name, spec in run.priors.items() if not isinstance(spec, TrainedPriorSpec)}
    kept = {name: spec for name, spec in content.get("priors", {}).items() if name in small}
    return {key: value for key, value in content.items() if key != "store"} | {"priors": kept}


def _within(name: str, number: int) -> str:
    """Return a file's path in the bundle: its own, or one with a number where the file lies outside of the run."""
    path = Path(name)
    return f"elsewhere/{number}/{path.name}" if path.is_absolute() or ".." in path.parts else path.as_posix()


def _renamed(node: Any, names: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    return names.get(node, node) if isinstance(node, str) else node


def _task(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle keeps of a Task's checkpoint."""
    kept = {name: checkpoint[name] for name in KEPT if name in checkpoint}
    settings = kept["hyper_parameters"]
    kept["hyper_parameters"] = settings | {name: "" for name in FILES if name in settings}
    return kept | {"state_dict": {name: _half(name, value) for name, value in checkpoint["state_dict"].items()}}


def _clip(clip: ClipEncoder, tokens: list[int] | None) -> dict[str, Any]:
    """Return CLIP as a checkpoint, with zeros for the tokens that are not listed."""
    state = {f"net.{name}": value for name, value in clip.model.state_dict().items()}
    if tokens is not None and clip.knows_bpe:
        name = next(name for name in state if name.endswith("token_embedding.weight"))
        known = torch.tensor(tokens)
        state[name] = torch.zeros_like(state[name]).index_copy(0, known, state[name][known])
    state = {name: _half(name, value) for name, value in state.items()}
    return {"fingerprint": clip.fingerprint, "state_dict": state}


def _half(name: str, value: Tensor) -> Tensor:
    """Return a network's matrix as halves. Vectors and statistics are few numbers, some of them large or tiny."""
    matrix = name.startswith("net.") and value.is_floating_point() and value.ndim > 1
    return half if matrix and (half := value.half()).isfinite().all() else value


def _tokens(clip: ClipEncoder, store: Path) -> list[int] | None:
    """Return the tokens of all captions in a store and of the empty caption, ascending; None without captions.

    A tokenizer of transformers' keeps its whole table: which words it knows cannot be told from single tokens.
    """
    if not clip.knows_bpe:
        return None
    found = [np.unique(map_features(store / record.file).text_tokens) for record in read_manifest(store).values()]
    return np.unique(np.concatenate([*found, *clip.tokenize([""]).numpy()])).tolist() if found else None


def _provenance(root: Path) -> dict[str, Any]:
    """Return where the weights come from: the notes of the bundle that the run was, and what was trained since."""
    notes, stages = read_notes(root), stage_records(root)
    report = json.loads(path.read_text(encoding="utf-8")) if (path := root / "report.json").is_file() else {}
    hardware = report.get("meta", {}).get("hardware") or notes.get("hardware", "")
    commits = [*notes.get("commits", []), *(name for record in stages.values() for name in record["commits"])]
    trained = sum(record["seconds"] for record in stages.values() if record["command"].startswith("fit "))
    return {
        "run": notes.get("run", root.resolve().name),
        "commits": list(dict.fromkeys(commits)),
        "hardware": hardware if isinstance(hardware, str) else "; ".join(hardware),
        "seconds": notes.get("seconds", 0) + trained,
        "recipe": notes.get("recipe", {}) | {name: f"unclip {record['command']}" for name, record in stages.items()},
        "bundled": commit(),
    }
