"""Bytes of an image file → the square that CLIP sees, and pixels between uint8 and [-1, 1]."""

import io
import re
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Encoding = Literal["png", "jpg", "webp"]

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAGIC: dict[Encoding, re.Pattern[bytes]] = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}

#: More pixels than this are taken for a decompression bomb: 8,192 × 8,192.
MAX_PIXELS = 2**26


class BadSample(ValueError):
    """A sample that cannot be used. Its text is the reason under which the manifest counts it."""


def suffix_of(data: bytes) -> Encoding:
    """The format of an image file, by its first bytes.

    Raises:
        BadSample: none of PNG, JPEG and WebP.
    """
    if not data:
        raise BadSample("empty image file")
    for suffix, magic in _MAGIC.items():
        if magic.match(data):
            return suffix
    raise BadSample("no PNG, JPEG or WebP image")


def decode_image(data: bytes) -> Image.Image:
    """An RGB image, upright by its EXIF tag, transparency over white; of an animation the first frame.

    Raises:
        BadSample: no PNG, JPEG or WebP image, a damaged one, or one of more than ``MAX_PIXELS`` pixels.
        MemoryError: no room for it on this machine, which is not the image's fault.
    """
    suffix_of(data)
    return decode_upright(data, _FORMATS)


def decode_upright(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """As :func:`decode_image`, for files of some of Pillow's formats."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:  # the header's word, before anything is unpacked
                raise BadSample("image too large")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image too large") from error
    except Exception as error:  # what damaged files raise inside Pillow ranges from OSError to struct.error
        raise BadSample("undecodable image") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadSample("pixels of floating point")
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it to 255 without a word
        if "transparency" in image.info:
            raise BadSample("transparency of more than 8 bits")
        values = np.asarray(image)
        if values.max() > 0xFFFF or values.min() < 0:
            raise BadSample("pixels of more than 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")  # what Pillow does to 16-bit RGB
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def scale_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size`` (antialiased bicubic), the other in proportion.

    Raises:
        BadSample: it is so narrow that the longer side would run out of bounds.
    """
    shorter = min(image.size)
    if shorter == size:
        return image
    width, height = (size if side == shorter else int(side * size / shorter) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample("image too narrow")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size``, then the central square: what CLIP's own preprocessing does.

    Raises:
        BadSample: see :func:`scale_shorter`.
    """
    image = scale_shorter(image, size)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def load_square(data: bytes, size: int) -> Tensor:
    """Bytes of an image file → (3, size, size) uint8.

    Raises:
        BadSample: see :func:`decode_image`.
    """
    pixels = np.array(center_square(decode_image(data), size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pixels(image: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return image.float().div_(127.5).sub_(1)
