"""Manipulations, held to a decoder whose flow is known: pixels ~ N(mean(z_i), VAR), of which x_T is the quantile."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import DDIM, CosineSchedule, Denoise, Denoised, GaussianDiffusion
from unclip_pl.diffusion.schedule import per_sample
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.manipulation import Manipulator, mix_captions, psnr, slerp, turn
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.nn.space import EmbeddingSpace
from unclip_pl.types import TextFeatures

D, SIDE, VAR = 6, 4, 0.01


def mean_of(z_i: Tensor) -> Tensor:
    """(B, 3, 1, 1): what a picture of that embedding is on average."""
    return 0.5 * F.normalize(z_i, dim=-1)[:, :3, None, None]


class GaussianTask:
    """The exact decoder of those pictures."""

    def __init__(self, prediction: str) -> None:
        self.diffusion = GaussianDiffusion(prediction=prediction)  # type: ignore[arg-type]
        self.learns_variance = False
        self.image_noise = 0.0
        self.space = EmbeddingSpace()
        generator = torch.Generator().manual_seed(5)
        self.space.mean = 0.2 * torch.randn(D, generator=generator)
        self.space.components = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        self.space.raw_mean = torch.zeros(D)

    def denoiser(self, image_embed: Tensor, text: object, guidance: float, **_: object) -> Denoise:
        mean = mean_of(image_embed)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = (per_sample(c, x_t) for c in CosineSchedule().alpha_sigma(t))
            gain = alpha * VAR / (alpha.square() * VAR + sigma.square())
            return Denoised(mean + gain * (x_t - alpha * mean))

        return denoise


class FakeDecoder(Decoder):
    def __init__(self, prediction: str) -> None:
        spec = DecoderSpec("decoder.ckpt", SIDE, DDIM(1))
        super().__init__(spec, GaussianTask(prediction))  # type: ignore[arg-type]

    def null_text(self, n: int) -> None:  # type: ignore[override]
        return None


def embed_image(images: Tensor) -> Tensor:
    """Raw, of norm 3: the colours, and what fills the norm."""
    colors = images.mean((2, 3)).clamp(-0.5, 0.5)
    rest = (1 - colors.square().sum(1, keepdim=True)).sqrt()
    return 3 * torch.cat([colors, rest, torch.zeros(len(images), 2)], dim=1)


TEXTS = {"red": 0, "green": 1, "blue": 2}


def describe(captions: list[str]) -> SimpleNamespace:
    return SimpleNamespace(embed=torch.stack([5 * torch.eye(D)[TEXTS[text]] for text in captions]))


@pytest.fixture(params=["x0", "eps"])
def manipulator(request: pytest.FixtureRequest) -> Manipulator:
    clip = SimpleNamespace(encode_image=embed_image, describe=describe)
    return Manipulator(cast(Unclip, SimpleNamespace(clip=clip, decoder=FakeDecoder(request.param), device="cpu")))


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    colors = torch.tensor([[0.3, -0.2, 0.1], [-0.3, 0.2, 0.0]])[:, :, None, None]
    return colors + math.sqrt(VAR) * torch.randn(2, 3, SIDE, SIDE, generator=generator)


class TestSlerp:
    a, b = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def test_ends(self) -> None:
        torch.testing.assert_close(slerp(self.a, self.b, torch.zeros(50)), self.a)
        torch.testing.assert_close(slerp(self.a, self.b, torch.ones(50)), self.b)

    def test_unit_norm_and_equal_angles(self) -> None:
        a, b = F.normalize(self.a, dim=1), F.normalize(self.b, dim=1)
        theta = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        z = slerp(a, b, theta)
        omega = (a * b).sum(1).acos()
        torch.testing.assert_close(z.norm(dim=1), torch.ones(50, dtype=torch.float64))
        torch.testing.assert_close((a * z).sum(1).acos(), theta * omega)
        torch.testing.assert_close((z * b).sum(1).acos(), (1 - theta) * omega)

    def test_there_is_back(self) -> None:
        theta = torch.linspace(0, 1, 50, dtype=torch.float64)
        torch.testing.assert_close(slerp(self.a, self.b, theta), slerp(self.b, self.a, 1 - theta))

    def test_of_a_vector_with_itself(self) -> None:
        torch.testing.assert_close(slerp(self.a, self.a, torch.full((50,), 0.3)), self.a)

    def test_a_sample_is_one_vector_whatever_its_shape(self) -> None:
        theta = torch.full((50,), 0.3)
        images = slerp(self.a.view(50, 7, 1, 1), self.b.view(50, 7, 1, 1), theta)
        torch.testing.assert_close(images.flatten(1), slerp(self.a, self.b, theta))

    def test_the_norm_of_an_embedding_goes_along(self) -> None:
        theta = torch.full((50,), 0.25)
        norm = 0.75 * self.a.norm(dim=1) + 0.25 * self.b.norm(dim=1)
        torch.testing.assert_close(turn(self.a, self.b, theta).norm(dim=1), norm)


def test_round_trip(manipulator: Manipulator, images: Tensor) -> None:
    """x_T is the picture's quantile, and it comes back."""
    done = manipulator.reconstruct(images, steps=400)
    assert done.psnr.min() > 40
    torch.testing.assert_close(done.images, images, rtol=0, atol=0.02)
    quantile = (images - mean_of(embed_image(images))) / math.sqrt(VAR)
    assert F.cosine_similarity(done.latent.x_T.flatten(), quantile.flatten(), dim=0) > 0.999


