"""Bytes of an image file → the square that CLIP sees, and pixels between uint8 and [-1, 1]."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")

#: More pixels than this are taken for a decompression bomb: 8,192 × 8,192.
MAX_PIXELS = 2**26


class BadSample(ValueError):
    """A sample that cannot be used. Its text is the reason under which the manifest counts it."""


def decode_image(data: bytes) -> Image.Image:
    """An RGB image, upright by its EXIF tag, transparency over white.

    Raises:
        BadSample: no PNG, JPEG or WebP image, a damaged one, or one of more than ``MAX_PIXELS`` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # the header's word, before anything is unpacked
                raise BadSample("image too large")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image too large") from error
    except Exception as error:  # what damaged files raise inside Pillow ranges from OSError to struct.error
        raise BadSample("undecodable image") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip 16 bits to 8 without a word
        raise BadSample("more than 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size`` (antialiased bicubic), then the central square: what CLIP's own preprocessing does."""
    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = (size if side == min(width, height) else int(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
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
