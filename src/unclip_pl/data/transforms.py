"""From bytes of an image file to the square that CLIP sees, and from uint8 to pixels in [-1, 1]."""

import io
import re
import struct
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from unclip_pl.files import LFS

Encoding = Literal["png", "jpg", "webp"]

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAGIC: dict[Encoding, re.Pattern[bytes]] = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}

#: Chunks on which pixels depend, and the EXIF tag: in a PNG the critical ones, which have a capital first.
_PNG_PIXELS = re.compile(rb"[A-Z]|tRNS|acTL|fcTL|fdAT|eXIf")
_WEBP_PIXELS = re.compile(rb"VP8|ALPH|ANIM|ANMF|EXIF")
#: What makes a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
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
    raise BadSample("pointer of git-lfs" if data.startswith(LFS) else "no PNG, JPEG or WebP image")


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
    with opened(data, formats) as image:
        return _rgb(_upright(image))


def opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image file and decode it. Metadata that Pillow refuses is left out: no pixel depends on it.

    Raises:
        BadSample: a damaged image, or one of more than ``MAX_PIXELS`` pixels.
        MemoryError: this machine has no room for it.
    """
    try:
        return _loaded(data, formats)
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image too large") from error
    except Exception as error:  # damaged files raise errors from OSError to struct.error inside Pillow
        bare = without_metadata(data)
        if bare == data:
            raise BadSample("undecodable image") from error
        return opened(bare, formats)


def _loaded(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:  # by the header, before anything is unpacked
        raise BadSample("image too large")
    image.load()
    _scale_key(image, data)
    return image


def _scale_key(image: Image.Image, data: bytes) -> None:
    """Bring a PNG's transparent colour to the 8 bits that Pillow gives its pixels; Pillow leaves it as it is written.

    Raises:
        BadSample: it has 16 bits, of which 8 cannot tell it from its neighbours.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or isinstance(key, bytes | None) or image.mode == "P":
        return
    bits = data[24]  # of a channel, in the header
    if bits == 16:
        raise BadSample("transparency of more than 8 bits")
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = key * (255 // (2**bits - 1))


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # junk raises errors from SyntaxError to struct.error inside Pillow
        return 1
    return found if found in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def without_metadata(data: bytes) -> bytes:
    """Return a PNG, JPEG or WebP file without what no pixel depends on; the EXIF tag stays. Others stay as they are."""
    if _MAGIC["png"].match(data):
        return data[:8] + b"".join(_chunks(data, 8, 8, 4, ">I", _PNG_PIXELS, 0))
    if _MAGIC["webp"].match(data):
        kept = b"".join(_chunks(data, 12, 8, 0, "<I", _WEBP_PIXELS, 1))
        return b"RIFF" + struct.pack("<I", len(kept) + 4) + data[8:12] + kept
    return b"".join(_segments(data)) if _MAGIC["jpg"].match(data) else data


def _chunks(
    data: bytes, at: int, head: int, tail: int, size: str, kept: re.Pattern[bytes], padded: int
) -> Iterator[bytes]:
    """Yield the chunks whose name is kept. It stands behind the chunk's size in a PNG, before it in a WebP."""
    name, length = (4, 0) if size == ">I" else (0, 4)
    while at + head <= len(data):
        (count,) = struct.unpack_from(size, data, at + length)
        end = at + head + count + (count & padded) + tail
        if kept.match(data, at + name):
            yield data[at:end]
        at = end
    yield data[at:]


def _segments(data: bytes) -> Iterator[bytes]:
    """Yield a JPEG's segments without comments and application data; JFIF's, EXIF's and Adobe's own stay."""
    yield data[:2]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the start of the scan
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        marker = data[at + 1]
        is_exif = marker == 0xE1 and data[at + 4 : at + 8] == b"Exif"
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in (0xE0, 0xEE) or is_exif:
            yield data[at:end]
        at = end
    yield data[at:]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadSample("pixels of floating point")
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it to 255 without a word
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
