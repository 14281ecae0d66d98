"""A trained run: what its ``run.json`` says, where it is found, and what must fit together before anything is drawn."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import torch

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import sha256, write_json
from unclip_pl.generation.bundle import read_notes, unpack
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.moved import moved_in
from unclip_pl.settings import expanded

#: File that describes a run, in its folder.
RUN = "run.json"
#: Where a run is looked for when none is named, and the weights in this package that are taken where there is none.
QUICKSTART, DEFAULT = Path("runs/quickstart"), "shapes"
#: Folder of the weights in this package, a bundle for each name.
WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class RunDescription:
    """The content of ``run.json``: what a run consists of, every path relative to its folder.

    Args:
        clip: the CLIP that conditions everything.
        decoder: the decoder and its upsamplers.
        priors: the run's priors, by name; none where a study brings its own.
        judge: another CLIP, for scores; None in an imported run.
        store: folder of the training split's embeddings; empty in an imported run.
    """

    clip: ClipSpec
    decoder: DecoderSpec
    priors: dict[str, PriorSpec] = field(default_factory=dict)
    judge: ClipSpec | None = None
    store: str = ""


class Parts(NamedTuple):
    """Loaded networks that belong together. A tuple, so that a LightningModule that keeps it registers none of them."""

    clip: ClipEncoder | None  # None where embeddings are all there is
    decoder: Decoder | None
    priors: dict[str, Prior]
    fingerprint: str  # of the CLIP, or of the embeddings


class Origin(NamedTuple):
    """Where weights come from."""

    run: str  # name of the run's folder, where it was trained
    commit: str  # commits of the code that trained a bundle's weights; empty for a folder
    text: str  # all of it, in a line

    @classmethod
    def of(cls, root: Path, named: Path) -> Self:
        """Return the origin of a run.

        Args:
            root: folder of the run, where a bundle may have been unpacked.
            named: path that the user gave, or a default.
        """
        if not (told := read_notes(root)):
            return cls(root.resolve().name, "", str(named))
        run, commit = told.get("run", "unknown"), ", ".join(told.get("commits", [])) or "unknown"
        where = "the weights in this package" if named.parent == WEIGHTS else str(named)
        minutes = f"{told.get('seconds', 0) / 60:.0f} minutes on {told.get('hardware') or 'an unknown machine'}"
        return cls(run, commit, f"{where}: of the run {run}, trained at commit {commit} in {minutes}")


def packaged() -> dict[str, Path]:
    """Return the bundles in this package by name."""
    return {bundle.stem: bundle for bundle in sorted(WEIGHTS.glob("*.zip"))}


def name_run(run: str | Path | None) -> Path:
    """Return the path of a run.

    Args:
        run: folder, bundle, or name of weights in this package where there is no such run; None means
            ``runs/quickstart``, or the weights on shapes where that is missing.
    """
    path = Path(run).expanduser() if run else QUICKSTART
    there = path.is_file() or (path / RUN).is_file()
    return path if there else packaged().get(str(run) if run else DEFAULT, path)


def find_run(run: str | Path | None) -> Path:
    """Return the folder of a run. A bundle is unpacked into a temporary folder for the life of this process.

    Args:
        run: folder, bundle or name, see :func:`name_run`.

    Raises:
        InputError: a file that is no bundle.
    """
    path = name_run(run)
    return _unpacked(path.resolve(), path.stat().st_mtime_ns) if path.is_file() else path


#: Temporary folders of unpacked bundles, which go when this process ends.
_FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def _unpacked(bundle: Path, changed_ns: int) -> Path:
    folder = TemporaryDirectory(prefix="unclip-", ignore_cleanup_errors=True)
    unpack(bundle, Path(folder.name))
    _FOLDERS.append(folder)
    return Path(folder.name)


def read_run(root: Path) -> RunDescription:
    """Parse ``run.json`` of a folder.

    Raises:
        MissingFileError: there is no run.
        InputError: the file is broken.
    """
    from jsonargparse import ArgumentParser

    path = root / RUN
    if not path.is_file():
        raise MissingFileError(
            f"No run at {root}: expected {path}. Run `unclip reproduce` (or `make quickstart`), which writes it, or "
            f"name a file of `unclip bundle` or weights of this package ({', '.join(packaged()) or 'none is there'})."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunDescription, "run")
    try:
        content = expanded(json.loads(path.read_bytes()))
        description: RunDescription = parser.instantiate(parser.parse_object({"run": content})).run
    except Exception as error:
        moved = moved_in(str(error))
        raise InputError(
            f"{path} does not describe a run. Correct it: {moved or str(error).splitlines()[0]}"
        ) from error
    return description


def base_hash(root: Path) -> str:
    """Return 12 hexadecimal digits that tell apart what the cells of a study share: CLIP, judge and decoder.

    Args:
        root: folder of a run.
    """
    content = expanded(json.loads((root / RUN).read_bytes()))
    shared = [content.get(name) for name in ("clip", "judge", "decoder")]
    files = sorted(name for name in texts_in(shared) if name and (root / name).is_file())
    return hashlib.sha256("".join(sha256(root / name) for name in files).encode()).hexdigest()[:12]


def texts_in(node: Any) -> Iterator[str]:
    """Yield every text in plain data, in order."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from texts_in(value)
    elif isinstance(node, str):
        yield node


