import numpy as np
import pytest
import torch
from torch import Tensor

from unclip_pl.shapes.oracle import Reading, ShapesOracle, attributes
from unclip_pl.shapes.render import Attributes, Split, draw_attributes, encode, render


def pictures(n: int, size: int, split: Split = "train", seed: int = 0) -> tuple[list[Attributes], Tensor]:
    rng = np.random.default_rng(seed)
    drawn = draw_attributes(n, split=split, rng=rng)
    pixels = torch.from_numpy(render(drawn, size=size, rng=rng)).permute(0, 3, 1, 2)
    return drawn, pixels.float() / 127.5 - 1


@pytest.fixture(scope="module")
def oracle() -> ShapesOracle:
    return ShapesOracle(32)


def same(a: Reading, b: Reading) -> bool:
    return torch.equal(a.indices, b.indices) and torch.allclose(a.residual, b.residual, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "n", "split"),
    [(32, 600, "train"), (32, 200, "heldout"), (16, 200, "val"), (48, 60, "val"), (64, 60, "val")],
)
def test_exact_on_fresh_renders(size: int, n: int, split: Split) -> None:
    drawn, images = pictures(n, size, split)
    reading = ShapesOracle(size)(images)
    right = (reading.indices == encode(drawn)).float().mean(0)
    assert right.min() >= 0.995
    assert reading.confidence.min() > 0.5
    assert reading.confidence.max() <= 1
    assert reading.residual.max() < 0.01  # rounding to 8 bits alone can be 0.002


def test_names(oracle: ShapesOracle) -> None:
    drawn, images = pictures(20, 32)
    assert attributes(oracle(images)) == drawn


def test_order_and_company_do_not_matter(oracle: ShapesOracle) -> None:
    _, images = pictures(90, 32)
    images = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    whole = oracle(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert same(oracle(images[order]), Reading(*(part[order] for part in whole)))
    assert same(oracle(images[7:8]), Reading(*(part[7:8] for part in whole)))
    assert [len(part) for part in oracle(images[:0])] == [0, 0, 0]


def test_noise_shows_in_the_residual_and_lowers_confidence(oracle: ShapesOracle) -> None:
    """A residual is an RMS: noise of standard deviation s in [0, 1] units adds just that to a perfect picture."""
    rng = np.random.default_rng(0)
    drawn = [a._replace(background="gray") for a in draw_attributes(60, split="train", rng=rng)]
    clean = torch.from_numpy(render(drawn, rng=rng)).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    faint, strong = (oracle(clean.clamp(-0.9, 0.9) + 2 * s * noise) for s in (0.02, 0.1))
    assert torch.equal(strong.indices, encode(drawn))
    assert strong.residual.mean() == pytest.approx(0.1, rel=0.1)
    assert (faint.residual < strong.residual).all()
    assert (faint.confidence > strong.confidence).all()


def test_what_is_no_shape_has_no_confidence(oracle: ShapesOracle) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(40, 3, 1, 1, generator=generator) * 2 - 1).expand(40, 3, 32, 32)
    noise = torch.randn(40, 3, 32, 32, generator=generator)
    for images in (uniform, noise, 1e6 * noise):
        reading = oracle(images)
        assert reading.confidence.min() >= 0
        assert reading.confidence.max() < 0.05
        assert reading.residual.isfinite().all()
        assert (reading.residual > 0.05).all()


def test_not_finite_is_neither_confident_nor_real(oracle: ShapesOracle) -> None:
    _, images = pictures(3, 32)
    images[0, 0, 3, 4], images[1, 2, 0, 0] = float("nan"), float("inf")
    reading = oracle(images)
    assert reading.confidence[:2].tolist() == [0, 0]
    assert reading.residual[:2].tolist() == [1, 1]
    assert reading.confidence[2] > 0.5
    assert reading.residual[2] < 0.01


def test_a_wrong_colour_is_not_real(oracle: ShapesOracle) -> None:
    """The residual is to what the renderer can draw: a red star is none of its stars in a red that it never mixes."""
    star = Attributes("star", "red", "large", "center", "white")
    images = torch.from_numpy(render([star], rng=np.random.default_rng(0))).permute(0, 3, 1, 2).float() / 127.5 - 1
    tinted = images.clone()
    tinted[:, 2] = tinted[:, 2] * 0.5 - 0.5  # less blue everywhere: white turns yellowish
    assert oracle(images).residual.item() < 0.01
    assert oracle(tinted).residual.item() > 0.1
    assert attributes(oracle(tinted)) == [star]


def test_shape_is_checked(oracle: ShapesOracle) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        oracle(torch.zeros(2, 3, 64, 64))


def test_nothing_is_trained_or_saved(oracle: ShapesOracle) -> None:
    assert not list(oracle.parameters())
    assert not oracle.state_dict()
