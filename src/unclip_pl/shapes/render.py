"""Draws the shapes data set: one flat, antialiased shape on one flat background.

A picture is five named attributes plus jitter. The geometry is in fractions of the image side, so any size can be
drawn. Masks are tensor arithmetic alone: the oracle re-renders with the function that drew the picture.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from unclip_pl.errors import InputError

Split = Literal["train", "val", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

# --- Signed distances: negative inside, in units of the radius, y down. They are true near edges, where antialiasing
# needs them. Under the full rotation jitter every shape stays within [-1, 1] on both axes.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    half_width, half_height = 0.89, 0.85
    slope = 2 * half_height / half_width
    side = (slope * x.abs() - y - half_height) / math.hypot(slope, 1)
    return torch.maximum(side, y - half_height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: folded into one tenth of the turn, the outline is one line from tip (1, 0°) to notch (0.47, 36°)."""
    tenth, notch = math.pi / 5, 0.47
    angle = torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth
    radius = torch.hypot(x, y)
    u, v = radius * angle.cos(), radius * angle.sin().abs()
    du, dv = notch * math.cos(tenth) - 1, notch * math.sin(tenth)
    return (dv * (u - 1) - du * v) / math.hypot(du, dv)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    half_width = 0.68
    return (x.abs() + half_width * y.abs() - half_width) / math.hypot(1, half_width)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    length, half_width = 0.95, 0.33
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - length, torch.minimum(x, y) - half_width)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner, with a disc on each of the two upper sides."""
    half = 0.56
    x, y = x.abs(), y - 0.146 * half
    square = (x + y.abs()) / math.sqrt(2) - half
    disc = torch.hypot(x - half / math.sqrt(2), y + half / math.sqrt(2)) - half
    return torch.minimum(square, disc)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.24


# --- The vocabulary. Every order below is the order of indices.

SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
}
"""Name -> signed distance to the outline."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.10, 0.12),
    "green": (0.10, 0.66, 0.22),
    "blue": (0.12, 0.35, 0.95),
    "yellow": (0.96, 0.88, 0.10),
    "purple": (0.55, 0.14, 0.75),
    "orange": (0.96, 0.50, 0.06),
    "cyan": (0.10, 0.82, 0.92),
    "pink": (0.96, 0.52, 0.76),
}
"""Name -> RGB in [0, 1]. The palettes keep COLOR_JITTER away from 0 and 1, so no jittered colour is ever clipped."""

SIZES: dict[str, float] = {"small": 0.2, "large": 0.32}
"""Name -> radius in image sides: 6.4 and 10.2 pixels of 32."""

POSITIONS: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
"""Name -> direction (x, y), y down. Off the centre a shape sits as far out as its jitter leaves it inside the image."""

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "black": (0.04, 0.04, 0.04),
    "gray": (0.50, 0.50, 0.50),
    "navy": (0.06, 0.08, 0.32),
}
"""Name -> RGB in [0, 1]."""


class Attributes(NamedTuple):
    """Attributes of a picture, by name."""

    shape: str
    color: str
    size: str
    position: str
    background: str


ATTRIBUTES = Attributes._fields
VALUES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}

HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "pink"),
        ("triangle", "cyan"),
        ("star", "green"),
        ("diamond", "orange"),
        ("cross", "yellow"),
        ("heart", "blue"),
        ("ring", "red"),
    }
)
"""(shape, colour) pairs that train and val never show together. Every shape and every colour is in exactly one."""

SHIFT_JITTER = 0.025  # image sides, either way on both axes
SCALE_JITTER = 0.06  # relative; small and large stay far apart
TURN_JITTER = math.radians(8)
COLOR_JITTER = 0.04  # per channel


def pairs(split: Split) -> list[tuple[str, str]]:
    """List the (shape, colour) pairs that a split draws from, uniformly, in a fixed order: heldout has them all."""
    product = itertools.product(SHAPES, COLORS)
    return [pair for pair in product if split == "heldout" or pair not in HELD_OUT]


def draw_attributes(n: int, *, split: Split, rng: np.random.Generator) -> list[Attributes]:
    """Draw n pictures' attributes: a (shape, colour) pair of the split, the rest uniform and independent.

    Val has train's distribution; heldout has every pair, an eighth of which train has never shown.
    """
    allowed = pairs(split)
    ranges = (len(allowed), len(SIZES), len(POSITIONS), len(BACKGROUNDS))
    draws = rng.integers(ranges, size=(n, len(ranges))).tolist()
    sizes, positions, backgrounds = VALUES["size"], VALUES["position"], VALUES["background"]
    return [Attributes(allowed[i][0], allowed[i][1], sizes[j], positions[k], backgrounds[m]) for i, j, k, m in draws]