def write_run(root: Path, description: Mapping[str, Any]) -> None:
    """Write ``run.json``.

    Args:
        root: folder of the run.
        description: plain data that :class:`RunDescription` can be parsed from.
    """
    write_json(root / RUN, description, indent=2)


def open_parts(
    run: Path,
    clip: ClipSpec | None,
    *,
    device: torch.device | str,
    store_fingerprint: str | None = None,
    decoder: DecoderSpec | None = None,
    decoder_run: Path | None = None,
    priors: Mapping[str, PriorSpec] = {},
    weights: Path | None = None,
) -> Parts:
    """Load networks, and refuse those that do not belong together.

    Args:
        run: folder that CLIP is named relative to, or a bundle.
        clip: the CLIP that conditions everything; None where the embeddings at hand are all there is.
        device: where to compute.
        store_fingerprint: fingerprint of the CLIP that made the embeddings at hand; None where there are none.
        decoder: the decoder to load; None loads none.
        decoder_run: folder that the decoder is named relative to; None means ``run``.
        priors: the priors to load, by name.
        weights: folder that the priors are named relative to; None means ``run``.

    Raises:
        InputError: two parts belong to different CLIPs, or a prior's embeddings lack the norm that the decoder needs.
    """
    device, run = str(device), find_run(run)
    decoder_run = decoder_run or run
    encoder = clip.within(run).load().to(device) if clip is not None else None
    fingerprint = encoder.fingerprint if encoder is not None else store_fingerprint or ""
    check_clip(fingerprint, store_fingerprint or "", "the embedding store")
    drawer = decoder.load(decoder_run, device) if decoder is not None else None
    if drawer is not None:
        check_clip(fingerprint, drawer.fingerprint, f"the decoder {decoder_run / drawer.spec.checkpoint}")
    loaded = {}
    for name, spec in priors.items():
        loaded[name] = prior = spec.load(weights or run, device)
        check_clip(fingerprint, prior.fingerprint, f"the prior {name!r}")
        if drawer is not None:
            check_norm(prior, drawer)
    return Parts(encoder, drawer, loaded, fingerprint)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here, before anything is read.

    Raises:
        InputError: there is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Expected a device of this machine. Got {device!r} ({reason:.200}): choose another, such as cpu."
        ) from error


def check_clip(clip: str, other: str, what: str) -> None:
    """Refuse a part that was trained on another CLIP's embeddings.

    Args:
        clip: fingerprint of the run's CLIP.
        other: fingerprint of the CLIP that the part was trained on; empty if any will do.
        what: name of the part, for the error.

    Raises:
        InputError: the fingerprints differ; the error has both.
    """
    if other and clip != other:
        raise InputError(
            f"This run's CLIP is {clip!r}, but {what} was trained on embeddings of {other!r}: train it again on this "
            "CLIP's embeddings, or point the run at the other CLIP."
        )


def check_norm(prior: Prior, decoder: Decoder) -> None:
    """Refuse embeddings without CLIP's norm for a decoder of raw embeddings.

    Raises:
        InputError: the decoder needs the norm, and the prior does not keep it.
    """
    if decoder.needs_norm and not prior.keeps_norm:
        raise InputError(
            f"The decoder {decoder.spec.checkpoint} was trained on raw embeddings, and {type(prior).__name__} gives "
            "them without CLIP's norm: use a prior with keep_norm, or a decoder of scaling 'unit'."
        )
