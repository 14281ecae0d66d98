"""A trained run: what its ``run.json`` says, where it is found, and what must fit together before anything is drawn."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import write_json
from unclip_pl.generation.bundle import exists, inside, read_content, read_provenance
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.tasks.loading import check_classes

#: File that describes a run, in its folder.
RUN = "run.json"
#: Where a run is looked for when none is named.
QUICKSTART, DEMO = Path("runs/quickstart"), Path(__file__).parents[1] / "demo.safetensors"


@dataclass(frozen=True)
class RunDescription:
    """The content of ``run.json``: what a run consists of, every path relative to its folder.

    Args:
        clip: the CLIP that conditions everything.
        decoder: the decoder and its upsamplers.
        priors: the run's priors, by name.
        judge: another CLIP, for scores; None in an imported run.
        store: folder of the training split's embeddings; empty in an imported run.
    """

    clip: ClipSpec
    decoder: DecoderSpec
    priors: dict[str, PriorSpec]
    judge: ClipSpec | None = None
    store: str = ""


class Parts(NamedTuple):
    """Loaded networks that belong together. A tuple, so that a LightningModule that keeps it registers none of them."""

    clip: ClipEncoder
    decoder: Decoder | None
    priors: dict[str, Prior]


class Origin(NamedTuple):
    """Where weights come from."""

    run: str  # the name of the folder
    commit: str  # of the code that trained them; empty if unknown
    text: str  # in a line

    @classmethod
    def of(cls, root: Path) -> Self:
        """Of a run's folder, or of a bundle."""
        if not root.is_file():
            return cls(root.resolve().name, "", str(root))
        told = read_provenance(root)
        run, commit = told.get("run", "unknown"), ", ".join(told.get("commits", [])) or "unknown"
        where = "the weights in this package" if root == DEMO else str(root)
        minutes = f"{told.get('seconds', 0) / 60:.0f} minutes on {told.get('hardware') or 'an unknown machine'}"
        return cls(run, commit, f"{where}: of the run {run}, trained at commit {commit} in {minutes}")


def find_run(run: str | Path | None) -> Path:
    """Return the path of a run.

    Args:
        run: folder or bundle; None means ``runs/quickstart``, or the weights in this package where that is missing.
    """
    if run:
        return Path(run)
    return DEMO if DEMO.is_file() and not (QUICKSTART / RUN).is_file() else QUICKSTART


def read_run(root: Path) -> RunDescription:
    """Parse ``run.json`` of a folder or a bundle.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file is broken.
    """
    from jsonargparse import ArgumentParser

    path = root / RUN
    if not exists(path):
        raise MissingFileError(
            f"No run at {root}: expected {path}. Run `unclip reproduce` (or `make quickstart`), which writes it, or "
            "name a file of `unclip bundle`."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunDescription, "run")
    try:
        if place := inside(path):
            content = json.loads(_renamed(json.dumps(read_content(place))))
            check_classes(content)  # data, perhaps somebody else's
        else:
            content = json.loads(path.read_text())
        description: RunDescription = parser.instantiate(parser.parse_object({"run": content})).run
    except Exception as error:
        raise InputError(f"{path} does not describe a run: {str(error).splitlines()[0]}") from error
    return description


def _renamed(text: str) -> str:
    """Until the packaged weights are converted."""
    text = re.sub(r"generation\.priors\.([A-Z]\w+)(?<!Spec)\b", r"generation.priors.\1Spec", text)
    return re.sub(r"(generation\.)?pipeline\.(Decoder|Upsampler)", r"generation.decoding.\2Spec", text)


def write_run(root: Path, description: Mapping[str, Any]) -> None:
    """Write ``run.json``.

    Args:
        root: folder of the run.
        description: plain data that :class:`RunDescription` can be parsed from.
    """
    write_json(root / RUN, description, indent=2)


def open_parts(
    run: Path,
    clip: ClipSpec,
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
        run: folder that CLIP is named relative to.
        clip: the CLIP that conditions everything.
        device: where to compute.
        store_fingerprint: fingerprint of the CLIP that made the embeddings at hand; None where there are none.
        decoder: the decoder to load; None loads none.
        decoder_run: folder that the decoder is named relative to; None means ``run``.
        priors: the priors to load, by name.
        weights: folder that the priors are named relative to; None means ``run``.

    Raises:
        ValueError: two parts belong to different CLIPs, or a prior's embeddings lack the norm that the decoder needs.
    """
    device, decoder_run = str(device), decoder_run or run
    encoder = clip.within(run).load().to(device)
    fingerprint = encoder.fingerprint
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
    return Parts(encoder, drawer, loaded)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here, before anything is read.

    Raises:
        ValueError: there is no such device.
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
        ValueError: the fingerprints differ; the error has both.
    """
    if other and clip != other:
        raise InputError(
            f"This run's CLIP is {clip!r}, but {what} was trained on embeddings of {other!r}: train it again on this "
            "CLIP's embeddings, or point the run at the other CLIP."
        )


def check_norm(prior: Prior, decoder: Decoder) -> None:
    """Refuse embeddings without CLIP's norm for a decoder of raw embeddings.

    Raises:
        ValueError: the decoder needs the norm, and the prior does not keep it.
    """
    if decoder.needs_norm and not prior.keeps_norm:
        raise InputError(
            f"The decoder {decoder.spec.checkpoint} was trained on raw embeddings, and {type(prior).__name__} gives "
            "them without CLIP's norm: use a prior with keep_norm, or a decoder of scaling 'unit'."
        )