def places(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return the radius (N,) and the centre (N, 2), x and y, of cells without jitter, in image sides.

    Args:
        cells: (N, 3) long, on the CPU: indices of shape, size and position.
    """
    base = torch.tensor(list(SIZES.values()))[cells[:, 1]]
    reach = 0.5 - (1 + SCALE_JITTER) * base - SHIFT_JITTER
    return base, 0.5 + reach[:, None] * torch.tensor(list(POSITIONS.values()))[cells[:, 2]]


def coverage(
    cells: Tensor,
    jitter: Tensor,
    size: int,
    rows: slice | Tensor = slice(None),
    columns: slice | Tensor = slice(None),
) -> Tensor:
    """Compute the share of every pixel that a shape covers, from its signed distance to the pixel's centre.

    Args:
        cells: (N, 3) long, on the CPU: indices of shape, size and position.
        jitter: (N, 4) in [-1, 1], on any device: x shift, y shift, scale, turn, each in units of its jitter.
        size: side of the image in pixels.
        rows: part of the image's rows that is wanted.
        columns: part of its columns.

    Returns:
        (N, size, size), or the wanted part, in [0, 1], rows from the top, on the device and in the dtype of `jitter`.
    """
    base, centre = (part.to(jitter) for part in places(cells))

    shift, scale, turn = (jitter * jitter.new_tensor([SHIFT_JITTER, SHIFT_JITTER, SCALE_JITTER, TURN_JITTER])).split(
        (2, 1, 1), dim=1
    )
    radius = base[:, None, None] * (1 + scale[..., None])  # (N, 1, 1)
    cos, sin = turn.cos()[..., None], turn.sin()[..., None]
    pixel = (torch.arange(size, device=jitter.device, dtype=jitter.dtype) + 0.5) / size
    dx, dy = (pixel - (centre + shift)[..., None]).unbind(1)  # (N, size) each
    dx, dy = dx[:, None, columns] / radius, dy[:, rows, None] / radius
    x, y = cos * dx + sin * dy, cos * dy - sin * dx  # (N, size, size): the pixel in the shape's own frame

    distance = torch.empty_like(x)
    for index, outline in enumerate(SHAPES.values()):
        rows = (cells[:, 0] == index).nonzero().squeeze(1).to(jitter.device)
        distance[rows] = outline(x[rows], y[rows])
    return (0.5 - distance * radius * size).clamp(0, 1)


def render(attributes: Sequence[Attributes], *, size: int = 32, rng: np.random.Generator) -> np.ndarray:
    """Draw pictures with fresh jitter. Picture i depends on `attributes[i]` and the i-th draw of `rng` alone.

    Args:
        attributes: N pictures.
        size: side in pixels.
        rng: source of the jitter in position, scale, rotation and colours.

    Returns:
        (N, size, size, 3) uint8, sRGB.
    """
    if size < 1:
        raise InputError(f"Expected an image size of at least 1 pixel. Got {size}: give a larger one.")
    images = np.empty((len(attributes), size, size, 3), dtype=np.uint8)
    indices = encode(attributes)
    jitter = torch.from_numpy(rng.uniform(-1, 1, (len(attributes), 10)).astype(np.float32))
    palette, grounds = torch.tensor(list(COLORS.values())), torch.tensor(list(BACKGROUNDS.values()))
    foreground = palette[indices[:, 1]] + COLOR_JITTER * jitter[:, 4:7]
    background = grounds[indices[:, 4]] + COLOR_JITTER * jitter[:, 7:10]
    chunk = max(1, 2**18 // size**2)  # stays in cache
    for start in range(0, len(attributes), chunk):
        part = slice(start, start + chunk)
        mask = coverage(indices[part][:, [0, 2, 3]], jitter[part, :4], size)[..., None]
        pixels = torch.lerp(background[part, None, None], foreground[part, None, None], mask)
        images[part] = (pixels * 255).round().to(torch.uint8).numpy()
    return images


def encode(attributes: Sequence[tuple[str, ...]], values: Mapping[str, Sequence[str]] = VALUES) -> Tensor:
    """Return (N, A) long indices into `values`, in its order."""
    known = [{value: index for index, value in enumerate(own)} for own in values.values()]
    rows = [[place[value] for place, value in zip(known, row, strict=True)] for row in attributes]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(values))
