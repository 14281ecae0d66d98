"""Choose what there is to click: captions and pictures that a run knows."""

import json
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.evaluation.sheet import REAL, Sheet
from unclip_pl.files import read_lines
from unclip_pl.generation.pictures import to_image
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.provenance import trained_on_shapes
from unclip_pl.settings import PROMPTS, find
from unclip_pl.shapes.render import Attributes, render

#: Most of a kind.
FEW = 6
#: Pictures of a run on shapes.
SHAPES = (
    Attributes("star", "red", "large", "center", "navy"),
    Attributes("circle", "blue", "large", "left", "white"),
    Attributes("heart", "pink", "large", "center", "black"),
    Attributes("cross", "purple", "large", "right", "gray"),
    Attributes("ring", "yellow", "small", "top", "navy"),
    Attributes("square", "green", "small", "bottom", "white"),
)
#: Text diffs of them: the picture's number, what it shows, what it should show.
DIFFS = (
    (0, "a red star", "a blue circle"),
    (1, "a blue circle on white", "a blue circle on black"),
    (2, "a large heart", "a small heart"),
    (3, "a purple cross on the right", "a purple cross on the left"),
)
#: Masks: the square that is drawn again, left, upper, right and lower, in shares of the side.
MASKS = {"middle": (0.1, 0.1, 0.9, 0.9), "left": (0.0, 0.1, 0.75, 0.9), "half": (0.5, 0.0, 1.0, 1.0)}
#: Parts of the pictures to draw again: the picture's number, a mask, what the whole picture should show.
PARTS = (
    (0, "middle", "a large green heart in the center on a navy background"),
    (1, "left", "a large red star on the left on a white background"),
    (2, "half", ""),
)
#: Captions for a run of whose data nothing is known.
ANY = ("a photograph of a lighthouse at sunset", "an oil painting of a fox", "a red bicycle in front of a white wall")


class Examples(NamedTuple):
    """Examples of a run."""

    captions: list[str]
    pictures: list[str]  # image files; none where no pictures of the run are at hand
    told: list[str]  # caption of each picture
    diffs: list[tuple[str, str, str]]  # a picture's file, what it shows, and what it should show
    parts: list[tuple[str, str, str]]  # a picture's file, a mask's, and what it should show


def examples(run: Unclip, folder: Path) -> Examples:
    """Choose examples: shapes for a run on shapes, otherwise captions and true pictures of the run's report.

    Args:
        run: trained run.
        folder: folder to write pictures into.
    """
    if trained_on_shapes(run.root):
        told = [f"a {a.size} {a.color} {a.shape} on a {a.background} background" for a in SHAPES]
        pixels = render(SHAPES, size=max(32, run.decoder.output_size), rng=np.random.default_rng(0))
        captions = read_lines(find("data/prompts/shapes.txt", PROMPTS), "prompts")[:FEW]
        files = _save([Image.fromarray(image) for image in pixels], folder)
        return Examples(
            captions,
            files,
            told,
            [(files[i], current, caption) for i, current, caption in DIFFS],
            [(files[i], _mask(mask, folder), caption) for i, mask, caption in PARTS],
        )
    report, grid = run.root / "report.json", run.root / "plots" / "grid.png"
    pictures = json.loads(report.read_bytes()).get("pictures", {}) if report.is_file() else {}
    if "grid" not in pictures or not grid.is_file() or REAL not in pictures["grid"]["columns"]:
        return Examples(list(ANY), [], [], [], [])
    sheet = Sheet.load(grid, **pictures["grid"])
    told = sheet.rows[:FEW]
    files = _save([to_image(image) for image in sheet.images[:FEW, sheet.columns.index(REAL)]], folder)
    diffs, masks = list(zip(files, told, told[1:], strict=False)), repeat(_mask("half", folder))
    return Examples(told, files, told, diffs, list(zip(files, masks, told, strict=False)))


def _save(images: list[Image.Image], folder: Path) -> list[str]:
    paths = [folder / f"example-{number}.png" for number in range(1, len(images) + 1)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]


def _mask(name: str, folder: Path) -> str:
    path, mask = folder / f"mask-{name}.png", Image.new("L", (128, 128))
    left, upper, right, lower = (round(128 * share) for share in MASKS[name])
    mask.paste(255, (left, upper, right, lower))
    mask.save(path)
    return str(path)
