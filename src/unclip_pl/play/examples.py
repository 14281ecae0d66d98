"""Choose what there is to click: captions and pictures that a run knows."""

import json
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
#: Captions for a run of whose data nothing is known.
ANY = ("a photograph of a lighthouse at sunset", "an oil painting of a fox", "a red bicycle in front of a white wall")


class Examples(NamedTuple):
    """Examples of a run."""

    captions: list[str]
    pictures: list[str]  # image files; none where no pictures of the run are at hand
    told: list[str]  # caption of each picture


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
        return Examples(captions, _save([Image.fromarray(image) for image in pixels], folder), told)
    report, grid = run.root / "report.json", run.root / "plots" / "grid.png"
    pictures = json.loads(report.read_bytes()).get("pictures", {}) if report.is_file() else {}
    if "grid" not in pictures or not grid.is_file() or REAL not in pictures["grid"]["columns"]:
        return Examples(list(ANY), [], [])
    sheet = Sheet.load(grid, **pictures["grid"])
    true = sheet.images[:FEW, sheet.columns.index(REAL)]
    return Examples(sheet.rows[:FEW], _save([to_image(image) for image in true], folder), sheet.rows[:FEW])


def _save(images: list[Image.Image], folder: Path) -> list[str]:
    paths = [folder / f"example-{number}.png" for number in range(1, len(images) + 1)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]