def test_psnr_is_of_the_whole_range() -> None:
    assert psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)).item() == pytest.approx(20)


def test_no_eta_no_change_and_more_eta_more_change(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images)
    again = manipulator.reconstruct(images).images
    torch.testing.assert_close(manipulator.vary(latent, num=2, eta=0), again.repeat_interleave(2, dim=0))
    change = [
        (manipulator.vary(latent, num=8, eta=eta) - again.repeat_interleave(8, dim=0)).square().mean().item()
        for eta in (0.05, 0.3, 1.0)
    ]
    assert change == sorted(change)
    assert change[0] < 0.2 * VAR
    assert change[2] == pytest.approx(2 * VAR, rel=0.5)  # of two independent pictures of one embedding
    first = manipulator.vary(latent, eta=1.0, seed=3)
    assert torch.equal(first, manipulator.vary(latent, eta=1.0, seed=3))
    assert not torch.equal(first, manipulator.vary(latent, eta=1.0, seed=4))


def test_interpolation_ends_at_the_pictures(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images, steps=400)
    first, second = (latent._replace(image_embed=latent.image_embed[i], x_T=latent.x_T[i]) for i in ([0], [1]))
    path = manipulator.interpolate(first, second, num=5)
    torch.testing.assert_close(path[[0, 4]], images, rtol=0, atol=0.02)
    back = manipulator.interpolate(second, first, num=5)
    torch.testing.assert_close(path, back.flip(0))


def test_interpolation_under_one_noise(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images)
    first, second = (latent._replace(image_embed=latent.image_embed[i], x_T=latent.x_T[i]) for i in ([0], [1]))
    path = manipulator.interpolate(first, second, num=3, noise="fixed")
    theta = torch.tensor([0.0, 0.5, 1.0])
    mean = mean_of(turn(latent.image_embed[[0, 0, 0]], latent.image_embed[[1, 1, 1]], theta))
    rest = path - mean
    torch.testing.assert_close(rest[0], rest[2], rtol=0, atol=0.02)  # the same quantile of each
    assert torch.equal(path, manipulator.interpolate(first, second, num=3, noise="fixed"))


def test_an_edit_turns_the_embedding_and_leaves_the_rest(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images, steps=400)
    edited = manipulator.edit(latent, "blue", "red", thetas=(0.0, 0.25, 0.5)).view(2, 3, 3, SIDE, SIDE)
    torch.testing.assert_close(edited[:, 0], images, rtol=0, atol=0.02)
    direction = F.normalize(torch.eye(D)[2] - torch.eye(D)[0], dim=-1)
    lowest = torch.tensor(manipulator.decoder.inversion(400).times(manipulator.decoder.part.diffusion)[-1])
    alpha, sigma = CosineSchedule().alpha_sigma(lowest)
    gain = alpha * VAR / (alpha.square() * VAR + sigma.square())
    for i, theta in ((1, 0.25), (2, 0.5)):
        z = slerp(F.normalize(latent.image_embed, dim=-1), direction.expand(2, -1), torch.full((2,), theta))
        moved = mean_of(z) + gain * (images - alpha * mean_of(latent.image_embed))  # E[x0] there, of the same quantile
        torch.testing.assert_close(edited[:, i], moved, rtol=0, atol=0.02)


