"""How an upsampler's low-resolution input is made in training: shrunk, and corrupted as no sample is quite clean."""

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
    """(B, 3, H, H) → (B, 3, H / factor, H / factor): antialiased bicubic, clamped to [-1, 1]."""
    size = (image.shape[-2] // factor, image.shape[-1] // factor)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


class Corruption(ABC):
    """From an image to the low-resolution one that the upsampler is given in training."""

    @abstractmethod
    def degrade(self, image: Tensor, factor: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, H) in [-1, 1] → (B, 3, H / factor, H / factor) in [-1, 1].

        Args:
            image: the target.
            factor: its side over that of the low-resolution image.
            generator: of all that is random, on the CPU so that no decision waits for a device.
        """


class GaussianBlur(Corruption):
    """The 64 → 256 px upsampler's: shrunk, then a Gaussian of kernel 3, σ 0.6, as in SR3 (§2.1).

    Args:
        kernel_size: odd, in pixels of the low-resolution image.
        sigma: in the same pixels.
    """

    def __init__(self, kernel_size: int = 3, sigma: float = 0.6) -> None:
        self.kernel_size = kernel_size
        self.sigma = sigma

    def degrade(self, image: Tensor, factor: int, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`Corruption.degrade`; nothing is random."""
        return TF.gaussian_blur(shrink(image, factor), [self.kernel_size] * 2, [self.sigma] * 2)


class Sometimes(Corruption):
    """Another corruption on some of the images; the rest are only shrunk.

    A network that has never seen a clean input takes a sample for a corrupted one, and undoes what was not done to it.
    Cascaded diffusion (Ho et al. 2021) blurs half of the images; how many unCLIP does, the paper does not say.

    Args:
        corruption: of the images that are drawn.
        probability: of each image to be one of them.

    Raises:
        ValueError: ``probability`` is not in [0, 1].
    """

    def __init__(self, corruption: Corruption, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"Expected 0 <= probability <= 1. Got {probability}.")
        self.corruption = corruption
        self.probability = probability

    def degrade(self, image: Tensor, factor: int, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`Corruption.degrade`."""
        drawn = torch.rand(len(image), generator=generator, device="cpu") < self.probability
        rows = drawn.nonzero()[:, 0].to(image.device)
        low = shrink(image, factor)
        return low.index_copy(0, rows, self.corruption.degrade(image[rows], factor, generator)) if len(rows) else low


class BSRDegradation(Corruption):
    """The 256 → 1024 px upsampler's: blurs, resizes, noise and JPEG in random order (BSRGAN, Zhang et al. 2021).

    Each image on its own: with probability 1/4 halved first where the factor is 4; then in random order two blurs, one
    downsampling of random strength with a resize to the final size anywhere behind it, Gaussian noise and JPEG
    (probability 0.9); a last JPEG always. The numbers are those of BSRGAN's code for the paper's model. It has a camera
    noise model beside them, which latent diffusion leaves out too.
    """

    def degrade(self, image: Tensor, factor: int, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`Corruption.degrade`."""
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        rows = [self._way(Random(seed + i), row, factor).run() for i, row in enumerate(image[:, None])]
        return torch.cat(rows)

    def _way(self, random: Random, image: Tensor, factor: int) -> "_Degradation":
        return _Degradation(random, image, factor)


class LightBSRDegradation(BSRDegradation):
    """The milder variant of the same code: one blur of a quarter of the width, hardly any noise, JPEG of high quality.

    Latent diffusion ships both. The paper does not say which it took.
    """

    def _way(self, random: Random, image: Tensor, factor: int) -> "_Degradation":
        return _LightDegradation(random, image, factor)


class _Degradation:
    """One image's way down: decisions are Python numbers, pixels stay on their device.

    Args:
        random: makes every decision, and seeds the noise.
        image: (1, 3, H, H) in [-1, 1].
        factor: of the whole way.
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
        """(1, 3, H / factor, H / factor) in [-1, 1]."""
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
        """Isotropic, or longer one way than the other."""
        random, size = self.random, 2 * self.random.randint(2, 11) + 3
        if random.random() < 0.5:
            spread = self.WIDTH * (4 + self.factor)
            angle, long, short = random.random() * pi, spread * random.random(), spread * random.random()
        else:
            angle, long = 0.0, (self.WIDTH * (2 + 0.2 * self.factor) * random.random()) ** 2
            short = long
        self.convolve(_gaussian(size, long, short, angle, self.x))

    def downsample(self) -> None:
        """A plain resize by up to twice the factor, or a Gaussian about every block's centre."""
        if self.random.random() < self.RESIZE:
            scale = self.random.uniform(1, 2 * self.factor)
            self.resize(*(max(1, int(side / scale)) for side in self.x.shape[-2:]))
            return
        variance = self.random.uniform(0.1, 0.6 * self.factor) ** 2
        shift = (self.factor - 1) / 2
        self.convolve(_gaussian(25, variance, variance, 0.0, self.x, shift), stride=self.factor)

    def finish(self) -> None:
        """To the final size, from whatever the downsampling left."""
        self.resize(*self.size)

    def noise(self) -> None:
        """Of each pixel: in colour, in grey, or correlated between the colours."""
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
        """Nine times in ten."""
        if self.random.random() < 0.9:
            self.jpeg()

    def jpeg(self) -> None:
        """At random quality."""
        self.x = jpeg(self.x, self.random.randint(*self.JPEG_QUALITY))

    def resize(self, height: int, width: int) -> None:
        """By one of OpenCV's three filters; all but area look at the nearest pixels only, also on the way down."""
        mode = self.random.choice(("bilinear", "bicubic", "area"))
        self.x = F.interpolate(self.x, size=(height, width), mode=mode).clamp(0, 1)

    def convolve(self, kernel: Tensor, stride: int = 1) -> None:
        """Every colour by (k, k), the border's pixels repeated outside."""
        x = F.pad(self.x, [kernel.shape[0] // 2] * 4, mode="replicate").transpose(0, 1)  # (3, 1, H, H)
        self.x = F.conv2d(x, kernel[None, None], stride=stride).transpose(0, 1).clamp(0, 1)


class _LightDegradation(_Degradation):
    JPEG_QUALITY = (80, 95)
    NOISE = (1, 2)
    BLURS = 1
    WIDTH = 0.25
    RESIZE = 0.8


def _gaussian(size: int, long: float, short: float, angle: float, like: Tensor, shift: float = 0.0) -> Tensor:
    """(size, size) kernel of sum 1: variances ``long`` and ``short`` along and across ``angle``, off by ``shift``."""
    offset = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2 - shift
    y, x = offset[:, None], offset
    along, across = x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle)
    exponent = along.square() / max(long, 1e-2) + across.square() / max(short, 1e-2)
    return (-0.5 * exponent).flatten().softmax(0).view(size, size)
