"""How an upsampler's low-resolution input is made in training: shrunk, and corrupted since no sample is quite clean."""

from abc import ABC, abstractmethod
from math import cos, pi, sin
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from unclip_pl.errors import InputError
from unclip_pl.tasks.jpeg import jpeg


def shrink(image: Tensor, factor: int) -> Tensor:
    """Shrink images (B, 3, H, H) to (B, 3, H / factor, H / factor): antialiased bicubic, clamped to [-1, 1]."""
    size = (image.shape[-2] // factor, image.shape[-1] // factor)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


class Corruption(ABC):
    """Makes the low-resolution image that the upsampler is given in training.

    What is random comes from one seed per image, drawn for a whole batch. So every rank can draw the seeds of the
    global batch and use its own rows.
    """

    #: Seed of an image that is only shrunk.
    CLEAN = -1

    def seeds(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw one seed per image, (n,) int64 on the CPU, so that no decision waits for a device."""
        return torch.zeros(n, dtype=torch.long, device="cpu")

    @abstractmethod
    def degrade(self, image: Tensor, factor: int, seeds: Tensor) -> Tensor:
        """Corrupt images (B, 3, H, H) in [-1, 1] and shrink them to (B, 3, H / factor, H / factor) in [-1, 1].

        Args:
            image: the upsampler's targets.
            factor: side of a target over that of its low-resolution image.
            seeds: one seed per image, (B,), from :meth:`seeds`.
        """


class GaussianBlur(Corruption):
    """The 64 → 256 px upsampler's: shrunk, then a Gaussian of kernel 3, σ 0.6, as in SR3 (§2.1). Nothing is random.

    Args:
        kernel_size: side of the kernel in pixels of the low-resolution image, odd.
        sigma: standard deviation in the same pixels.
    """

    def __init__(self, kernel_size: int = 3, sigma: float = 0.6) -> None:
        self.kernel_size = kernel_size
        self.sigma = sigma

    def degrade(self, image: Tensor, factor: int, seeds: Tensor) -> Tensor:
        """Shrink and blur, see :meth:`Corruption.degrade`."""
        return TF.gaussian_blur(shrink(image, factor), [self.kernel_size] * 2, [self.sigma] * 2)


class Sometimes(Corruption):
    """Another corruption on some of the images; the rest are only shrunk.

    A network that has never seen a clean input takes a sample for a corrupted one, and undoes what was not done to it.
    Cascaded diffusion (Ho et al. 2021) blurs half of the images. The paper does not say how many unCLIP blurs.

    Args:
        corruption: what happens to the chosen images.
        probability: probability that an image is chosen.

    Raises:
        InputError: ``probability`` is not in [0, 1].
    """

    def __init__(self, corruption: Corruption, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"Expected 0 <= probability <= 1. Got {probability}: give the share of corrupted images.")
        self.corruption = corruption
        self.probability = probability

    def seeds(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Choose the images, and draw the other corruption's seeds for them."""
        seeds = torch.full((n,), self.CLEAN, dtype=torch.long, device="cpu")
        chosen = (torch.rand(n, generator=generator, device="cpu") < self.probability).nonzero()[:, 0]
        if len(chosen):
            seeds[chosen] = self.corruption.seeds(len(chosen), generator)
        return seeds

    def degrade(self, image: Tensor, factor: int, seeds: Tensor) -> Tensor:
        """Shrink all images and corrupt the chosen ones, see :meth:`Corruption.degrade`."""
        chosen = (seeds != self.CLEAN).nonzero()[:, 0]
        low, rows = shrink(image, factor), chosen.to(image.device)
        if not len(chosen):
            return low
        return low.index_copy(0, rows, self.corruption.degrade(image[rows], factor, seeds[chosen]))


class _Degradation:
    """One image's way down: decisions are Python numbers, pixels stay on their device.

    Args:
        random: source of every decision and of the noise's seed.
        image: one image, (1, 3, H, H) in [-1, 1].
        factor: side of the image over that of the result.
    """

    JPEG_QUALITY = (30, 95)
    NOISE = (2, 25)  # standard deviation in 8-bit levels
    BLURS = 2
    WIDTH = 1.0  # of the blurs
    RESIZE = 0.75  # probability that the downsampling is a plain resize

    def __init__(self, random: Random, image: Tensor, factor: int) -> None:
        self.random = random
        self.x = image.add(1).div(2)
        self.size = image.shape[-2] // factor, image.shape[-1] // factor
        self.factor = factor

    def run(self) -> Tensor:
        """Return the low-resolution image, (1, 3, H / factor, H / factor) in [-1, 1]."""
        if self.factor == 4 and self.random.random() < 0.25:
            self.resize(self.x.shape[-2] // 2, self.x.shape[-1] // 2)
            self.factor = 2
        order = [*[self.blur] * self.BLURS, self.downsample, self.finish, self.noise, self.maybe_jpeg]
        self.random.shuffle(order)
        first, second = sorted((order.index(self.downsample), order.index(self.finish)))
        order[first], order[second] = self.downsample, self.finish
        for step in order:
            step()
        self.jpeg()
        return self.x.mul(2).sub(1)

    def blur(self) -> None:
        """Blur by a Gaussian that is isotropic, or longer one way than the other."""
        random, size = self.random, 2 * self.random.randint(2, 11) + 3
        if random.random() < 0.5:
            spread = self.WIDTH * (4 + self.factor)
            angle, long, short = random.random() * pi, spread * random.random(), spread * random.random()
        else:
            angle, long = 0.0, (self.WIDTH * (2 + 0.2 * self.factor) * random.random()) ** 2
            short = long
        self.convolve(_gaussian(size, long, short, angle, self.x))

    def downsample(self) -> None:
        """Resize by up to twice the factor, or read a Gaussian about every block's centre."""
        if self.random.random() < self.RESIZE:
            scale = self.random.uniform(1, 2 * self.factor)
            self.resize(*(max(1, int(side / scale)) for side in self.x.shape[-2:]))
            return
        variance = self.random.uniform(0.1, 0.6 * self.factor) ** 2
        shift = (self.factor - 1) / 2
        self.convolve(_gaussian(25, variance, variance, 0.0, self.x, shift), stride=self.factor)

    def finish(self) -> None:
        """Resize to the final size."""
        self.resize(*self.size)

    def noise(self) -> None:
        """Add noise to each pixel: in colour, in grey, or correlated between the colours."""
        g = torch.Generator(self.x.device).manual_seed(self.random.getrandbits(62))
        kind, level = self.random.random(), self.random.randint(*self.NOISE) / 255
        normal = torch.randn(self.x.shape, generator=g, device=self.x.device)
        if kind < 0.4:
            normal = level * normal[:, :1]
        elif kind > 0.6:
            normal = level * normal
        else:  # covariance level² Qᵀ D Q at the highest level, Q a random rotation and D uniform
            cpu = torch.Generator().manual_seed(self.random.getrandbits(62))
            q = torch.linalg.qr(torch.randn(3, 3, generator=cpu)).Q
            mix = self.NOISE[1] / 255 * q.T * torch.rand(3, generator=cpu).sqrt()
            planes = normal.unbind(1)
            normal = torch.stack([sum(w * p for w, p in zip(row, planes, strict=True)) for row in mix.tolist()], dim=1)
        self.x = (self.x + normal).clamp(0, 1)

    def maybe_jpeg(self) -> None:
        """Compress nine times in ten."""
        if self.random.random() < 0.9:
            self.jpeg()

    def jpeg(self) -> None:
        """Compress at a random quality."""
        self.x = jpeg(self.x, self.random.randint(*self.JPEG_QUALITY))

    def resize(self, height: int, width: int) -> None:
        """Resize by one of OpenCV's three filters; all but area look at the nearest pixels only, also downwards."""
        mode = self.random.choice(("bilinear", "bicubic", "area"))
        self.x = F.interpolate(self.x, size=(height, width), mode=mode).clamp(0, 1)

    def convolve(self, kernel: Tensor, stride: int = 1) -> None:
        """Convolve every colour with a kernel (k, k), the border's pixels repeated outside."""
        x = F.pad(self.x, [kernel.shape[0] // 2] * 4, mode="replicate").transpose(0, 1)  # (3, 1, H, H)
        self.x = F.conv2d(x, kernel[None, None], stride=stride).transpose(0, 1).clamp(0, 1)


class _LightDegradation(_Degradation):
    JPEG_QUALITY = (80, 95)
    NOISE = (1, 2)
    BLURS = 1
    WIDTH = 0.25
    RESIZE = 0.8


class BSRDegradation(Corruption):
    """The 256 → 1024 px upsampler's: blurs, resizes, noise and JPEG in random order (BSRGAN, Zhang et al. 2021).

    Each image goes its own way. With probability 1/4 it is halved first, where the factor is 4. Then follow in random
    order two blurs, one downsampling of random strength with a resize to the final size anywhere behind it, Gaussian
    noise, and JPEG (probability 0.9). A last JPEG always comes. The numbers are those of BSRGAN's code for the paper's
    model. That code also has a model of camera noise, which latent diffusion leaves out too.
    """

    _way = _Degradation

    def seeds(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the first image's seed; the others' follow it."""
        return torch.randint(2**62, (), generator=generator, device="cpu") + torch.arange(n, device="cpu")

    def degrade(self, image: Tensor, factor: int, seeds: Tensor) -> Tensor:
        """Send each image its own way down, see :meth:`Corruption.degrade`."""
        rows = zip(seeds.tolist(), image[:, None], strict=True)
        return torch.cat([self._way(Random(seed), row, factor).run() for seed, row in rows])


class LightBSRDegradation(BSRDegradation):
    """The milder variant of the same code: one blur of a quarter of the width, hardly any noise, JPEG of high quality.

    Latent diffusion ships both. The paper does not say which one it uses.
    """

    _way = _LightDegradation


def _gaussian(size: int, long: float, short: float, angle: float, like: Tensor, shift: float = 0.0) -> Tensor:
    """Return a Gaussian kernel (size, size) of sum 1.

    Args:
        size: side of the kernel in pixels.
        long, short: variances along ``angle`` and across it.
        angle: direction of the long axis in radians.
        like: tensor whose device and dtype the kernel gets.
        shift: offset of the centre in pixels, the same in both directions.
    """
    offset = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2 - shift
    y, x = offset[:, None], offset
    along, across = x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle)
    exponent = along.square() / max(long, 1e-2) + across.square() / max(short, 1e-2)
    return (-0.5 * exponent).flatten().softmax(0).view(size, size)
