"""The upsamplers: from a low-resolution image to one of four times its side, without other condition (§2.1)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import Denoise, Denoised, GaussianDiffusion, autoguided, clip_x0
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.parts.base import Optimization, Part

Interpolation = Literal["bilinear", "bicubic"]


class UpsamplerPart(Part):
    """A U-Net without attention on [x_t, upsampled low-resolution image] (6 channels in, 3 out).

    Args:
        net: U-Net of convolutions only, which sees the low-resolution image beside x_t.
        factor: side of the image over side of the low-resolution image (paper: 4).
        diffusion: forward process and parameterisation; None is the first upsampler's: cosine, 1,000 steps, eps. The
            second one's schedule is linear.
        interpolation: enlargement of the low-resolution image to the side of x_t: ``bilinear`` as in guided-diffusion,
            or ``bicubic``, antialiased (Karlo).
        optimization: settings of the optimizer.
    """

    net: UpsamplerUNet
    diffusion: GaussianDiffusion

    def __init__(
        self,
        net: UpsamplerUNet,
        factor: int = 4,
        diffusion: GaussianDiffusion | None = None,
        interpolation: Interpolation = "bilinear",
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(optimization)
        self.net = net
        self.factor = factor
        self.diffusion = diffusion or GaussianDiffusion()
        self.interpolation: Interpolation = interpolation

    def enlarge(self, low: Tensor, size: int) -> Tensor:
        """Enlarge (B, 3, h, h) to (B, 3, size, size), which the network sees beside x_t."""
        antialias = self.interpolation == "bicubic"
        return F.interpolate(low, size=(size, size), mode=self.interpolation, antialias=antialias)

    def estimate(self, x_t: Tensor, t: Tensor, large: Tensor) -> Tensor:
        """Return F(x_t, t); where F is x0 or holds it, the network adds what the enlarged image lacks of it.

        Most of x0 is in the enlarged image, and group norms would have to learn to let its colours through.
        """
        out: Tensor = self.net(torch.cat([x_t, large], dim=1), self.diffusion.index(t), None)
        match self.diffusion.prediction:
            case "x0":
                return out + large
            case "velocity":  # eps - x0
                return out - large
            case _:
                return out

    def denoiser(
        self, low: Tensor, size: int, guidance: float = 1.0, *, guide: "UpsamplerPart | None" = None
    ) -> Denoise:
        """Return ``denoise(x_t, t)`` towards images of side ``size`` that shrink to clean ``low`` (B, 3, h, h).

        Args:
            low: low-resolution images in [-1, 1].
            size: side of the images to draw.
            guidance: guidance scale; 1 is off.
            guide: weaker upsampler to be led away from; without one nothing is guided.
        """
        if guide is None or guidance == 1:
            return clip_x0(self._look(low, size))
        return clip_x0(autoguided(self._look(low, size), guide._look(low, size), guidance))

    def _look(self, low: Tensor, size: int) -> Denoise:
        large = self.enlarge(low, size)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            return Denoised(self.diffusion.to_x0(self.estimate(x_t, t, large), x_t, t))

        return denoise
