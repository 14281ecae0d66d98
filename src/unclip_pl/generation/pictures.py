"""Open image files, and draw labelled grids."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unclip_pl.data.transforms import BadSample, center_square, decode_upright, opened, orientation_of, to_pixels
from unclip_pl.errors import InputError
from unclip_pl.files import replacing

#: Formats that a user's own pictures may have.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Pictures(NamedTuple):
    """B files, opened."""

    names: list[str]
    pixels: Tensor  # (B, 3, size, size) in [-1, 1]
    notes: list[str]  # changes made to each; empty if there were none


def open_pictures(paths: Sequence[str | Path], size: int) -> Pictures:
    """Open the central squares of image files as CLIP sees them: RGB, upright, transparency over white.

    Args:
        paths: PNG, JPEG, WebP, GIF, BMP or TIFF files of any mode and size. An animation gives its first frame.
        size: side in pixels.

    Raises:
        OSError: a file is missing, or is a directory.
        InputError: there are no files, or one is no image, damaged, or has too many pixels or bits.
    """
    if not paths:
        raise InputError("Expected one image file or more. Got none: name some, such as photo.jpg.")
    images, notes = zip(*(_open(Path(path), size) for path in paths), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Pictures([Path(path).name for path in paths], to_pixels(pixels), list(notes))


def open_mask(path: str | Path, picture: str | Path, size: int) -> Tensor:
    """Open the mask of a picture, cut as :func:`open_pictures` cuts the picture: (1, 1, size, size), True where white.

    Args:
        path: image file; white is what is drawn again, black what stays.
        picture: image file of the picture. The mask has its shape, at any resolution.
        size: side in pixels.

    Raises:
        OSError: a file is missing.
        InputError: a file is no image, or the mask has another shape than the picture.
    """
    mask, whole = (_decoded(Path(file)) for file in (path, picture))
    if abs(mask.width * whole.height - mask.height * whole.width) > max(mask.size) * max(whole.size) / 100:
        raise InputError(
            f"Expected a mask of {whole.width} × {whole.height} pixels, as the picture {picture}, or of that shape. "
            f"Got {path} of {mask.width} × {mask.height}: change its shape."
        )
    mask = center_square(mask.resize(whole.size, Image.Resampling.NEAREST), size).convert("L")
    return torch.from_numpy(np.array(mask) > 127)[None, None]


def refuse_transparent(mask: str | Path) -> None:
    """Refuse a mask with transparent parts, which some programs mean to be drawn again and others to stay.

    Raises:
        InputError: it has some.
    """
    with Image.open(mask) as opened:
        if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").tobytes().strip(b"\xff"):
            raise InputError(
                f"Expected a mask of white, which is drawn again, and black. Got {mask}, transparent in parts: "
                "fill them."
            )


def _decoded(path: Path, size: int | None = None) -> Image.Image:
    """Decode a picture, or its central square at a side of ``size``."""
    try:
        image = decode_upright(path.read_bytes(), FORMATS)
        return image if size is None else center_square(image, size)
    except BadSample as error:
        raise InputError(f"Expected an image ({', '.join(FORMATS)}). Got {path}: {error}. Convert it.") from error


def _open(path: Path, size: int) -> tuple[np.ndarray, str]:
    image = _decoded(path, size)
    with opened(path.read_bytes(), FORMATS) as picture:
        return np.array(image), _changes(picture, size)


def _changes(header: Image.Image, size: int) -> str:
    """Say in words what opening changes."""
    said = []
    if header.mode != "RGB":
        said.append(f"{header.mode} to RGB" + (", transparency over white" if header.has_transparency_data else ""))
    if getattr(header, "n_frames", 1) > 1:
        said.append("first frame")
    if orientation_of(header) != 1:
        said.append("turned upright")
    if header.width != header.height:
        said.append(f"cut to its central square of {min(header.size)}")
    if min(header.size) != size:
        said.append(f"resized to {size}")
    return f"{header.width} × {header.height}: {', '.join(said)}" if said else ""


#: Row of a grid: its label, and pictures (3, H, H) in [-1, 1] of any side.
Row = tuple[str, Sequence[Tensor]]

#: Least side of a cell in pixels: smaller pictures are enlarged by a whole number, so that labels fit.
CELL = 96
GAP, FONT_SIZE = 5, 13


def grid(rows: Sequence[Row], columns: Sequence[str] = ()) -> Image.Image:
    """Draw pictures in rows, each row under its label, with the columns' labels on top.

    Args:
        rows: labels and pictures; rows may differ in length.
        columns: labels of the columns; none leaves the top out.
    """
    largest = max(picture.shape[-1] for _, pictures in rows for picture in pictures)
    side = largest * max(1, math.ceil(CELL / largest))
    width = max(len(pictures) for _, pictures in rows) * (side + GAP) + GAP
    heads = [_wrap(label, side) for label in columns]
    labels = [_wrap(label, width - 2 * GAP) for label, _ in rows]
    line = FONT_SIZE + 4
    top = GAP + line * max((head.count("\n") + 1 for head in heads), default=0)
    heights = [line * (label.count("\n") + 1 if label else 0) + side + GAP for label in labels]
    canvas = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, head in enumerate(heads):
        draw.text((GAP + number * (side + GAP) + side / 2, 1), head, "black", _font(), "ma", align="center")
    for (_, pictures), label, height in zip(rows, labels, heights, strict=True):
        draw.text((GAP, top), label, "black", _font())
        for number, picture in enumerate(pictures):
            left, upper = GAP + number * (side + GAP), top + height - side - GAP
            draw.rectangle((left - 1, upper - 1, left + side, upper + side), outline="silver")
            canvas.paste(to_image(picture).resize((side, side), Image.Resampling.NEAREST), (left, upper))
        top += height
    return canvas


def to_bytes(images: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, the way an image file holds them."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_image(picture: Tensor) -> Image.Image:
    """Convert (3, H, W) in [-1, 1] to 8-bit RGB."""
    pixels = to_bytes(picture.detach().cpu())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, path: str | Path, facts: Mapping[str, object]) -> None:
    """Write a PNG that carries facts as texts by name, whole or not at all."""
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, str(value))
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, since Pillow's own has no Greek."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def _wrap(text: str, width: float) -> str:
    """Break a text into lines of at most so many pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
