"""A sample as the files that a tar holds of it: image in the form asked for, captions, JSON."""

import errno
import io
import json
import re
import stat
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.shards import MAX_IMAGE, MAX_TEXT, encode_text
from unclip_pl.data.transforms import BadSample, Encoding, center_square, decode_image, scale_shorter, suffix_of
from unclip_pl.errors import InputError
from unclip_pl.packing.samples import Picture, Sample

_FORMAT: dict[Encoding, str] = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class Form(NamedTuple):
    """How images are stored. An image that nothing is to be done to stays as it is, byte by byte."""

    size: int | None = None  # of the shorter side, in pixels; None keeps every size
    resize: Literal["square", "shorter"] = "square"  # the central square, or the whole picture
    encode: Encoding | None = None  # None keeps each file's format, and makes rendered images PNG
    quality: int = 95  # of JPEG and WebP, 1 to 100

    def check(self) -> None:
        """Raise ValueError where no image can have this form."""
        if self.size is None and self.resize != "square":
            raise InputError(f"Expected a size to resize to ({self.resize}). Got none: give --size.")
        if self.size is not None and not 0 < self.size <= 8192:
            raise InputError(f"Expected a size of 1 to 8192 pixels. Got {self.size}.")
        if not 1 <= self.quality <= 100:
            raise InputError(f"Expected a quality of 1 to 100. Got {self.quality}.")


def members_of(sample: Sample, form: Form) -> list[tuple[str, bytes]]:
    """Suffix and bytes of each file of a sample in a tar.

    Raises:
        BadSample: no usable image or caption.
        OSError: the disk cannot be read.
    """
    captions = _captions(sample.captions)
    meta = {"captions": captions, **sample.extra}
    return [
        _image(sample.image, form),
        ("txt", encode_text("\n".join(captions))),
        ("json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()),
    ]


def _captions(captions: list[str]) -> list[str]:
    """The usable ones, a line each."""
    lines = list(dict.fromkeys(" ".join(text.split()) for text in captions))
    good = [line for line in lines if line and not re.search("[\ud800-\udfff]", line)]
    if not good:
        raise BadSample("undecodable caption" if any(lines) else "no caption")
    if sum(len(encode_text(line)) + 1 for line in good) > MAX_TEXT:
        raise BadSample("caption too long")
    return good


def _image(image: Picture, form: Form) -> tuple[str, bytes]:
    """Suffix and bytes of an image in its form."""
    if isinstance(image, BadSample):
        raise image
    if isinstance(image, Path):
        image = _read(image)
    if isinstance(image, bytes):
        suffix = suffix_of(image)
        if form.size is None and form.encode in (None, suffix):
            return suffix, image
        picture = decode_image(image)
    else:
        suffix, picture = "png", Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if form.size is not None:
        picture = (center_square if form.resize == "square" else scale_shorter)(picture, form.size)
    encode = form.encode or suffix
    if encode == "webp" and max(picture.size) > 16383:
        raise BadSample("image too large for WebP")
    buffer = io.BytesIO()
    options = {} if encode == "png" else {"quality": form.quality}
    picture.save(buffer, _FORMAT[encode], **options)
    return encode, buffer.getvalue()


def _read(path: Path) -> bytes:
    """Bytes of a file; what is wrong with the disk itself is no bad sample."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("no plain file")
        if found.st_size > MAX_IMAGE:
            raise BadSample("image too large")
        return path.read_bytes()
    except PermissionError as error:
        raise BadSample("unreadable file") from error
    except BadSample:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno not in (
            errno.ENOENT,
            errno.ENOTDIR,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        ):
            raise
        raise BadSample("missing file") from error
