"""Caption → embedding → image: a trained run, put together."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.decoding import Decoder, Progress, Upsampler
from unclip_pl.diffusion import check_guidance
from unclip_pl.manipulation import Manipulations
from unclip_pl.nn.text import repeat_text
from unclip_pl.priors import Prior

log = logging.getLogger(__name__)

__all__ = [
    "Decoder",
    "Generation",
    "RunDescription",
    "Unclip",
    "Upsampler",
    "check_clip",
    "check_norm",
    "read_run",
    "write_run",
]


class Generation(NamedTuple):
    """Images of captions, and the embeddings that they were drawn from."""

    images: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) as the prior gave them: unit norm, or raw where it keeps the norm


@dataclass
class RunDescription:
    """``run.json``: what a run consists of, every path relative to its folder.

    Args:
        clip: the CLIP that conditions everything.
        decoder: and its upsamplers.
        priors: by name.
        judge: another CLIP, for scores; None in an imported run.
        store: folder of the training split's embeddings; empty in an imported run.
    """

    clip: ClipSpec
    decoder: Decoder
    priors: dict[str, Prior]
    judge: ClipSpec | None = None
    store: str = ""


class Unclip(Manipulations):
    """A trained run. ``Unclip.load("runs/quickstart").generate(["a red star"])``."""

    def __init__(self, root: Path, clip: ClipEncoder, decoder: Decoder, priors: dict[str, Prior], device: str) -> None:
        self.root = root
        self.clip = clip
        self.decoder = decoder
        self.priors = priors
        self.device = device
        self._loaded: set[str] = set()

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> Self:
        """Read ``run.json`` and the decoder and CLIP it names; a prior is read when it is first used.

        Raises:
            FileNotFoundError: there is no finished run.
            ValueError: decoder and CLIP do not belong together.
        """
        root = Path(run)
        description = read_run(root)
        clip = description.clip.within(root).load().to(device)
        decoder = description.decoder.load(root, device)
        check_clip(clip.fingerprint, decoder.fingerprint, f"the decoder {root / decoder.checkpoint}")
        return cls(root, clip, decoder, description.priors, device)

    def prior(self, name: str) -> Prior:
        """One of the run's priors, with its weights.

        Raises:
            ValueError: no prior of that name, or one of another CLIP.
        """
        if name not in self.priors:
            raise ValueError(f"{self.root} has no prior {name!r}. Expected one of {', '.join(self.priors)}.")
        if name not in self._loaded:
            self.priors[name].load(self.root, self.device)
            check_clip(self.clip.fingerprint, self.priors[name].fingerprint, f"the prior {name!r}")
            check_norm(self.priors[name], self.decoder)
            self._loaded.add(name)
        return self.priors[name]

    def generate(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        prior: str = "diffusion",
        guidance: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generation:
        """``num`` images of each caption, one caption after the other.

        Args:
            captions: texts; an empty one is unconditional.
            num: images per caption.
            prior: name in the run.
            guidance: of the decoder; None keeps the run's.
            seed: the same seed gives the same images.
            progress: called after every step of the decoder.
        """
        if not captions or num < 1:
            raise ValueError(f"Expected at least one caption and num >= 1. Got {len(captions)} and {num}.")
        check_guidance(self.decoder.guidance if guidance is None else guidance)
        generator = torch.Generator().manual_seed(seed)
        text = repeat_text(self.clip.describe(list(captions)), num)
        z_i = self.prior(prior).embed(text, generator=generator)
        images = self.decoder.decode(z_i, text, guidance=guidance, generator=generator, progress=progress)
        return Generation(images, z_i)


def check_clip(clip: str, other: str, what: str) -> None:
    """Two CLIPs never mix.

    Raises:
        ValueError: naming both.
    """
    if other and clip != other:
        raise ValueError(
            f"This run's CLIP is {clip!r}, but {what} was trained on embeddings of {other!r}: train it again on this "
            "CLIP's embeddings, or point the run at the other CLIP."
        )


def check_norm(prior: Prior, decoder: Decoder) -> None:
    """A decoder of raw embeddings cannot draw from those that have lost their norm.

    Raises:
        ValueError: it would have to.
    """
    if decoder.needs_norm and not prior.keeps_norm:
        raise ValueError(
            f"The decoder {decoder.checkpoint} was trained on raw embeddings, and {type(prior).__name__} gives them "
            "without CLIP's norm: use a prior with keep_norm, or a decoder of scaling 'unit'."
        )


def read_run(root: Path) -> RunDescription:
    """Parse ``run.json``.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the file is broken.
    """
    from jsonargparse import ArgumentParser

    path = root / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"No run at {root}: expected {path}, which `unclip reproduce` (or `make quickstart`) writes."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunDescription, "run")
    try:
        return parser.instantiate_classes(parser.parse_object({"run": json.loads(path.read_text())})).run
    except Exception as error:
        raise ValueError(f"{path} does not describe a run: {str(error).splitlines()[0]}") from error


def write_run(root: Path, description: dict[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    temporary = root / "run.json.tmp"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    temporary.replace(root / "run.json")
