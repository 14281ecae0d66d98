"""What the bipartite latent (z_i, x_T) of a picture is good for: §3 of the paper, and the probe of its §4.

Every picture here is drawn from embeddings alone, without captions, so that what CLIP sees is the only condition.

Legend: B pictures, H side that the decoder draws, S side after its upsamplers, d CLIP embedding dimension.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import Progress, Sampler
from unclip_pl.errors import InputError
from unclip_pl.generation.decoding import resize
from unclip_pl.generation.pipeline import Unclip, streams
from unclip_pl.types import TextFeatures

#: Fraction of the angle within which the noise that the network cannot explain fades out: up to there it is still the
#: picture's own, beyond it is speckle on another picture.
FADE = 0.25


class Latent(NamedTuple):
    """Pictures as the decoder can draw them again: what CLIP sees of them, and the rest."""

    image_embed: Tensor  # (B, d) z_i, raw
    x_T: Tensor  # (B, 3, H, H) by DDIM inversion
    steps: int  # of the inversion; the way back uses the same grid
    guidance: float  # of the inversion; the way back uses the same scale

    def repeat(self, n: int) -> "Latent":
        """Return each picture n times in a row."""
        z_i, x_T = (x.repeat_interleave(n, dim=0) for x in (self.image_embed, self.x_T))
        return self._replace(image_embed=z_i, x_T=x_T)

    def at(self, rows: slice) -> "Latent":
        """Return some of the pictures."""
        return self._replace(image_embed=self.image_embed[rows], x_T=self.x_T[rows])


class Reconstruction(NamedTuple):
    """Pictures, drawn again from their latents."""

    images: Tensor  # (B, 3, S, S) in [-1, 1]
    latent: Latent
    psnr: Tensor  # (B,) dB, at the decoder's own size


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of pictures (B, 3, H, H) in [-1, 1]: (B,) dB."""
    return 10 * torch.log10(4 / (images - truth).square().mean(dim=(1, 2, 3)))


def slerp(a: Tensor, b: Tensor, theta: Tensor) -> Tensor:
    """Interpolate on the sphere, each sample flattened to one vector. Where the angle vanishes the line takes over.

    Args:
        a: (B, ...) result at theta 0, of any norm; the norm is interpolated too.
        b: (B, ...) result at theta 1.
        theta: (B,) fractions of the angle between a and b.
    """
    u, v = (F.normalize(x.flatten(1).double(), dim=1) for x in (a, b))
    omega = torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1)) * 2  # acos loses half its digits at small angles
    theta = theta.to(omega)
    sin = omega.sin()
    flat = sin < 1e-6
    weight_a = torch.where(flat, 1 - theta, ((1 - theta) * omega).sin() / sin)
    weight_b = torch.where(flat, theta, (theta * omega).sin() / sin)
    shape = (-1,) + (1,) * (a.ndim - 1)
    return weight_a.to(a.dtype).view(shape) * a + weight_b.to(b.dtype).view(shape) * b


def turn(z_i: Tensor, direction: Tensor, theta: Tensor) -> Tensor:
    """Turn embeddings (B, d) by fractions theta (B,) of the angle to directions (B, d); the norm changes linearly."""
    norm, other = z_i.norm(dim=-1), direction.norm(dim=-1)
    unit = slerp(F.normalize(z_i, dim=-1), F.normalize(direction, dim=-1), theta)
    return unit * norm.lerp(other, theta.to(norm))[:, None]


def mix_captions(text: TextFeatures, theta: Tensor) -> TextFeatures:
    """Return what lies between two captions.

    Args:
        text: raw features of the two.
        theta: (N,) fractions of the way; at 0 and 1 the captions themselves come out.

    Returns:
        N captions. A token of one caption alone keeps its direction and fades. Token ids are the nearer caption's.
    """
    n, length = len(theta), text.mask.shape[1]
    a, b = (text.rows(torch.full((n,), end, device=theta.device)) for end in (0, 1))
    first, second = (
        torch.where(own.mask[..., None], own.states, other.states).flatten(0, 1) for own, other in ((a, b), (b, a))
    )
    way = turn(F.normalize(first, dim=-1), F.normalize(second, dim=-1), theta.repeat_interleave(length))
    before, after = (part.states.norm(dim=-1) * part.mask for part in (a, b))
    states = way.unflatten(0, (n, length)) * before.lerp(after, theta[:, None])[..., None]
    mask = (a.mask & (theta < 1)[:, None]) | (b.mask & (theta > 0)[:, None])
    tokens = torch.where((theta < 0.5)[:, None], a.tokens, b.tokens)
    return TextFeatures(tokens, states, mask, turn(a.embed, b.embed, theta))


