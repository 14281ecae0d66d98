import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from unclip_pl.shapes.render import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOR_JITTER,
    COLORS,
    HELD_OUT,
    POSITIONS,
    SCALE_JITTER,
    SHAPES,
    SHIFT_JITTER,
    SIZES,
    VALUES,
    Attributes,
    Split,
    coverage,
    draw_attributes,
    encode,
    render,
)

CELLS = torch.cartesian_prod(*(torch.arange(len(names)) for names in (SHAPES, SIZES, POSITIONS)))
CORNERS = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)


def test_every_shape_and_colour_is_held_out_once() -> None:
    shapes, colors = zip(*HELD_OUT, strict=True)
    assert sorted(shapes) == sorted(SHAPES)
    assert sorted(colors) == sorted(COLORS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_pairs_never_train(split: Split) -> None:
    drawn = draw_attributes(5000, split=split, rng=np.random.default_rng(0))
    seen = {(a.shape, a.color) for a in drawn}
    assert len(seen) == len(SHAPES) * len(COLORS) - len(HELD_OUT)
    assert not seen & HELD_OUT


def test_heldout_has_every_pair() -> None:
    drawn = draw_attributes(5000, split="heldout", rng=np.random.default_rng(0))
    unseen = [(a.shape, a.color) in HELD_OUT for a in drawn]
    assert len({(a.shape, a.color) for a in drawn}) == len(SHAPES) * len(COLORS)
    assert abs(np.mean(unseen) - 1 / 8) < 0.02


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_value_is_equally_likely(split: Split) -> None:
    n = 8000
    indices = encode(draw_attributes(n, split=split, rng=np.random.default_rng(1)))
    for column, name in zip(indices.T, ATTRIBUTES, strict=True):
        share = 1 / len(VALUES[name])
        counts = column.bincount(minlength=len(VALUES[name])) / n
        assert (counts - share).abs().max() < 4.5 * (share * (1 - share) / n) ** 0.5


def test_same_seed_same_bytes() -> None:
    drawn = draw_attributes(50, split="train", rng=np.random.default_rng(3))
    assert drawn == draw_attributes(50, split="train", rng=np.random.default_rng(3))
    first, second = (render(drawn, rng=np.random.default_rng(4)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.dtype == np.uint8
    assert first.shape == (50, 32, 32, 3)


def test_a_picture_does_not_depend_on_those_after_it() -> None:
    drawn = draw_attributes(700, split="train", rng=np.random.default_rng(5))
    whole = render(drawn, rng=np.random.default_rng(6))
    assert np.array_equal(render(drawn[:300], rng=np.random.default_rng(6)), whole[:300])


def test_empty_and_impossible() -> None:
    rng = np.random.default_rng(0)
    assert render([], size=16, rng=rng).shape == (0, 16, 16, 3)
    with pytest.raises(ValueError, match="at least 1"):
        render(draw_attributes(1, split="train", rng=rng), size=0, rng=rng)


def test_inside_and_outside_have_their_colours() -> None:
    drawn = [Attributes("circle", c, s, "center", b) for c in COLORS for s in SIZES for b in BACKGROUNDS]
    images = render(drawn, size=33, rng=np.random.default_rng(0)) / 255
    tolerance = COLOR_JITTER + 0.5 / 255 + 1e-6
    for image, a in zip(images, drawn, strict=True):
        assert np.abs(image[16, 16] - COLORS[a.color]).max() <= tolerance
        assert np.abs(image[[0, 0, -1, -1], [0, -1, 0, -1]] - BACKGROUNDS[a.background]).max() <= tolerance


def test_palettes_are_apart_and_never_clipped() -> None:
    palette = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()], dtype=torch.float64)
    assert torch.pdist(palette).min() > 2 * 3**0.5 * COLOR_JITTER
    assert palette.min() >= COLOR_JITTER
    assert palette.max() <= 1 - COLOR_JITTER


def test_sizes_and_positions_do_not_overlap() -> None:
    small, large = SIZES["small"], SIZES["large"]
    assert small * (1 + SCALE_JITTER) < large * (1 - SCALE_JITTER)
    for radius in (small, large):
        reach = 0.5 - (1 + SCALE_JITTER) * radius - SHIFT_JITTER
        assert reach > 4 * SHIFT_JITTER


def test_shapes_stay_inside_under_all_jitter() -> None:
    """An outline beyond the border would be cut wider by the outermost row or column than by the one behind it."""
    masks = coverage(CELLS.repeat_interleave(len(CORNERS), 0), CORNERS.repeat(len(CELLS), 1), 40)
    frame = torch.stack((masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]))
    behind = torch.stack((masks[:, 1], masks[:, -2], masks[:, :, 1], masks[:, :, -2]))
    assert (frame.sum(-1) <= behind.sum(-1)).all()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_antialiasing_agrees_with_supersampling(size: int) -> None:
    cells = CELLS[CELLS[:, 2] == 3]  # at the top
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(len(cells), 4, generator=generator) * 2 - 1
    mask = coverage(cells, jitter, size)
    exact = avg_pool2d((coverage(cells, jitter, 16 * size) > 0.5).float(), 16)
    assert (mask - exact).square().mean().sqrt() < 0.4 / size
    # The area of a shape is a share of the image, for any number of pixels.
    assert torch.allclose(mask.mean((1, 2)), exact.mean((1, 2)), rtol=0.06)


def test_areas_in_closed_form() -> None:
    """A centred shape of radius r: π for the circle, π(1 − 0.52²) for the ring, and polygons by their vertices."""
    notch, turn = 0.47, np.pi / 5
    area = {
        "circle": np.pi,
        "square": 4 * 0.85**2,
        "triangle": 2 * 0.89 * 0.85,
        "star": 10 * 0.5 * notch * np.sin(turn),
        "diamond": 2 * 0.68,
        "cross": 4 * (2 * 0.95 * 0.33 - 0.33**2),
        "heart": 0.56**2 * (4 + np.pi),
        "ring": np.pi * (1 - 0.52**2),
    }
    cells = torch.tensor([[index, 1, 0] for index in range(len(SHAPES))])
    covered = coverage(cells, torch.zeros(len(cells), 4, dtype=torch.float64), 256).mean((1, 2))
    expected = torch.tensor([area[name] for name in SHAPES]) * SIZES["large"] ** 2
    assert torch.allclose(covered, expected, rtol=2e-3)


def test_symmetries() -> None:
    """A cross is its own quarter turn; left is right seen in the mirror, top is bottom upside down (for a circle)."""
    zero = torch.zeros(1, 4)
    names = list(SHAPES)
    cross = coverage(torch.tensor([[names.index("cross"), 1, 0]]), zero, 32)
    assert torch.allclose(cross, cross.rot90(1, (1, 2)), atol=1e-5)
    left, right, top, bottom = (coverage(torch.tensor([[0, 0, p]]), zero, 32) for p in (1, 2, 3, 4))
    assert torch.allclose(left, right.flip(2), atol=1e-5)
    assert torch.allclose(top, bottom.flip(1), atol=1e-5)
    assert torch.allclose(left, top.mT, atol=1e-5)
    assert left[0, :, :16].sum() > left[0, :, 16:].sum()
    assert top[0, :16].sum() > top[0, 16:].sum()
