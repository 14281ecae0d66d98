import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from unclip_pl.data import transforms
from unclip_pl.data.transforms import BadSample, center_square, decode_image, load_square, to_pixels, without_metadata


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_round_trip_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    loaded = load_square(encoded(Image.fromarray(pixels)), 8)
    assert loaded.shape == (3, 8, 8)
    assert np.array_equal(loaded.permute(1, 2, 0), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    if mode == "P":
        image.info["transparency"] = 0
        image.putdata([0] * 16)
    assert decode_image(encoded(image)).getpixel((1, 1)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


def test_crop_is_the_centre_of_the_shorter_side() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    square = center_square(Image.fromarray(pixels), 10)
    assert np.asarray(square).min() == 255
    assert center_square(Image.fromarray(pixels), 5).size == (5, 5)
    assert center_square(Image.new("RGB", (7, 999)), 64).size == (64, 64)


def test_square_is_what_clip_would_cut() -> None:
    """torchvision's resize and centre crop are open_clip's own preprocessing."""
    rng = np.random.default_rng(0)
    for width, height in [(37, 52), (52, 37), (64, 64), (33, 400), (31, 32), (1, 1), (86, 254)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = center_crop(resize(image, 32, InterpolationMode.BICUBIC), 32)
        assert np.array_equal(center_square(image, 32), theirs)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "1"])
def test_other_colour_modes_are_converted(mode: str) -> None:
    image = Image.linear_gradient("L").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    kept = encoded(image, kind, quality=100, subsampling=0) if kind == "JPEG" else encoded(image)
    expected = np.asarray(image.convert("RGB"), np.int16)
    assert np.abs(np.asarray(decode_image(kept), np.int16) - expected).max() <= (3 if kind == "JPEG" else 0)


def png(width: int, height: int, bits: int, kind: int, rows: list[bytes], key: bytes = b"") -> bytes:
    """A PNG of a bit depth that Pillow does not write; ``key`` is its transparent colour."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
        *([(b"tRNS", key)] if key else []),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("bits", "values"), [(1, [0, 255]), (2, [0, 85, 170, 255]), (4, [17 * i for i in range(16)])])
def test_a_transparent_grey_is_that_of_the_file_s_own_depth(bits: int, values: list[int]) -> None:
    """Pillow spreads greys of few bits over 8, and leaves the transparent one as it is written."""
    digits = "".join(f"{i:0{bits}b}" for i in range(2**bits)).ljust(8, "0")
    row = bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    for key in range(2**bits):
        image = decode_image(png(2**bits, 1, bits, 0, [row], struct.pack(">H", key)))
        expected = [255 if i == key else value for i, value in enumerate(values)]
        assert np.asarray(image)[0, :, 0].tolist() == expected


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    row = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    with pytest.raises(BadSample, match="transparency of more than 8 bits"):
        decode_image(png(1, 1, 16, 2, [row], row))


@pytest.mark.parametrize("channels", [0, 2])
def test_sixteen_bits_keep_their_upper_eight(channels: int) -> None:
    """Grey (colour type 0) and RGB (2) alike; Pillow alone would clip the one to white and shift the other."""
    values = (np.arange(64, dtype=np.uint16) * 1037).reshape(8, 8)
    pixels = np.repeat(values[..., None], 3 if channels else 1, axis=2)
    image = decode_image(png(8, 8, 16, channels, [row.astype(">u2").tobytes() for row in pixels]))
    assert np.array_equal(np.asarray(image), np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    options = {} if kind == "PNG" else {"lossless": True}
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(moving).getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_an_image() -> None:
    assert (
        load_square(encoded(Image.new("RGB", (1, 1), "teal")), 16) == torch.tensor([0, 128, 128])[:, None, None]
    ).all()


def chunked(kind: bytes, body: bytes, *, crc: int | None = None, last: bool = False) -> bytes:
    """A red PNG with one more chunk, behind its header or before its end."""
    data, chunk = encoded(Image.new("RGB", (8, 8), "red")), kind + body
    check = zlib.crc32(chunk) if crc is None else crc
    place = len(data) - 12 if last else 33
    return data[:place] + struct.pack(">I", len(body)) + chunk + struct.pack(">I", check) + data[place:]


def segmented(*segments: tuple[int, bytes]) -> bytes:
    """A red JPEG with more segments behind its first."""
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    more = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:20] + more + data[20:]


def webp(kind: bytes, body: bytes) -> bytes:
    """A red WebP with one more chunk."""
    data = encoded(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True, exif=b"Exif\0\0junkjunk")
    data = data[:12] + data[12:].replace(b"EXIF", b"JUNK") + kind + struct.pack("<I", len(body)) + body
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


LARGE = zlib.compress(b"a node " * 300_000)
JUNK_EXIF = b"\0\x08\0\x02\x01\x12\0\x03"
GOOD_METADATA_GONE_BAD = {
    "EXIF of a PNG": chunked(b"eXIf", JUNK_EXIF),
    "large text": chunked(b"zTXt", b"workflow\0\0" + LARGE),
    "large text at the end": chunked(b"zTXt", b"workflow\0\0" + LARGE, last=True),
    "large international text": chunked(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    "large profile": chunked(b"iCCP", b"wide\0\0" + LARGE),
    "broken profile": chunked(b"iCCP", b"wide\0\0" + b"no zlib"),
    "checksum of a text": chunked(b"tEXt", b"a\0b", crc=1),
    "cut physical size": chunked(b"pHYs", b"\0"),
    "EXIF of a JPEG": segmented((0xE1, b"Exif\0\0junkjunk")),
    "cut EXIF of a JPEG": segmented((0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x09")),
    "cut application data": segmented((0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04")),
    "profile in pieces": segmented((0xE2, b"ICC_PROFILE\0\1"), (0xE2, b"ICC_PROFILE\0")),
    "index of more pictures": segmented((0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x09")),
    "EXIF of a WebP": encoded(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True, exif=b"Exif\0\0junkjunk"),
    "unknown chunk of a WebP": webp(b"ABCD", b"12"),
}


@pytest.mark.filterwarnings("ignore:.*MPO")
@pytest.mark.parametrize("name", GOOD_METADATA_GONE_BAD)
def test_only_pixels_make_an_image_undecodable(name: str) -> None:
    pixels = np.asarray(decode_image(GOOD_METADATA_GONE_BAD[name])).astype(int)
    assert np.abs(pixels - (255, 0, 0)).max() <= 2


def test_metadata_that_is_left_out_takes_no_orientation_with_it() -> None:
    wide = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, junk in (("PNG", chunked(b"zTXt", b"a\0\0" + LARGE)[33:-12]), ("JPEG", b"")):
        data = encoded(wide, kind, exif=exif)
        data = data[:33] + junk[: junk.index(b"IDAT") - 4] + data[33:] if junk else data
        assert decode_image(data).size == (4, 8)
        assert decode_image(without_metadata(data)).size == (4, 8)


def test_an_image_without_metadata_is_the_same() -> None:
    """The bytes of every kind of file are cut at the right places."""
    picture = Image.effect_noise((40, 30), 90).convert("RGBA")
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, options in (("PNG", {}), ("JPEG", {"comment": b"x"}), ("JPEG", {"progressive": True}), ("WEBP", {})):
        image = picture if kind != "JPEG" else picture.convert("CMYK")
        data = encoded(image, kind, icc_profile=icc, **options)
        bare = without_metadata(data)
        assert len(bare) < len(data) - len(icc) // 4
        assert decode_image(bare).tobytes() == decode_image(data).tobytes()
        assert without_metadata(bare) == bare


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"not an image", "no PNG, JPEG or WebP image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of git-lfs"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "no PNG, JPEG or WebP image"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "no PNG, JPEG or WebP image"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "undecodable image"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "undecodable image"),
        (encoded(Image.new("RGB", (64, 64)), "WEBP")[:40], "undecodable image"),
        (encoded(Image.new("RGB", (64, 64)))[:50] + b"?" * 200, "undecodable image"),
        (b"\x89PNG\r\n\x1a\n", "undecodable image"),
    ],
)
def test_bad_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=f"^{reason}$"):
        decode_image(data)


def claiming(kind: str, side: int) -> bytes:
    """A file of a few bytes whose header announces side x side pixels."""
    if kind == "PNG":
        data = bytearray(encoded(Image.new("L", (8, 8))))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif kind == "JPEG":
        data = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
    else:
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
        place = data.index(b"VP8L") + 9
        data[place : place + 4] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize(("kind", "side"), [("PNG", 12_000), ("PNG", 2**31 - 1), ("JPEG", 65_000), ("WEBP", 16_000)])
def test_decompression_bombs_are_refused_by_their_header(kind: str, side: int) -> None:
    with pytest.raises(BadSample, match="image too large"):
        decode_image(claiming(kind, side))


def test_narrow_images_do_not_grow_without_bounds() -> None:
    """One pixel by fifty thousand, scaled until its shorter side is 224, would take 7 GB."""
    with pytest.raises(BadSample, match="image too narrow"):
        load_square(encoded(Image.new("1", (50_000, 1))), 224)


def test_bombs_are_refused_before_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 100)
    with pytest.raises(BadSample, match="image too large"):
        decode_image(encoded(Image.new("RGB", (11, 10))))


def test_pixels_span_minus_one_to_one() -> None:
    assert to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
