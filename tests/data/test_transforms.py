import io

import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.data import transforms
from unclip_pl.data.transforms import BadSample, center_square, decode_image, load_square, to_pixels


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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable image"),
        (b"not an image", "undecodable image"),
        (encoded(Image.new("RGB", (64, 64)))[:60], "undecodable image"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "undecodable image"),
        (encoded(Image.new("I;16", (4, 4))), "more than 8 bits a channel"),
    ],
)
def test_bad_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=f"^{reason}$"):
        decode_image(data)


def test_bombs_are_refused_before_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 100)
    with pytest.raises(BadSample, match="image too large"):
        decode_image(encoded(Image.new("RGB", (11, 10))))


def test_pixels_span_minus_one_to_one() -> None:
    assert to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
