"""z_i → pixels: a trained decoder, and the upsamplers after it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM, Ancestral, Denoise, Inversion, Sampler, check_guidance
from unclip_pl.diffusion.process import noise_like
from unclip_pl.streams import Streams
from unclip_pl.tasks import DecoderTask, UpsamplerTask, load_task
from unclip_pl.types import TextFeatures

Progress = Callable[[int, int, Tensor], None]  # steps done, steps, the estimate of x0


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
        for task in (self.task, self.finisher):
            self.sampler.check(task.diffusion)
        return self

    def upsample(self, low: Tensor, *, generator: Streams | None = None) -> Tensor:
        """(B, 3, h, h) in [-1, 1] to ``factor`` times the side."""
        size = low.shape[-1] * self.task.factor
        x_T = noise_like(torch.empty(len(low), 3, size, size, device=low.device), generator=generator)
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
        precision: that the networks draw in; bf16-mixed is faster on a machine that multiplies in bfloat16.
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
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
    ) -> None:
        self.checkpoint = checkpoint
        self.image_size = image_size
        self.sampler = sampler or Ancestral(250, "learned")
        self.guidance = check_guidance(guidance)
        self.upsamplers = list(upsamplers)
        self.drop_embedding = drop_embedding
        self.precision = precision

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the checkpoints."""
        self.task = load_task(root / self.checkpoint, DecoderTask).to(device)
        self.sampler.check(self.task.diffusion, learns_variance=self.task.learns_variance)
        for upsampler in self.upsamplers:
            upsampler.load(root, device)
        self.needs_norm = self.task.space.scaling == "raw"
        return self

    @property
    def fingerprint(self) -> str:
        """Of the CLIP whose embeddings it was trained on."""
        return self.task.space.fingerprint

    #: Below this noise level an x0-predicting network's error swamps the noise that DDIM inversion asks it for.
    FLOOR = 0.05

    def inversion(self, steps: int) -> Inversion:
        """Of what it draws itself, before any upsampler: to the lowest level that its parameterisation bears."""
        diffusion = self.task.diffusion
        sigma_min = self.FLOOR if diffusion.prediction == "x0" else 0.0
        return Inversion(steps, sigma_min, diffusion.schedule, train_steps=diffusion.steps)

    def denoiser(self, image_embed: Tensor, guidance: float) -> Denoise:
        """``denoise(x_t, t)`` from embeddings (B, d) alone, without captions."""
        return self.task.denoiser(image_embed, self.null_text(len(image_embed)), check_guidance(guidance))

    def enlarge(self, image: Tensor, *, generator: Streams | None = None) -> Tensor:
        """(B, 3, h, h) through the upsamplers, where there are any, to pixels in [-1, 1]."""
        for upsampler in self.upsamplers:
            image = upsampler.upsample(image, generator=generator)
        return image.clamp(-1, 1)

    def null_text(self, n: int) -> TextFeatures:
        """n empty captions: decode from the embedding alone."""
        return self.task.space.null_text.repeat(n)

    @torch.no_grad()
    def decode(
        self,
        image_embed: Tensor,
        text: TextFeatures,
        *,
        guidance: float | None = None,
        generator: Streams | None = None,
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
        scale = self.guidance if guidance is None else check_guidance(guidance)
        x_T = noise_like(torch.empty(n, 3, self.image_size, self.image_size, device=device), generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            denoise = self.task.denoiser(image_embed, text, scale, drop_embedding=self.drop_embedding)
            image = self.sampler.sample(denoise, x_T, generator=generator, progress=progress)
            return self.enlarge(image, generator=generator)
