"""The decoder: images from z_i, and from the caption beside it (§2.1 of the paper)."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.diffusion import (
    Denoise,
    Denoised,
    GaussianDiffusion,
    LogitNormalTime,
    StraightPath,
    autoguided,
    clip_x0,
    guided,
    within,
)
from unclip_pl.errors import InputError
from unclip_pl.nn.space import PIXEL_RMS, Scaling
from unclip_pl.nn.unet import Condition, UNet
from unclip_pl.parts.base import EmbeddingPart, Optimization, check_drop
from unclip_pl.types import TextFeatures


class EmbeddingNoise(NamedTuple):
    """Noise that is put on z_i before a picture is drawn of it."""

    level: float  # s of √(1 − s²)·z_i + s·ε
    eps: Tensor  # (B, d) standard normal


class DecoderPart(EmbeddingPart):
    """A :class:`~unclip_pl.nn.unet.UNet` of (image, z_i, caption); z_i and caption are dropped independently.

    A network with twice the image's channels learns its variance too (hybrid loss).

    Args:
        net: U-Net with the CLIP's ``embed_dim``.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_i: ``unit``, ``whiten`` (tiny decoders learn faster from it) or ``raw`` (Karlo).
        diffusion: forward process and parameterisation; None is the paper's: cosine, 1,000 steps, eps.
        image_drop: share of z_i replaced by the learned null (paper: 10 %). At 1 the decoder knows captions alone, like
            GLIDE: z_i never reaches it, neither in training nor in sampling.
        text_drop: share of captions replaced by the empty one (paper: 50 %).
        optimization: settings of the optimizer.
        image_noise: largest level s of the noise on z_i, √(1 − s²)·z_i + s·ε, with ε of the scaled embeddings' own RMS.
            In training each picture draws a level from 0 to s, and the network is told which (``image_levels``), as in
            Stable unCLIP: embeddings of a prior are less exact than true ones. 0, as in the paper, adds no noise.

    Raises:
        InputError: ``standardize``, which no known decoder was trained on; a learned variance at times between those
            that its bound knows; or noise on z_i of raw embeddings, or without a network that is told of it.
    """

    net: UNet
    diffusion: GaussianDiffusion

    def __init__(
        self,
        net: UNet,
        statistics: str = "",
        scaling: Scaling = "unit",
        diffusion: GaussianDiffusion | None = None,
        image_drop: float = 0.1,
        text_drop: float = 0.5,
        optimization: Optimization | None = None,
        image_noise: float = 0.0,
    ) -> None:
        if scaling == "standardize":
            raise InputError("Expected scaling 'unit', 'whiten' or 'raw' for a decoder. Got 'standardize': change it.")
        levels = getattr(net, "image_levels", False)
        if not 0 <= image_noise <= 1 or levels != (image_noise > 0) or (image_noise and scaling == "raw"):
            raise InputError(
                "Expected image_noise from 0 to 1, above 0 exactly if model.net.init_args.image_levels is true, and 0 "
                f"of raw embeddings. Got {image_noise}, image_levels {levels} and scaling {scaling!r}: change them."
            )
        super().__init__(statistics, scaling, text_drop, optimization)
        self.net = net
        self.diffusion = diffusion or GaussianDiffusion()
        self.image_drop = check_drop("image_drop", image_drop)
        self.image_noise = image_noise
        between = isinstance(self.diffusion.schedule, StraightPath)
        if (between or isinstance(self.diffusion.time_density, LogitNormalTime)) and self.learns_variance:
            raise InputError(
                "Expected a decoder of fixed variance on a straight path and at logit-normal times, since the bound of "
                "a learned one knows whole steps alone. Got 6 output channels: set model.net.out_channels to 3."
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network predicts its variance beside the mean."""
        return self.net.out_channels == 6

    def noised(self, z_i: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        """Put noise on scaled embeddings, (B, d), which keep their mean square.

        Args:
            z_i: (B, d) scaled embeddings.
            level: (B,) levels s in [0, 1].
            eps: (B, d) standard normal noise.
        """
        s = level[:, None]
        return (1 - s.square()).sqrt() * z_i + s * eps * (PIXEL_RMS if self.space.scaling == "unit" else 1.0)

    def condition(self, z_i: Tensor, text: TextFeatures, keep: Tensor, level: Tensor | None) -> Condition:
        """Encode what the network is told of (B, d) scaled embeddings and scaled captions.

        Args:
            z_i: (B, d) scaled embeddings, with their noise.
            text: captions, scaled.
            keep: (B,) booleans; a z_i that is not kept is replaced by the learned null.
            level: (B,) levels of the noise, for a network that is told of it.
        """
        return self.net.encode_condition(z_i, text, keep, *([level] if self.image_noise else []))

    def denoiser(
        self,
        image_embed: Tensor,
        text: TextFeatures,
        guidance: float,
        *,
        interval: tuple[float, float] | None = None,
        guide: "DecoderPart | None" = None,
        drop_embedding: bool = False,
        noise: EmbeddingNoise | None = None,
    ) -> Denoise:
        """Return ``denoise(x_t, t)`` for a sampler, with x0 clipped to [-1, 1]; the condition is encoded once.

        Args:
            image_embed: (B, d) raw z_i.
            text: raw features of B captions; the empty caption where there is none.
            guidance: guidance scale; 1 is off.
            interval: lowest and highest noise level σ/α with guidance; None is all levels.
            guide: weaker decoder to be led away from, under the same condition; None leads away from the same decoder
                without z_i and caption (as in Karlo).
            drop_embedding: replace z_i by its null, so that the caption alone decides (§5.1).
            noise: noise to put on z_i, for a network that is told of it; None puts none.
        """
        alone = partial(self._look, image_embed, text, drop_embedding=drop_embedding, noise=noise)
        if guidance == 1:
            return clip_x0(alone())
        if guide is None:
            strong = guided(alone(unconditional=True), guidance)
        else:
            weak = guide._look(image_embed, text, drop_embedding=drop_embedding, noise=noise)
            strong = autoguided(alone(), weak, guidance)
        return clip_x0(strong if interval is None else within(interval, self.diffusion.schedule, strong, alone()))

    def _look(
        self,
        image_embed: Tensor,
        text: TextFeatures,
        *,
        drop_embedding: bool,
        noise: EmbeddingNoise | None,
        unconditional: bool = False,
    ) -> Denoise:
        """Return the network's ``denoise(x_t, t)``, unclipped; 2B samples, the last B unconditional, if asked for."""
        n = len(image_embed)
        z_i, text = self.space.scale(image_embed), self.space.scale_text(text)
        keep = torch.full((n,), self.image_drop < 1 and not drop_embedding, device=z_i.device)
        level = torch.zeros(n, device=z_i.device)
        if noise is not None and self.image_noise:
            level = level + noise.level
            z_i = self.noised(z_i, level, noise.eps)
        if unconditional:
            null = self.space.scale_text(self.space.null_text).repeat(n)
            z_i, text = torch.cat([z_i, z_i]), TextFeatures.cat([text, null])
            keep, level = torch.cat([keep, torch.zeros_like(keep)]), level.repeat(2)
        condition = self.condition(z_i, text, keep, level)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            # In x_t's precision: guidance would enlarge bfloat16's steps.
            out = self.net(x_t, self.diffusion.index(t), condition).to(x_t.dtype)
            if out.shape[1] == x_t.shape[1]:
                return Denoised(self.diffusion.to_x0(out, x_t, t))
            F, frac_raw = out.chunk(2, dim=1)
            return Denoised(self.diffusion.to_x0(F, x_t, t), (frac_raw + 1) / 2)

        return denoise
