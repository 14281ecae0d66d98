"""Image files of every kind come in as what they show; grids go out with what made them."""

import io
import math
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from unclip_pl.generation.decoding import resize
from unclip_pl.generation.pictures import CELL, FONT_SIZE, GAP, grid, open_pictures, save_png

TEAL = (0, 128, 128)
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3


def written(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


KINDS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "webp": ("L", "RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in KINDS.items() for mode in modes])
def test_any_mode_and_format(kind: str, mode: str, tmp_path: Path) -> None:
    if (kind, mode) == ("tiff", "YCbCr") and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read such a file that it wrote itself")
    white = Image.new("RGB", (20, 20), "white").convert("P")
    image = Image.new(mode, (20, 20), 65535) if mode == "I;16" else white.convert(mode)
    opened = open_pictures([written(tmp_path, image, f"x.{kind}")], 8)
    torch.testing.assert_close(opened.pixels, torch.ones(1, 3, 8, 8), rtol=0, atol=0.02)
    assert "resized to 8" in opened.notes[0]


def test_the_central_square_upright_and_what_was_done(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, 8:24] = TEAL  # the upper half of the central square
    path = written(tmp_path, Image.fromarray(pixels), "x.png", exif=UPSIDE_DOWN)
    opened = open_pictures([path], 16)
    expected = torch.tensor(TEAL).div(127.5).sub(1)[:, None, None].expand(3, 8, 16)
    torch.testing.assert_close(opened.pixels[0, :, 8:], expected)
    torch.testing.assert_close(opened.pixels[0, :, :8], -torch.ones(3, 8, 16))
    assert opened.notes == ["32 × 16: turned upright, cut to its central square of 16"]
    assert opened.names == ["x.png"]


def test_transparency_is_white_and_said(tmp_path: Path) -> None:
    opened = open_pictures([written(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "x.png")], 8)
    assert opened.pixels.eq(1).all()
    assert opened.notes == ["8 × 8: RGBA to RGB, transparency over white"]


def test_nothing_to_say_of_a_picture_that_fits(tmp_path: Path) -> None:
    assert open_pictures([written(tmp_path, Image.new("RGB", (8, 8), TEAL), "x.png")], 8).notes == [""]


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one image file or more. Got none"):
        open_pictures([], 8)
    for path in (tmp_path, tmp_path / "nowhere.png"):
        with pytest.raises(OSError, match=path.name):
            open_pictures([path], 8)
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"Expected an image .*Got .*notes.png: undecodable image"):
        open_pictures([text], 8)
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), TEAL).save(whole, "JPEG")
    text.write_bytes(whole.getvalue()[:-200])
    with pytest.raises(ValueError, match="undecodable image"):
        open_pictures([text], 8)
    deep = written(tmp_path, Image.new("F", (8, 8)), "x.tiff")
    with pytest.raises(ValueError, match="floating point"):
        open_pictures([deep], 8)
    deep = written(tmp_path, Image.new("I", (8, 8), 70_000), "y.tiff")
    with pytest.raises(ValueError, match="more than 16 bits"):
        open_pictures([deep], 8)


def test_a_grid_shows_every_picture_at_one_size_in_its_place() -> None:
    colors = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(-1, 3, 8, 8)
    rows = [("first", [colors[0], colors[1], colors[2]]), ("η → θ", [colors[3], colors[4, :, :4, :4]])]
    image = np.asarray(grid(rows, ["a", "b", "c"]))
    side = 8 * math.ceil(CELL / 8)
    assert image.shape[1] == 3 * (side + GAP) + GAP
    for (row, column), color in {(0, 0): 0, (0, 2): 2, (1, 0): 3, (1, 1): 4}.items():
        bottom = len(image) - GAP - (1 - row) * (FONT_SIZE + 4 + side + GAP)
        cell = image[bottom - side : bottom, GAP + column * (side + GAP) :][:, :side]
        assert (cell == round(color / 5 * 255)).all(), (row, column)


def test_long_labels_are_wrapped_and_none_take_no_room() -> None:
    picture = torch.zeros(3, CELL, CELL)
    plain, labelled, long = (grid([(text, [picture])]) for text in ("", "a", "a small green ring on black"))
    assert plain.size == (CELL + 2 * GAP, CELL + GAP + GAP)
    assert plain.height < labelled.height < long.height
    assert long.width == plain.width


def test_a_png_carries_what_made_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.png"
    save_png(Image.new("RGB", (2, 2)), path, {"caption": "ein roter Kreis, Ψ", "seed": 7})
    assert Image.open(path).text == {"caption": "ein roter Kreis, Ψ", "seed": "7"}
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 64, 48)])
def test_pictures_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"square pictures. Got .*: give square ones"):
        resize(torch.zeros(shape), 64)
