"""Words over shapes: the name of a shape, written over a picture, as in a typographic attack (§4 of the paper).

The letters are our own. A font of the system or of a library would differ between machines.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.shapes.render import SHAPES, Attributes, Split, encode, places

#: Side of the pictures that the letters are drawn for; a word is 10 px high there.
SIDE = 64
_LETTERS = "acdeghilmnoqrstu"
_FONT = """
.###. .###. ####. ##### .###. #...# .###. #.... #...# #...# .###. .###. ####. .#### ##### #...#
#...# #...# #...# #.... #...# #...# ..#.. #.... ##.## ##..# #...# #...# #...# #.... ..#.. #...#
#...# #.... #...# #.... #.... #...# ..#.. #.... #.#.# ##..# #...# #...# #...# #.... ..#.. #...#
#...# #.... #...# ####. #.... ##### ..#.. #.... #.#.# #.#.# #...# #...# ####. .###. ..#.. #...#
##### #.... #...# #.... #.### #...# ..#.. #.... #...# #.#.# #...# #...# #.#.. ....# ..#.. #...#
#...# #.... #...# #.... #...# #...# ..#.. #.... #...# #..## #...# #.#.# #..#. ....# ..#.. #...#
#...# #...# #...# #.... #...# #...# ..#.. #.... #...# #..## #...# #..#. #...# ....# ..#.. #...#
#...# .###. ####. ##### .###. #...# .###. ##### #...# #...# .###. .##.# #...# ####. ..#.. .###.
"""


def draw_words(attributes: Sequence[Attributes], *, split: Split, rng: np.random.Generator) -> list[str]:
    """Draw the word over each picture: in train and val any shape's name or, in half of the pictures, none.

    Every picture of heldout has a word, which is never the name of its own shape.

    Args:
        attributes: N pictures.
        split: split of the pictures.
        rng: source of the draws.

    Returns:
        N words; an empty one is none.
    """
    names = list(SHAPES)
    if split == "heldout":
        others = [[name for name in names if name != own.shape] for own in attributes]
        return [other[rng.integers(len(other))] for other in others]
    return [names[rng.integers(len(names))] if rng.integers(2) else "" for _ in attributes]


def write_words(images: np.ndarray, attributes: Sequence[Attributes], words: Sequence[str]) -> np.ndarray:
    """Write words over the shapes of pictures, white with a black edge.

    Args:
        images: (N, H, H, 3) uint8, as rendered; H is at least 64.
        attributes: attributes of the N pictures.
        words: N names of shapes; an empty one leaves its picture as it is.

    Returns:
        (N, H, H, 3) uint8, a copy.

    Raises:
        InputError: the pictures are too small to be written on.
    """
    side = images.shape[1]
    if side < SIDE:
        raise InputError(
            f"Expected pictures of at least {SIDE} px to write words on. Got {side} px: give --size {SIDE}."
        )
    images = images.copy()
    _, centres = places(encode(attributes)[:, [0, 2, 3]])
    for image, word, (x, y) in zip(images, words, (side * centres).tolist(), strict=True):
        if word:
            ink, edge = (part.repeat(side // SIDE, 0).repeat(side // SIDE, 1) for part in stencil(word))
            height, width = ink.shape
            top, left = (min(max(0, round(at - length / 2)), side - length) for at, length in ((y, height), (x, width)))
            below = image[top : top + height, left : left + width]
            below[edge], below[ink] = 0, 255
    return images


def stencil(word: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of a word's letters and of their edge, (10, W) bool each."""
    rows = [line.split() for line in _FONT.split("\n") if line]
    shown = [".".join(row[_LETTERS.index(letter)] for letter in word) for row in rows]
    ink = np.pad(np.array([[pixel == "#" for pixel in row] for row in shown]), 1)
    grown = F.max_pool2d(torch.from_numpy(ink).float()[None], 3, stride=1, padding=1)[0].bool().numpy()
    return ink, grown & ~ink
