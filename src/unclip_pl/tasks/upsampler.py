"""Training of the upsamplers."""

import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM, GaussianDiffusion
from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.diffusion.process import noise_like
from unclip_pl.errors import InputError
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.parts.base import Optimization
from unclip_pl.parts.upsampler import Interpolation, UpsamplerPart
from unclip_pl.tasks.base import Task
from unclip_pl.tasks.corruption import Corruption, GaussianBlur, shrink
from unclip_pl.types import UpsamplerBatch


class UpsamplerTask(UpsamplerPart, Task):
    """Trains an upsampler on random crops: convolutions learn the same from them, and draw whole images afterwards.

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
        optimization: settings of the optimizer.

    Raises:
        InputError: ``crop`` is not in (0, 1].
    """

    batch_type = UpsamplerBatch
    edges = ("net.conv_in", "net.conv_out")

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
        super().__init__(net, factor, diffusion, interpolation, optimization)
        self.crop = crop
        self.corruption = corruption or GaussianBlur()

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

    @torch.no_grad()
    def draw(self, batch: UpsamplerBatch, generator: torch.Generator | None = None) -> Tensor:
        """Draw images again from their own small versions, for the sample grid: 27 DDIM steps."""
        x_T = noise_like(batch.image, generator=generator)
        denoise = self.denoiser(shrink(batch.image, self.factor), batch.image.shape[-1])
        return DDIM(27).sample(denoise, x_T, self.diffusion)
