"""Caption → embedding → image: a trained run, put together."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.diffusion import DDIM, Ancestral, Sampler
from unclip_pl.nn.text import repeat_text
from unclip_pl.priors import Prior
from unclip_pl.tasks import DecoderTask, UpsamplerTask, load_task
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Tensor], None]


class Upsampler:
    """One stage of the way to larger pictures; each has a sampler of its own, since each has its own schedule.

    Args:
        checkpoint: of an ``UpsamplerTask``, relative to the run.
        sampler: None is the paper's for 64 → 256 px, 27 DDIM steps; its next stage takes 15 on a linear schedule.
        last_step: checkpoint of another ``UpsamplerTask`` that takes the last step (Karlo); None: the same takes all.
    """

    def __init__(self, checkpoint: str, sampler: Sampler | None = None, last_step: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.sampler = sampler or DDIM(27)
        self.last_step = last_step

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the checkpoints."""
        self.task = load_task(root / self.checkpoint, UpsamplerTask).to(device)
        self.finisher = load_task(root / self.last_step, UpsamplerTask).to(device) if self.last_step else self.task
        self.sampler.check(self.task.diffusion)
        return self

    def upsample(self, low: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, h, h) in [-1, 1] to ``factor`` times the side."""
        size = low.shape[-1] * self.task.factor
        x_T = torch.randn(len(low), 3, size, size, generator=generator).to(low.device)
        first, last = (task.denoiser(low, size) for task in (self.task, self.finisher))
        return self.sampler.sample(first, x_T, last=last, generator=generator)


class Decoder:
    """z_i (and caption) → pixels, through the upsamplers where there are any.

    Args:
        checkpoint: of a ``DecoderTask``, relative to the run.
        image_size: side that the decoder draws, in pixels (paper: 64).
        sampler: None is the paper's 250 strided steps, ancestral with the learned variance.
        guidance: scale; 1 is off.
        upsamplers: smallest first.
        drop_embedding: draws from the caption alone, z_i giving way to its null: what a prior is better than (§5.1).
    """

    #: Whether it was trained on raw embeddings, so that z_i must come with CLIP's own norm.
    needs_norm: bool = False

    def __init__(
        self,
        checkpoint: str,
        image_size: int = 64,
        sampler: Sampler | None = None,
        guidance: float = 2.0,
        upsamplers: Sequence[Upsampler] = (),
        drop_embedding: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.image_size = image_size
        self.sampler = sampler or Ancestral(250, "learned")
        self.guidance = guidance
        self.upsamplers = list(upsamplers)
        self.drop_embedding = drop_embedding

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the checkpoints."""
        self.task = load_task(root / self.checkpoint, DecoderTask).to(device)
        self.sampler.check(self.task.diffusion)
        for upsampler in self.upsamplers:
            upsampler.load(root, device)
        self.needs_norm = self.task.space.scaling == "raw"
        return self

    @property
    def fingerprint(self) -> str:
        """Of the CLIP whose embeddings it was trained on."""
        return self.task.space.fingerprint

    def null_text(self, n: int) -> TextFeatures:
        """n empty captions: decode from the embedding alone."""
        return repeat_text(self.task.space.null_text, n)

    @torch.no_grad()
    def decode(
        self,
        image_embed: Tensor,
        text: TextFeatures,
        *,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """(B, 3, H, H) in [-1, 1].

        Args:
            image_embed: (B, d) raw or unit-norm z_i.
            text: raw features of the captions, see :meth:`null_text`.
            guidance: for this call; None keeps the decoder's own.
            generator: of the starting noise and of stochastic samplers.
            progress: called after every step of the first stage.
        """
        device, n = image_embed.device, len(image_embed)
        scale = self.guidance if guidance is None else guidance
        denoise = self.task.denoiser(image_embed, text, scale, drop_embedding=self.drop_embedding)
        x_T = torch.randn(n, 3, self.image_size, self.image_size, generator=generator).to(device)
        image = self.sampler.sample(denoise, x_T, generator=generator, progress=progress)
        for upsampler in self.upsamplers:
            image = upsampler.upsample(image, generator=generator)
        return image.clamp(-1, 1)


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


class Unclip:
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
