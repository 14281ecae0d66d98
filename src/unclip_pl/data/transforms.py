"""From bytes of an image file to the square that CLIP sees, and from uint8 to pixels in [-1, 1]."""

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
    """Sample that cannot be used. The text is the reason under which the manifest counts it."""


def suffix_of(data: bytes) -> Encoding:
    """Tell the format of an image file by its first bytes.

    Raises:
        BadSample: the file is none of PNG, JPEG and WebP.
    """
    if not data:
        raise BadSample("empty image file")
    for suffix, magic in _MAGIC.items():
        if magic.match(data):
            return suffix
    raise BadSample("no PNG, JPEG or WebP image")


def decode_image(data: bytes) -> Image.Image:
    """Decode an RGB image, upright by its EXIF tag, transparency over white; of an animation the first frame.

    Raises:
        BadSample: no PNG, JPEG or WebP image, a damaged one, or one of more than ``MAX_PIXELS`` pixels.
        MemoryError: this machine has no room for it, which is not the image's fault.
    """
    suffix_of(data)
    return decode_upright(data, _FORMATS)


def decode_upright(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Decode like :func:`decode_image`, but files of any of some formats that Pillow knows."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:  # by the header, before anything is unpacked
                raise BadSample("image too large")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image too large") from error
    except Exception as error:  # damaged files raise errors from OSError to struct.error inside Pillow
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
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")  # like Pillow with 16-bit RGB
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def scale_shorter(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` (antialiased bicubic), the other in proportion.

    Raises:
        BadSample: the image is so narrow that the longer side would run out of bounds.
    """
    shorter = min(image.size)
    if shorter == size:
        return image
    width, height = (size if side == shorter else int(side * size / shorter) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadSample("image too narrow")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size``, then cut the central square, like CLIP's own preprocessing.

    Raises:
        BadSample: see :func:`scale_shorter`.
    """
    image = scale_shorter(image, size)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def load_square(data: bytes, size: int) -> Tensor:
    """Decode the bytes of an image file to (3, size, size) uint8.

    Raises:
        BadSample: see :func:`decode_image`.
    """
    pixels = np.array(center_square(decode_image(data), size))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pixels(image: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return image.float().div_(127.5).sub_(1)