class Manipulator:
    """Inverts pictures and draws them changed. Every ``progress`` is called after each step of the solver.

    Args:
        unclip: trained run, of which CLIP and the decoder are used.
    """

    def __init__(self, unclip: Unclip) -> None:
        self.unclip = unclip
        self.clip = unclip.clip
        self.decoder = unclip.decoder
        self.device = unclip.device

    def invert(
        self, images: Tensor, *, steps: int = 100, guidance: float = 1.0, progress: Progress | None = None
    ) -> Latent:
        """Find the latents of pictures: z_i from CLIP, x_T by DDIM inversion under z_i.

        Args:
            images: (B, 3, side, side) in [-1, 1], of any side; CLIP and decoder see them at their own sizes.
            steps: steps of DDIM's grid; with fewer steps pictures come back less exactly.
            guidance: guidance scale of the decoder; above 1 pictures come back less exactly.
        """
        images = images.to(self.device)
        z_i = self.clip.encode_image(images)
        x0 = resize(images, self.decoder.image_size)
        denoise = self.decoder.denoiser(z_i, guidance)
        x_T = self.decoder.inversion(steps).invert(denoise, x0, self.decoder.part.diffusion, progress=progress)
        return Latent(z_i, x_T, steps, guidance)

    def restore(
        self,
        latent: Latent,
        *,
        eta: float = 0.0,
        own: float | Tensor = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw latents, (B, 3, S, S).

        Args:
            latent: latents of B pictures, which may have been changed.
            eta: DDIM's eta, 0 to 1.
            own: share of x_T that belongs to the picture, see :meth:`~unclip_pl.diffusion.inversion.Inversion.restore`.
            seed: seed of the noise that eta > 0 draws, and of the upsamplers.
        """
        generator = torch.Generator().manual_seed(seed)
        return self.decoder.enlarge(self._draw(latent, eta, own, generator, progress), generator=generator)

    def reconstruct(
        self,
        images: Tensor,
        *,
        steps: int = 100,
        guidance: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Reconstruction:
        """Invert pictures and draw them again, and say how exactly.

        Args:
            images: (B, 3, side, side) in [-1, 1].
            steps: steps of DDIM's grid, each way.
            guidance: guidance scale of the decoder, both ways.
            seed: seed of the upsamplers.
        """
        latent = self.invert(images, steps=steps, guidance=guidance, progress=progress)
        generator = torch.Generator().manual_seed(seed)
        drawn = self._draw(latent, 0.0, 1.0, generator, progress)
        quality = psnr(drawn.clamp(-1, 1), resize(images.to(self.device), self.decoder.image_size))
        return Reconstruction(self.decoder.enlarge(drawn, generator=generator), latent, quality)

    def vary(
        self, latent: Latent, *, num: int = 4, eta: float = 0.5, seed: int = 0, progress: Progress | None = None
    ) -> Tensor:
        """Draw variations (§3.1), (B · num, 3, S, S), one picture after the other.

        Args:
            latent: result of :meth:`invert`.
            num: variations of each picture.
            eta: 0 gives the picture back; as it grows to 1, what z_i holds stays and the rest changes.
            seed: seed of all noise; the same seed gives the same variations.

        Raises:
            InputError: eta is out of range, or num < 1.
        """
        if num < 1:
            raise InputError(f"Expected num >= 1. Got {num}: ask for one variation or more.")
        return self.restore(latent.repeat(num), eta=eta, seed=seed, progress=progress)

    def interpolate(
        self,
        first: Latent,
        second: Latent,
        *,
        num: int = 9,
        noise: Literal["inverted", "fixed"] = "inverted",
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw what lies between pictures (§3.2), by slerp of z_i: (B · num, 3, S, S), one pair after the other.

        Args:
            first: latents of B pictures, results of :meth:`invert`.
            second: latents of B pictures, inverted with the same steps and guidance.
            num: pictures of each pair, both ends included.
            noise: ``inverted``: x_T is interpolated too, and the ends are the pictures. ``fixed``: one drawn x_T all
                along, as in the paper's Fig. 4; the ends are other drawings of what CLIP sees in the pictures.
            seed: seed of the fixed x_T.

        Raises:
            InputError: num < 2, or latents that do not fit together.
        """
        if num < 2 or len(first.x_T) != len(second.x_T):
            raise InputError(
                f"Expected at least 2 pictures between as many firsts as seconds. Got {num} between "
                f"{len(first.x_T)} and {len(second.x_T)}: give latents in pairs."
            )
        if first[2:] != second[2:]:  # the way back is the way there of both
            raise InputError(
                f"Expected latents of the same steps and guidance. Got {first.steps} steps at guidance "
                f"{first.guidance:g} and {second.steps} at {second.guidance:g}: invert both pictures alike."
            )
        theta = torch.linspace(0, 1, num, device=self.device).repeat(len(first.x_T))
        a, b = first.repeat(num), second.repeat(num)
        z = turn(a.image_embed, b.image_embed, theta)
        if noise == "inverted":
            between = a._replace(image_embed=z, x_T=slerp(a.x_T, b.x_T, theta))
            return self.restore(between, own=_own(torch.minimum(theta, 1 - theta)), seed=seed, progress=progress)
        x_T = self._noise(seed).expand_as(a.x_T)
        return self.restore(a._replace(image_embed=z, x_T=x_T), own=0.0, seed=seed, progress=progress)

    def between_captions(
        self,
        first: str,
        second: str,
        *,
        num: int = 9,
        prior: str = "diffusion",
        prior_guidance: float | None = None,
        prior_sampler: Sampler | None = None,
        candidates: int | None = None,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw what lies between two captions, (num, 3, S, S), from the same noise of prior and decoder all along.

        z_i and z_t are turned from one to the other, and the decoder's text states position by position, each with a
        norm that changes linearly. The ends are what :meth:`~unclip_pl.generation.pipeline.Unclip.generate` draws of
        the captions, whose options the others are.

        Args:
            first: caption of the first picture.
            second: caption of the last picture.
            num: pictures, both ends included.

        Raises:
            InputError: num < 2, or a decoder that reads the captions' words by itself.
        """
        if num < 2:
            raise InputError(f"Expected at least 2 pictures between two captions. Got {num}: ask for more pictures.")
        encoder = self.decoder.part.net.condition_encoder
        if encoder is not None and encoder.text_encoder is not None:
            raise InputError(
                f"{self.decoder.spec.checkpoint} reads words, and there are none between two captions: use a decoder "
                "that was trained on CLIP's text states."
            )
        chosen = self.unclip.prior(prior).adjusted(
            guidance=prior_guidance, candidates=candidates, sampler=prior_sampler
        )
        text, theta = self.clip.describe([first, second]), torch.linspace(0, 1, num, device=self.device)
        z_i = chosen.embed(text, generator=streams([seed, seed], "prior"))
        a, b = (x.expand(num, -1) for x in z_i.split(1))
        return self.decoder.decode(
            turn(a, b, theta),
            mix_captions(text, theta),
            guidance=guidance,
            sampler=sampler,
            generator=streams([seed] * num, "decoder"),
            progress=progress,
        )

    def edit(
        self,
        latent: Latent,
        caption: str,
        current: str | None = None,
        *,
        thetas: Sequence[float] = (0.0, 0.125, 0.25, 0.375, 0.5),
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw text diffs (§3.3), (B · len(thetas), 3, S, S), one picture after the other.

        z_i is turned towards z_d = norm(z_t − z_t0), and x_T stays that of the picture.

        Args:
            latent: result of :meth:`invert`.
            caption: what the pictures should become; z_t.
            current: what the pictures are; z_t0. None takes z_d = z_t, which the paper found to work too.
            thetas: fractions of the angle between z_i and z_d, 0 to 1; the paper goes up to between 0.25 and 0.5.
            seed: seed of the upsamplers.

        Raises:
            InputError: a theta is out of range, or CLIP cannot tell the captions apart.
        """
        if not thetas or not all(0 <= theta <= 1 for theta in thetas):
            raise InputError(f"Expected every theta in [0, 1]. Got {list(thetas)}: give fractions of the angle.")
        direction = self._direction(caption, current)
        wide = latent.repeat(len(thetas))
        theta = torch.tensor(thetas, device=self.device).repeat(len(latent.x_T))
        norm = wide.image_embed.norm(dim=-1, keepdim=True)
        z = turn(wide.image_embed, direction * norm, theta)
        return self.restore(wide._replace(image_embed=z), own=_own(theta), seed=seed, progress=progress)

    def probe(
        self,
        image_embed: Tensor,
        *,
        dims: Sequence[int] | None = None,
        steps: int = 100,
        guidance: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw from the first few principal dimensions of z_i (§4), (B · len(dims), 3, S, S): what they hold.

        Args:
            image_embed: (B, d) z_i.
            dims: numbers of dimensions, 1 to d; None takes the powers of two below d, and d.
            steps: steps of DDIM.
            guidance: guidance scale of the decoder.
            seed: seed of the one x_T from which all are drawn.

        Raises:
            InputError: a number is out of range, or the decoder's statistics know no principal axes.
        """
        rows = self.project(image_embed, self.dims(dims)).flatten(0, 1)
        x_T = self._noise(seed).expand(len(rows), -1, -1, -1)
        return self.restore(Latent(rows, x_T, steps, guidance), own=0.0, seed=seed, progress=progress)

    def dims(self, dims: Sequence[int] | None = None) -> list[int]:
        """Return the numbers of dimensions that :meth:`probe` shows.

        Raises:
            InputError: one is out of range.
        """
        d = self.decoder.part.space.embed_dim
        if dims is None:
            return [2**i for i in range((d - 1).bit_length())] + [d]
        if not dims or not all(1 <= n <= d for n in dims):
            raise InputError(f"Expected dims from 1 to the embedding's {d}. Got {list(dims)}: choose within the range.")
        return list(dims)

    def project(self, image_embed: Tensor, dims: Sequence[int]) -> Tensor:
        """Project (B, d) onto the first principal axes of the training set's unit-norm embeddings.

        Returns:
            (B, len(dims), d), with the norm of ``image_embed``.

        Raises:
            InputError: the decoder's statistics know no principal axes.
        """
        space, y = self.decoder.part.space, self.coordinates(image_embed)
        norm = image_embed.norm(dim=-1, keepdim=True)
        kept = (torch.arange(y.shape[1], device=y.device) < torch.tensor(dims, device=y.device)[:, None]).to(y)
        return F.normalize((y[:, None] * kept) @ space.components + space.mean, dim=-1) * norm[:, None]

    def coordinates(self, image_embed: Tensor) -> Tensor:
        """Return the coordinates (B, d) of embeddings (B, d) on the principal axes, by decreasing variance.

        Raises:
            InputError: the decoder's statistics know no principal axes.
        """
        space = self.decoder.part.space
        if space.components.numel() == 0:
            raise InputError(
                f"{self.decoder.spec.checkpoint} knows no principal axes of its training set's embeddings, as an "
                "imported one: probe a decoder that `unclip fit` has trained."
            )
        return (image_embed / image_embed.norm(dim=-1, keepdim=True) - space.mean) @ space.components.T

    def _draw(
        self, latent: Latent, eta: float, own: float | Tensor, generator: torch.Generator, progress: Progress | None
    ) -> Tensor:
        """Draw (B, 3, H, H), before any upsampler."""
        denoise = self.decoder.denoiser(latent.image_embed, latent.guidance)
        inversion, diffusion = self.decoder.inversion(latent.steps), self.decoder.part.diffusion
        return inversion.restore(
            denoise, latent.x_T, diffusion, eta=eta, own=own, generator=generator, progress=progress
        )

    def _noise(self, seed: int) -> Tensor:
        """Draw x_T, (1, 3, H, H)."""
        size = self.decoder.image_size
        return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _direction(self, caption: str, current: str | None) -> Tensor:
        """Return z_d, (1, d), unit norm."""
        texts = [caption] if current is None else [caption, current]
        z_t = F.normalize(self.clip.describe(texts).embed, dim=-1)
        difference = z_t[:1] if current is None else z_t[:1] - z_t[1:]
        if difference.norm() < 1e-6:
            raise InputError(
                f"Expected two captions that CLIP tells apart. Got {caption!r} and {current!r}: change one of them."
            )
        return F.normalize(difference, dim=-1)


def _own(theta: Tensor) -> Tensor:
    """Return the share (B,) of x_T's noise that still belongs to a picture that was turned by theta (B,)."""
    return (1 - theta / FADE).clamp(min=0)
