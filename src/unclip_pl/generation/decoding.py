"""From z_i to pixels: a trained decoder, and the upsamplers after it.

A spec is what a config names, without touching a file. ``spec.load(root)`` reads the weights.
"""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import (
    DDIM,
    Ancestral,
    Denoise,
    Inpaint,
    Inversion,
    Progress,
    Sampler,
    check_guidance,
    check_interval,
    same_levels,
)
from unclip_pl.diffusion.process import noise_like
from unclip_pl.errors import InputError
from unclip_pl.generation.guide import GuideSpec
from unclip_pl.parts import DecoderPart, UpsamplerPart, load_part
from unclip_pl.parts.decoder import EmbeddingNoise
from unclip_pl.streams import Streams
from unclip_pl.types import TextFeatures


def resize(images: Tensor, size: int) -> Tensor:
    """Resize (B, 3, side, side) in [-1, 1] to another side, antialiased bicubic.

    Raises:
        InputError: the pictures are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise InputError(f"Expected square pictures. Got {width} × {height}: give square ones.")
    if width == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


class Canvas(NamedTuple):
    """Pictures of which a part is drawn again. The rest stays as it is, at every size of a cascade."""

    images: Tensor  # (B, 3, S, S) in [-1, 1], S the side after all upsamplers
    mask: Tensor  # (B, 1, S, S) bool, True where pixels are drawn
    jumps: int  # of the decoder's steps, see Inpaint

    def rows(self, index: slice) -> "Canvas":
        """Return some of the pictures."""
        return self._replace(images=self.images[index], mask=self.mask[index])

    def around(self, sampler: Sampler, size: int, jumps: int = 0) -> Sampler:
        """Return a solver that draws the open part at a side of ``size`` pixels.

        A pixel of a smaller picture is drawn where any of those that it stands for is.
        """
        mask = F.adaptive_max_pool2d(self.mask.float(), size) > 0
        return Inpaint(sampler, resize(self.images, size), mask, jumps)


@dataclass(frozen=True)
class UpsamplerSpec(ABC):  # an ABC, or jsonargparse would take no class_path and no subclass
    """One stage of the way to larger pictures. Each has a sampler of its own, since each has a schedule of its own.

    Args:
        checkpoint: file of an ``UpsamplerTask``, relative to the run.
        sampler: solver and number of steps; None is the paper's for 64 → 256 px, 27 DDIM steps. The paper's next stage
            takes 15 on a linear schedule.
        last_step: file of another ``UpsamplerTask`` that takes the last step (Karlo); None: the same takes all.
        guidance: guidance scale away from the guide; 1 is off.
        guide: weaker upsampler (autoguidance); it does not guide the last step of another network.

    Raises:
        InputError: guidance without a guide, a guide without guidance, or a negative scale.
    """

    checkpoint: str
    sampler: Sampler | None = None
    last_step: str | None = None
    guidance: float = 1.0
    guide: GuideSpec | None = None

    def __post_init__(self) -> None:
        if (check_guidance(self.guidance) != 1) != (self.guide is not None):
            raise InputError(
                "Expected an upsampler's guidance and guide together, since it has no condition to drop. Got guidance "
                f"{self.guidance:g} with{'' if self.guide else 'out'} a guide: give both, or leave both out."
            )

    def load(self, root: Path, device: str = "cpu") -> "Upsampler":
        """Read the checkpoints, which are named relative to ``root``, onto a device."""
        part = load_part(root / self.checkpoint, UpsamplerPart).to(device)
        last = load_part(root / self.last_step, UpsamplerPart).to(device) if self.last_step else part
        guide = self.guide.load(root, device, part) if self.guide else None
        return Upsampler(self, part, last, guide)


class Upsampler:
    """A trained upsampler, and the network that takes its last step, usually the same."""

    def __init__(
        self,
        spec: UpsamplerSpec,
        part: UpsamplerPart,
        finisher: UpsamplerPart,
        guide: UpsamplerPart | None = None,
    ) -> None:
        self.spec = spec
        self.sampler = spec.sampler or DDIM(27)
        self.part = part
        self.finisher = finisher
        self.guide = guide
        if not same_levels(part.diffusion, finisher.diffusion):
            raise InputError(
                f"Expected last_step {spec.last_step} to be trained on the noise levels of {spec.checkpoint}. Got "
                "another schedule or number of training steps: name an upsampler of the same diffusion."
            )
        self.sampler.check(part.diffusion)

    def upsample(self, low: Tensor, *, generator: Streams | None = None, canvas: Canvas | None = None) -> Tensor:
        """Enlarge pictures (B, 3, h, h) in [-1, 1] to ``factor`` times the side, around what a canvas holds."""
        size = low.shape[-1] * self.part.factor
        x_T = noise_like(torch.empty(len(low), 3, size, size, device=low.device), generator=generator)
        first = self.part.denoiser(low, size, self.spec.guidance, guide=self.guide)
        last = first if self.finisher is self.part else self.finisher.denoiser(low, size)
        sampler = self.sampler if canvas is None else canvas.around(self.sampler, size)
        return sampler.sample(first, x_T, self.part.diffusion, last=last, generator=generator)


@dataclass(frozen=True)
class DecoderSpec(ABC):  # see UpsamplerSpec
    """Draws pixels from z_i (and a caption), through the upsamplers if there are any.

    Args:
        checkpoint: file of a ``DecoderTask``, relative to the run.
        image_size: side that the decoder draws, in pixels (paper: 64).
        sampler: solver and number of steps; None is the paper's 250 strided ancestral steps with the learned variance.
        guidance: guidance scale; 1 is off.
        guidance_interval: lowest and highest noise level σ/α at which there is guidance, such as [0.2, 3]; elsewhere
            the network is asked once (Kynkäänniemi et al. 2024). None is all levels.
        guide: weaker decoder that guidance leads away from (autoguidance, Karras et al. 2024); None leads away from the
            decoder without z_i and caption.
        upsamplers: stages after the decoder, smallest first.
        drop_embedding: draw from the caption alone, with z_i replaced by its null (§5.1).
        drop_text: draw from z_i alone, with the caption replaced by the empty one.
        precision: number format that the networks draw in; bf16-mixed is faster on machines that multiply in bfloat16.
        noise_level: level of the noise that is put on z_i, from 0 to the decoder's ``image_noise`` in training (Stable
            unCLIP). Manipulations of pictures, whose noise is found by inversion, put none.
    """

    checkpoint: str
    image_size: int = 64
    sampler: Sampler | None = None
    guidance: float = 2.0
    guidance_interval: tuple[float, float] | None = None
    guide: GuideSpec | None = None
    upsamplers: tuple[UpsamplerSpec, ...] = ()
    drop_embedding: bool = False
    drop_text: bool = False
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        check_guidance(self.guidance)
        check_interval(self.guidance_interval)
        if self.drop_embedding and self.drop_text:
            raise InputError("Expected z_i or a caption to draw from. Got drop_embedding and drop_text: leave one out.")

    def load(self, root: Path, device: str = "cpu") -> "Decoder":
        """Read the checkpoints, which are named relative to ``root``, onto a device."""
        part = load_part(root / self.checkpoint, DecoderPart).to(device)
        guide = self.guide.load(root, device, part) if self.guide else None
        return Decoder(self, part, [upsampler.load(root, device) for upsampler in self.upsamplers], guide)


class Decoder:
    """A trained decoder with its upsamplers."""

    #: Below this noise level an x0-predicting network's error swamps the noise that DDIM inversion asks it for.
    FLOOR = 0.05

    def __init__(
        self,
        spec: DecoderSpec,
        part: DecoderPart,
        upsamplers: Sequence[Upsampler] = (),
        guide: DecoderPart | None = None,
    ) -> None:
        self.spec = spec
        self.image_size = spec.image_size
        self.sampler = spec.sampler or Ancestral(250, "learned")
        self.part = part
        self.upsamplers = list(upsamplers)
        self.guide = guide
        self.check(self.sampler)
        if not 0 <= spec.noise_level <= part.image_noise:
            raise InputError(
                f"Expected a noise_level from 0 to {part.image_noise:g}, the image_noise of {spec.checkpoint}. Got "
                f"{spec.noise_level:g}: change it, or train a decoder with more."
            )
        if guide is not None and guide.image_noise < spec.noise_level:
            raise InputError(
                f"Expected a guide that was trained with noise on z_i up to {spec.noise_level:g}, the noise_level. Got "
                f"an image_noise of {guide.image_noise:g}: lower the level, or train the guide with more."
            )

    def check(self, sampler: Sampler) -> Sampler:
        """Return a solver if this decoder can be drawn from with it.

        Raises:
            InputError: it asks for what the network was not trained for.
        """
        sampler.check(self.part.diffusion, learns_variance=self.part.learns_variance)
        return sampler

    @property
    def needs_norm(self) -> bool:
        """Whether it was trained on raw embeddings, so that z_i must come with CLIP's own norm."""
        return self.part.space.scaling == "raw"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the CLIP whose embeddings it was trained on."""
        return self.part.space.fingerprint

    def inversion(self, steps: int) -> Inversion:
        """Return the DDIM inversion of its own pictures, down to the lowest noise that its parameterisation bears."""
        return Inversion(steps, self.FLOOR if self.part.diffusion.prediction == "x0" else 0.0)

    def denoiser(
        self,
        image_embed: Tensor,
        guidance: float,
        text: TextFeatures | None = None,
        noise: EmbeddingNoise | None = None,
    ) -> Denoise:
        """Return ``denoise(x_t, t)`` under embeddings (B, d), with or without noise, and captions; None for none."""
        return self.part.denoiser(
            image_embed,
            self.null_text(len(image_embed)) if text is None or self.spec.drop_text else text,
            check_guidance(guidance),
            interval=self.spec.guidance_interval,
            guide=self.guide,
            drop_embedding=self.spec.drop_embedding and text is not None,  # or nothing would be left
            noise=noise,
        )

    @property
    def output_size(self) -> int:
        """Side of its pictures after all upsamplers, in pixels."""
        return self.image_size * math.prod(upsampler.part.factor for upsampler in self.upsamplers)

    def enlarge(self, image: Tensor, *, generator: Streams | None = None, canvas: Canvas | None = None) -> Tensor:
        """Send pictures (B, 3, h, h) through the upsamplers, if there are any, and clamp them to [-1, 1].

        Raises:
            InputError: a picture is not finite.
        """
        for upsampler in self.upsamplers:
            image = upsampler.upsample(image, generator=generator, canvas=canvas)
        if not image.isfinite().all():
            raise InputError(
                f"Expected pictures of finite numbers. Got NaN or infinity from the decoder {self.spec.checkpoint} or "
                "what stands before it: train that part again, or sample in precision 32-true."
            )
        return image.clamp(-1, 1)

    def null_text(self, n: int) -> TextFeatures:
        """Return n empty captions, for drawing from the embedding alone."""
        return self.part.space.null_text.repeat(n)

    @torch.no_grad()
    def decode(
        self,
        image_embed: Tensor,
        text: TextFeatures,
        *,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        canvas: Canvas | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw pictures (B, 3, H, H) in [-1, 1].

        Args:
            image_embed: (B, d) z_i, raw or of unit norm.
            text: raw features of the captions, see :meth:`null_text`.
            guidance: scale for this call; None keeps the spec's.
            sampler: solver for this call; None keeps the spec's.
            canvas: pictures of which a part is kept; None keeps nothing.
            generator: source of the starting noise and of the noise of stochastic samplers.
            progress: function that is called after every step of the first stage.

        Raises:
            InputError: the guidance is negative, or the network was not trained for that solver.
        """
        device, n = image_embed.device, len(image_embed)
        scale = self.spec.guidance if guidance is None else guidance
        x_T = noise_like(torch.empty(n, 3, self.image_size, self.image_size, device=device), generator=generator)
        level, noise = self.spec.noise_level, None
        if level:
            noise = EmbeddingNoise(level, noise_like(image_embed.float(), generator=generator))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.spec.precision == "bf16-mixed"):
            denoise = self.denoiser(image_embed, scale, text, noise)
            solver = self.sampler if sampler is None else self.check(sampler)
            if canvas is not None:
                solver = canvas.around(solver, self.image_size, canvas.jumps)
            image = solver.sample(denoise, x_T, self.part.diffusion, generator=generator, progress=progress)
            return self.enlarge(image, generator=generator, canvas=canvas)
