"""Low-resolution inputs of the upsamplers: JPEG against libjpeg, blur and downsampling against closed forms."""

import io
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unclip_pl.tasks.corruption import (
    BSRDegradation,
    Corruption,
    GaussianBlur,
    LightBSRDegradation,
    Sometimes,
    _Degradation,
    _gaussian,
    shrink,
)
from unclip_pl.tasks.jpeg import jpeg


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours, an edge and some texture, (1, 3, h, w) in 8-bit steps of [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    smooth[..., width // 2 :] = 1 - smooth[..., width // 2 :]
    return (smooth + 0.03 * torch.randn(smooth.shape, generator=g)).clamp(0, 1).mul(255).round().div(255)


def corrupted(corruption: Corruption, image: Tensor, factor: int, seed: int = 0) -> Tensor:
    seeds = corruption.seeds(len(image), torch.Generator().manual_seed(seed))
    return corruption.degrade(image, factor, seeds)


def by_pillow(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image[0].permute(1, 2, 0).mul(255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
@pytest.mark.parametrize("size", [(64, 48), (37, 51)])
def test_jpeg_is_libjpegs(quality: int, size: tuple[int, int]) -> None:
    """Integer transforms there, floating point here: a coefficient near a tie may go the other way."""
    image = picture(*size)
    difference = (jpeg(image, quality) - by_pillow(image, quality)).abs() * 255
    changed = (by_pillow(image, quality) - image).abs().mean() * 255
    assert changed > 5
    assert difference.mean() < 1.2
    assert difference.quantile(0.99) <= 8.5


def test_gray_survives_a_jpeg_and_images_keep_to_themselves() -> None:
    gray = torch.full((1, 3, 16, 16), 128 / 255)
    assert torch.equal(jpeg(gray, 30), gray)
    assert torch.equal(jpeg(gray.double(), 30), gray.double())
    a, b = picture(32, 32), picture(32, 32, seed=1)
    torch.testing.assert_close(jpeg(torch.cat([a, b]), 40), torch.cat([jpeg(a, 40), jpeg(b, 40)]))


def test_blur_is_the_papers_kernel() -> None:
    """A single bright pixel comes out as exp(-d² / 2σ²), normalised over 3 × 3."""
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 4] = 1.0
    out = corrupted(GaussianBlur(), image, 1)
    axis = torch.tensor([1.0, 0.0, 1.0]).div(-2 * 0.6**2).exp()
    kernel = torch.outer(axis, axis) / axis.sum() ** 2
    torch.testing.assert_close(out[0, 0, 3:6, 3:6], kernel, rtol=1e-3, atol=1e-4)
    assert out.abs().sum() == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("factor", [2, 4])
def test_bsr_shapes_range_and_seed(factor: int) -> None:
    image = picture(64, 64).mul(2).sub(1).expand(6, -1, -1, -1)

    def run(seed: int) -> Tensor:
        return corrupted(BSRDegradation(), image, factor, seed)

    low = run(0)
    assert low.shape == (6, 3, 64 // factor, 64 // factor)
    assert low.abs().max() <= 1
    assert torch.equal(low, run(0))
    assert not torch.equal(low, run(1))
    assert not torch.equal(low[0], low[1])  # each image has a fate of its own


def test_bsr_loses_detail_but_not_the_picture() -> None:
    """Colours stay what they are on average, places stay where they are, and more is lost than by a blur."""
    image = picture(128, 128).mul(2).sub(1)
    clean, blurred = shrink(image, 4), corrupted(GaussianBlur(), image, 4)
    draws = corrupted(BSRDegradation(), image.expand(48, -1, -1, -1), 4)
    torch.testing.assert_close(draws.mean((0, 2, 3)), clean.mean((0, 2, 3)), rtol=0, atol=0.03)
    detail = (clean - clean.mean((2, 3), keepdim=True)).flatten()
    likeness = [torch.corrcoef(torch.stack([draw.flatten(), detail]))[0, 1].item() for draw in draws]
    assert min(likeness) > 0.6
    shifted = detail.view_as(clean).roll(3, dims=-1).flatten()
    moved = [torch.corrcoef(torch.stack([draw.flatten(), shifted]))[0, 1].item() for draw in draws]
    assert all(there < here for there, here in zip(moved, likeness, strict=True))
    assert (draws - clean).square().mean() > 2 * (blurred - clean).square().mean()


def test_the_light_variant_loses_less() -> None:
    image = picture(128, 128).mul(2).sub(1).expand(24, -1, -1, -1)
    clean = shrink(image, 4)
    lost = [
        (corrupted(variant, image, 4) - clean).square().mean().item()
        for variant in (LightBSRDegradation(), BSRDegradation())
    ]
    assert 0 < lost[0] < lost[1] / 2


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_sometimes_is_one_or_the_other_for_each_image(probability: float) -> None:
    image = torch.cat([picture(16, 16, seed) for seed in range(40)]).mul(2).sub(1)
    low = corrupted(Sometimes(GaussianBlur(), probability), image, 2)
    clean, blurred = shrink(image, 2), corrupted(GaussianBlur(), image, 2)
    is_clean, is_blurred = ((low - other).abs().amax((1, 2, 3)) < 1e-6 for other in (clean, blurred))
    assert (is_clean ^ is_blurred).all()
    assert is_blurred.float().mean() == pytest.approx(probability, abs=0.2)


@pytest.mark.parametrize("corruption", [Sometimes(LightBSRDegradation()), Sometimes(GaussianBlur()), BSRDegradation()])
def test_rows_of_the_whole_batch_are_corrupted_alike(corruption: Corruption) -> None:
    """A rank has its rows' seeds out of the global batch's, and draws nothing else."""
    image = torch.cat([picture(16, 16, seed) for seed in range(8)]).mul(2).sub(1)
    generator = torch.Generator().manual_seed(0)
    seeds = corruption.seeds(8, generator)
    state = generator.get_state()
    whole = corruption.degrade(image, 2, seeds)
    ranks = [corruption.degrade(image[rows], 2, seeds[rows]) for rows in (slice(4), slice(4, 8))]
    torch.testing.assert_close(torch.cat(ranks), whole)
    assert torch.equal(generator.get_state(), state)


def test_sometimes_expects_a_probability() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        Sometimes(GaussianBlur(), 1.5)


def test_every_order_keeps_the_resize_behind_the_downsampling(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: set[tuple[str, ...]] = set()
    for seed in range(60):
        calls: list[str] = []
        names = ("blur", "downsample", "finish", "noise", "maybe_jpeg", "jpeg")
        degradation = _Degradation(Random(seed), torch.zeros(1, 3, 16, 16), 4)
        for name in names:
            monkeypatch.setattr(degradation, name, partial(calls.append, name))
        degradation.run()
        assert sorted(calls) == sorted([*names, "blur"])
        assert calls.index("downsample") < calls.index("finish")
        assert calls[-1] == "jpeg"
        orders.add(tuple(calls))
    assert len(orders) > 40


def test_gaussian_kernels_have_their_moments() -> None:
    like, angle = torch.zeros(1, dtype=torch.float64), 0.7
    kernel = _gaussian(41, 9.0, 4.0, angle, like)
    offset = torch.arange(41, dtype=torch.float64) - 20
    x, y = offset.expand(41, 41), offset[:, None].expand(41, 41)
    rotation = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    covariance = rotation @ torch.diag(torch.tensor([9.0, 4.0], dtype=torch.float64)) @ rotation.T
    measured = torch.stack([(kernel * a * b).sum() for a in (x, y) for b in (x, y)]).view(2, 2)
    torch.testing.assert_close(measured, covariance, rtol=1e-3, atol=1e-3)
    shifted = _gaussian(25, 2.0, 2.0, 0.0, like, shift=1.5)
    offset = torch.arange(25, dtype=torch.float64) - 12
    assert (shifted.sum(0) * offset).sum().item() == pytest.approx(1.5, abs=1e-6)


def test_the_strided_gaussian_reads_the_middle_of_every_block() -> None:
    """A ramp comes out as the blocks' centres, wherever the border is far."""
    degradation = _Degradation(Random(0), torch.zeros(1, 3, 64, 64), 4)
    degradation.x = torch.linspace(0, 1, 64).expand(1, 3, 64, 64).clone()
    degradation.convolve(_gaussian(25, 4.0, 4.0, 0.0, degradation.x, 1.5), stride=4)
    centres = torch.linspace(0, 1, 64).view(16, 4).mean(1)
    torch.testing.assert_close(degradation.x[0, 0, 8, 4:-4], centres[4:-4], rtol=0, atol=1e-5)
