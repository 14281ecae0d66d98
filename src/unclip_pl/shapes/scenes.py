"""Scenes: two small shapes of different colours, left and right or above and below, and captions that bind them.

A model may know that there is something red, something blue, a circle and a star, and still not which is which (§7 of
the paper). The first object of a scene is the left or the upper one.
"""

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from unclip_pl.errors import InputError
from unclip_pl.shapes.captions import fill
from unclip_pl.shapes.render import (
    BACKGROUNDS,
    COLOR_JITTER,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    VALUES,
    Split,
    coverage,
    encode,
    pairs,
)

ARRANGEMENTS: dict[str, tuple[str, str]] = {"beside": ("left", "right"), "stacked": ("top", "bottom")}
"""Name -> positions of the first and the second object."""


class Scene(NamedTuple):
    """Attributes of a scene, by name."""

    first_shape: str
    first_color: str
    second_shape: str
    second_color: str
    arrangement: str
    background: str


SCENE_VALUES: dict[str, tuple[str, ...]] = {
    "first_shape": VALUES["shape"],
    "first_color": VALUES["color"],
    "second_shape": VALUES["shape"],
    "second_color": VALUES["color"],
    "arrangement": tuple(ARRANGEMENTS),
    "background": VALUES["background"],
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "beside": ("{first} to the left of {second}", "{second} to the right of {first}"),
    "stacked": ("{first} above {second}", "{second} below {first}", "{first} on top of {second}"),
}
_OBJECT = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
_GROUND = re.compile(rf"\bon an? ({'|'.join(BACKGROUNDS)}) background\b")
_RELATIONS = {
    " to the left of ": ("beside", False),
    " to the right of ": ("beside", True),
    " above ": ("stacked", False),
    " on top of ": ("stacked", False),
    " below ": ("stacked", True),
}
"""What stands between two objects -> arrangement, and whether the second object is named first."""


def draw_scenes(n: int, *, split: Split, rng: np.random.Generator) -> list[Scene]:
    """Draw n scenes: uniformly two (shape, colour) pairs of the split whose colours differ, the rest uniformly."""
    allowed = [(a, b) for a, b in product(pairs(split), repeat=2) if a[1] != b[1]]
    ranges = (len(allowed), len(ARRANGEMENTS), len(BACKGROUNDS))
    arrangements, backgrounds = SCENE_VALUES["arrangement"], SCENE_VALUES["background"]
    draws = rng.integers(ranges, size=(n, len(ranges))).tolist()
    return [Scene(*(*allowed[i][0], *allowed[i][1], arrangements[j], backgrounds[k])) for i, j, k in draws]


def cells(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return (N, 2, 3) long: indices of shape, size and position of both objects of each scene."""
    small, names, where = list(SIZES).index("small"), VALUES["shape"], list(POSITIONS)
    rows = [
        [
            [names.index(shape), small, where.index(position)]
            for shape, position in zip((s.first_shape, s.second_shape), ARRANGEMENTS[s.arrangement], strict=True)
        ]
        for s in scenes
    ]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2, 3)


def render_scenes(scenes: Sequence[Scene], *, size: int = 64, rng: np.random.Generator) -> np.ndarray:
    """Draw scenes with fresh jitter. Picture i depends on `scenes[i]` and the i-th draw of `rng` alone.

    Args:
        scenes: N scenes.
        size: side in pixels, even.
        rng: source of the jitter in position, scale, rotation and colours.

    Returns:
        (N, size, size, 3) uint8, sRGB.
    """
    if size < 2 or size % 2:
        raise InputError(f"Expected an even size, since each object has its half. Got {size}: give {size + 1}.")
    images = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    indices, objects = encode(scenes, SCENE_VALUES), cells(scenes)
    jitter = torch.from_numpy(rng.uniform(-1, 1, (len(scenes), 17)).astype(np.float32))
    palette, grounds = torch.tensor(list(COLORS.values())), torch.tensor(list(BACKGROUNDS.values()))
    colors = palette[indices[:, [1, 3]]] + COLOR_JITTER * jitter[:, 8:14].unflatten(1, (2, 3))
    background = grounds[indices[:, 5]] + COLOR_JITTER * jitter[:, 14:]
    chunk = max(1, 2**17 // size**2)  # stays in cache
    for start in range(0, len(scenes), chunk):
        part = slice(start, start + chunk)
        masks = coverage(objects[part].flatten(0, 1), jitter[part, :8].reshape(-1, 4), size)
        pixels = background[part, None, None]
        for place, mask in enumerate(masks.unflatten(0, (-1, 2)).unbind(1)):
            pixels = torch.lerp(pixels, colors[part, place, None, None], mask[..., None])
        images[part] = (pixels * 255).round().to(torch.uint8).numpy()
    return images


def scene_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Write a caption that states both objects and how they lie, and the background in half of the cases.

    Returns:
        Text, and the stated attributes by name.
    """
    templates = TEMPLATES[scene.arrangement]
    text, said = templates[rng.integers(len(templates))], rng.integers(2)
    objects = {
        "first": f"a {scene.first_color} {scene.first_shape}",
        "second": f"a {scene.second_color} {scene.second_shape}",
    }
    stated = {name: value for name, value in scene._asdict().items() if name != "background" or said}
    return fill(text + f" on a {scene.background} background" * said, objects), stated


def parse_scene(caption: str) -> dict[str, str]:
    """Find the attributes that a caption states: the exact inverse of `scene_caption`.

    A caption of another form states nothing. Case and punctuation do not matter.
    """
    text = " ".join(re.findall(r"[a-z]+", caption.lower().replace("grey", "gray")))
    objects = list(_OBJECT.finditer(text))
    if len(objects) != 2:
        return {}
    one, two = objects
    between = re.sub(r" an? $", " ", text[one.end() : two.start()])
    if between not in _RELATIONS:
        return {}
    arrangement, turned = _RELATIONS[between]
    first, second = (two, one) if turned else (one, two)
    ground = _GROUND.search(text)
    stated = {
        "first_shape": first[2],
        "first_color": first[1],
        "second_shape": second[2],
        "second_color": second[1],
        "arrangement": arrangement,
    }
    return stated | ({"background": ground[1]} if ground else {})
