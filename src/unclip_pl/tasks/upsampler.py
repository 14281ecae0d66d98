"""The upsamplers: a low-resolution image in, four times its side out; unconditional otherwise (§2.1 of the paper)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from unclip_pl.diffusion import DDIM, Denoised, GaussianDiffusion, clip_x0
from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.diffusion.process import noise_like
from unclip_pl.diffusion.sampling import Denoise
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.tasks.base import Optimization, Task
from unclip_pl.types import UpsamplerBatch

Interpolation = Literal["bilinear", "bicubic"]


class GaussianBlur:
    """The 64 → 256 upsampler's corruption: kernel 3, σ 0.6, as in SR3 (§2.1).

    Args:
        kernel_size: odd, in pixels of the low-resolution image.
        sigma: in the same pixels.
    """

    def __init__(self, kernel_size: int = 3, sigma: float = 0.6) -> None:
        self.kernel_size = kernel_size
        self.sigma = sigma

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, h, h) → the same, blurred."""
        return TF.gaussian_blur(image, [self.kernel_size] * 2, [self.sigma] * 2)


class UpsamplerTask(Task):
    """Trains a U-Net without attention on [x_t, upsampled low-resolution image] (6 channels in, 3 out).

    Args:
        net: convolutions only, the low-resolution image beside x_t.
        factor: side of the image over side of the low-resolution image (paper: 4).
        corruption: of the low-resolution image, in training only.
        diffusion: None is the paper's: cosine, 1,000 steps, eps.
        interpolation: of the low-resolution image to the side of x_t: ``bilinear`` as in guided-diffusion, or
            ``bicubic``, antialiased (Karlo).
        optimization: of the network's weights.
    """

    batch_type = UpsamplerBatch
    net: UpsamplerUNet

    def __init__(
        self,
        net: UpsamplerUNet,
        factor: int = 4,
        corruption: GaussianBlur | None = None,
        diffusion: GaussianDiffusion | None = None,
        interpolation: Interpolation = "bilinear",
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.net = net
        self.factor = factor
        self.corruption = corruption or GaussianBlur()
        self.diffusion = diffusion or GaussianDiffusion()
        self.interpolation: Interpolation = interpolation

    def shrink(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) → (B, 3, H / factor, H / factor): antialiased bicubic, clamped."""
        size = (image.shape[-2] // self.factor, image.shape[-1] // self.factor)
        return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)

    def enlarge(self, low: Tensor, size: int) -> Tensor:
        """(B, 3, h, h) → (B, 3, size, size), what the network sees beside x_t."""
        antialias = self.interpolation == "bicubic"
        return F.interpolate(low, size=(size, size), mode=self.interpolation, antialias=antialias)

    def loss(self, batch: UpsamplerBatch, generator: torch.Generator | None = None) -> Tensor:
        """L_simple given the corrupted low-resolution image."""
        x0 = batch.image
        low = self.corruption(self.shrink(x0))
        t = self.share(lambda n: self.diffusion.draw_t(n, x0.device, generator), len(x0))
        eps = self.noise(x0, generator)
        x_t = self.diffusion.add_noise(x0, t, eps)
        out = self.net(torch.cat([x_t, self.enlarge(low, x0.shape[-1])], dim=1), self.diffusion.index(t), None)
        return simple_loss(out, self.diffusion.target(x0, eps, t)).mean()

    def denoiser(self, low: Tensor, size: int) -> Denoise:
        """``denoise(x_t, t)`` towards images of side ``size`` that shrink to ``low`` (B, 3, h, h), uncorrupted."""
        large = self.enlarge(low, size)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            out = self.net(torch.cat([x_t, large], dim=1), self.diffusion.index(t), None)
            return Denoised(self.diffusion.to_x0(out, x_t, t))

        return clip_x0(denoise)

    @torch.no_grad()
    def draw(self, batch: UpsamplerBatch, generator: torch.Generator | None = None) -> Tensor:
        """Images drawn again from their own small versions, for the sample grid: 27 DDIM steps."""
        x_T = noise_like(batch.image, generator=generator)
        sampler = DDIM(27, schedule=self.diffusion.schedule, train_steps=self.diffusion.steps)
        return sampler.sample(self.denoiser(self.shrink(batch.image), batch.image.shape[-1]), x_T)