def test_an_edit_needs_no_baseline(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images)
    whole = manipulator.edit(latent, "green", thetas=[1.0])
    assert whole.mean((2, 3)).argmax(1).tolist() == [1, 1]


def test_all_dimensions_are_the_embedding(manipulator: Manipulator) -> None:
    z_i = 2.5 * torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    kept = manipulator.project(z_i, [1, D])
    torch.testing.assert_close(kept[:, 1], z_i)
    torch.testing.assert_close(kept.norm(dim=-1), z_i.norm(dim=-1)[:, None].expand(4, 2))
    assert manipulator.dims() == [1, 2, 4, 6]
    whole = manipulator.probe(z_i, dims=[D], seed=1)
    mean = mean_of(z_i)
    torch.testing.assert_close((whole - mean)[0], (whole - mean)[3], rtol=0, atol=0.02)  # one x_T for all


def test_fewer_dimensions_are_further_away(manipulator: Manipulator) -> None:
    z_i = torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    cosine = F.cosine_similarity(manipulator.project(z_i, range(1, D + 1)), z_i[:, None], dim=-1).mean(0)
    assert cosine.tolist() == sorted(cosine.tolist())


def test_what_is_out_of_range_is_refused(manipulator: Manipulator, images: Tensor) -> None:
    latent = manipulator.invert(images, steps=10)
    with pytest.raises(ValueError, match=r"0 <= eta <= 1. Got 1.5"):
        manipulator.vary(latent, eta=1.5)
    with pytest.raises(ValueError, match=r"every theta in \[0, 1\]. Got \[0.2, 1.5\]"):
        manipulator.edit(latent, "red", thetas=[0.2, 1.5])
    with pytest.raises(ValueError, match="that CLIP tells apart"):
        manipulator.edit(latent, "red", "red")
    with pytest.raises(ValueError, match="at least 2 pictures"):
        manipulator.interpolate(latent, latent, num=1)
    for other in (manipulator.invert(images, steps=20), latent._replace(guidance=2.0)):
        with pytest.raises(ValueError, match=r"same steps and guidance.*invert both pictures alike"):
            manipulator.interpolate(latent, other)
    with pytest.raises(ValueError, match=r"from 1 to the embedding's 6. Got \[0\]"):
        manipulator.probe(latent.image_embed, dims=[0])
    manipulator.decoder.part.space.components = torch.empty(0)
    with pytest.raises(ValueError, match="knows no principal axes"):
        manipulator.probe(latent.image_embed)


def test_captions_are_mixed_position_by_position() -> None:
    """The ends are the captions; between them norms change linearly, and a token of one caption alone fades."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    states = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).masked_fill(~mask[..., None], 0)
    embed = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    text = TextFeatures(torch.tensor([[1, 2, 3], [4, 5, 0]]), states, mask, embed)
    mixed = mix_captions(text, torch.tensor([0.0, 0.25, 0.5, 1.0]))
    for row, end in ((0, 0), (3, 1)):
        for part, own in zip(mixed, text, strict=True):
            torch.testing.assert_close(part[row], own[end])
    assert mixed.mask[1:3].all()
    assert mixed.tokens[:, 0].tolist() == [1, 1, 4, 4]
    norms = states.norm(dim=-1)
    torch.testing.assert_close(mixed.states[1].norm(dim=-1), norms[0].lerp(norms[1], 0.25))
    torch.testing.assert_close(mixed.states[1, 2], 0.75 * states[0, 2])
    torch.testing.assert_close(mixed.embed[2].norm(), embed.norm(dim=-1).mean())
    halfway = [F.cosine_similarity(mixed.embed[2], end, dim=0) for end in embed]
    torch.testing.assert_close(*halfway)
