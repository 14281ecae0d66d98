"""The upsamplers: from a low-resolution image to one of four times its side, without other condition (§2.1)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import DDIM, Denoise, Denoised, GaussianDiffusion, autoguided, clip_x0
from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.diffusion.process import noise_like
from unclip_pl.errors import InputError
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.tasks.base import Optimization, Task
from unclip_pl.tasks.corruption import Corruption, GaussianBlur, shrink
from unclip_pl.types import UpsamplerBatch

Interpolation = Literal["bilinear", "bicubic"]


class UpsamplerTask(Task):
    """Trains a U-Net without attention on [x_t, upsampled low-resolution image] (6 channels in, 3 out).

    On random crops: convolutions learn the same from them, and draw whole images afterwards.

    Args:
        net: U-Net of convolutions only, which sees the low-resolution image beside x_t.
        factor: side of the image over side of the low-resolution image (paper: 4).
        crop: side of a training crop over that of the image (paper: a quarter). Validation sees whole images.
        corruption: what is done to the low-resolution image in the loss and not in sampling; None is the first
            upsampler's Gaussian blur, the second one's is :class:`~unclip_pl.tasks.corruption.BSRDegradation`.
        diffusion: forward process and parameterisation; None is the first upsampler's: cosine, 1,000 steps, eps. The
            second one's schedule is linear.
        interpolation: enlargement of the low-resolution image to the side of x_t: ``bilinear`` as in guided-diffusion,
            or ``bicubic``, antialiased (Karlo).
        optimization: settings of AdamW.

    Raises:
        InputError: ``crop`` is not in (0, 1].
    """

    batch_type = UpsamplerBatch
    edges = ("net.conv_in", "net.conv_out")
    net: UpsamplerUNet
    diffusion: GaussianDiffusion

    def __init__(
        self,
        net: UpsamplerUNet,
        factor: int = 4,
        crop: float = 0.25,
        corruption: Corruption | None = None,
        diffusion: GaussianDiffusion | None = None,
        interpolation: Interpolation = "bilinear",
        optimization: Optimization | None = None,
    ) -> None:
        if not 0 < crop <= 1:
            raise InputError(f"Expected 0 < crop <= 1, a share of the image's side. Got {crop}: change it.")
        super().__init__(optimization)
        self.save_hyperparameters()
        self.net = net
        self.factor = factor
        self.crop = crop
        self.corruption = corruption or GaussianBlur()
        self.diffusion = diffusion or GaussianDiffusion()
        self.interpolation: Interpolation = interpolation

    def training_step(self, batch: UpsamplerBatch, batch_idx: int) -> Tensor:
        """Return the loss on a crop of every image."""
        return super().training_step(UpsamplerBatch(self.random_crop(batch.image)), batch_idx)

    def random_crop(self, image: Tensor) -> Tensor:
        """Cut (B, 3, crop · H, crop · H) out of (B, 3, H, H), each at its own place.

        Raises:
            InputError: the network's stride or the factor does not divide the side of the crops.
        """
        side, room = int(self.crop * image.shape[-1]), image.shape[-1] - int(self.crop * image.shape[-1])
        if side % self.factor or side % self.net.stride:
            raise InputError(
                f"Expected crops whose side is a multiple of factor = {self.factor} and of the network's stride = "
                f"{self.net.stride}. Got {side} px, {self.crop} of {image.shape[-1]}: change model.crop."
            )
        # Drawn on the CPU: no device is waited for.
        places = self.share(lambda n: torch.randint(room + 1, (n, 2)), len(image)).tolist()
        return torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(image, places, strict=True)])

    def enlarge(self, low: Tensor, size: int) -> Tensor:
        """Enlarge (B, 3, h, h) to (B, 3, size, size), which the network sees beside x_t."""
        antialias = self.interpolation == "bicubic"
        return F.interpolate(low, size=(size, size), mode=self.interpolation, antialias=antialias)

    def loss(self, batch: UpsamplerBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return L_simple given the corrupted low-resolution image."""
        x0 = batch.image
        seeds = self.share(lambda n: self.corruption.seeds(n, generator), len(x0))
        with torch.autocast(x0.device.type, enabled=False):  # bfloat16 cannot tell the levels of an 8-bit image apart
            low = self.corruption.degrade(x0, self.factor, seeds)
        t = self.share(lambda n: self.diffusion.draw_t(n, x0.device, generator), len(x0))
        eps = self.noise(x0, generator)
        x_t = self.diffusion.add_noise(x0, t, eps)
        out = self.estimate(x_t, t, self.enlarge(low, x0.shape[-1]))
        return simple_loss(out, self.diffusion.target(x0, eps, t)).mean()

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
        self, low: Tensor, size: int, guidance: float = 1.0, *, guide: "UpsamplerTask | None" = None
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

    @torch.no_grad()
    def draw(self, batch: UpsamplerBatch, generator: torch.Generator | None = None) -> Tensor:
        """Draw images again from their own small versions, for the sample grid: 27 DDIM steps."""
        x_T = noise_like(batch.image, generator=generator)
        denoise = self.denoiser(shrink(batch.image, self.factor), batch.image.shape[-1])
        return DDIM(27).sample(denoise, x_T, self.diffusion)
