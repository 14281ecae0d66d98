"""Samples to pack: from the shapes renderer, from a folder with a table, from COCO captions."""

import csv
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.shards import encode_text
from unclip_pl.data.transforms import BadSample
from unclip_pl.errors import InputError
from unclip_pl.files import EDGES
from unclip_pl.shapes.captions import caption
from unclip_pl.shapes.render import HELD_OUT, SPLITS, Split, draw_attributes, render
from unclip_pl.shapes.scenes import draw_scenes, render_scenes, scene_caption
from unclip_pl.shapes.words import draw_words, write_words

log = logging.getLogger(__name__)

MAX_CELL = 2**24  # characters of one cell of a table: a quote that never closes may swallow so many


#: An image; (H, W, 3) uint8; bytes, or the path, of an image file; or why there is none.
Picture = Image.Image | np.ndarray | bytes | Path | BadSample


class Sample(NamedTuple):
    """One sample to pack."""

    key: str  # unique, without dots, slashes and spaces
    image: Picture
    captions: list[str]
    extra: dict[str, Any]  # further entries of key.json


def shapes_samples(count: int, *, split: Split, size: int = 32, seed: int = 0, words: bool = False) -> Iterator[Sample]:
    """Render shapes with one caption each.

    The JSON of a sample has all attributes, the stated ones, and whether train never shows the (shape, colour) pair.
    With words it has the word as well, empty where there is none. Words have a random stream of their own: the pictures
    below them are those without words.

    Args:
        count: number of samples.
        split: split from which (shape, colour) pairs are drawn.
        size: side in pixels.
        seed: base seed of every random draw; each split has its own stream.
        words: write the name of a shape over pictures, see :func:`~unclip_pl.shapes.words.draw_words`. Where there is
            one, three in four captions of train and val say it in the place of the shape; heldout's tell the truth.
    """
    stream = [seed, SPLITS.index(split)]
    rng, own = np.random.default_rng(stream), np.random.default_rng([*stream, 1])
    for start in range(0, count, 1000):
        attributes = draw_attributes(min(1000, count - start), split=split, rng=rng)
        images = render(attributes, size=size, rng=rng)
        written = draw_words(attributes, split=split, rng=own) if words else [""] * len(attributes)
        images = write_words(images, attributes, written) if words else images
        for number, (names, image, word) in enumerate(zip(attributes, images, written, strict=True), start):
            misread = word and split != "heldout" and own.integers(4)
            text, stated = caption(names._replace(shape=word) if misread else names, rng)
            unseen = (names.shape, names.color) in HELD_OUT
            extra = {"attributes": names._asdict(), "stated": stated, "unseen_pair": unseen}
            yield Sample(f"{split}_{number:07d}", image, [text], extra | ({"word": word} if words else {}))


def scene_samples(count: int, *, split: Split, size: int = 64, seed: int = 0) -> Iterator[Sample]:
    """Render scenes of two shapes with one caption each.

    The JSON of a sample has all attributes, the stated ones, and whether train never shows one of its (shape, colour)
    pairs.

    Args:
        count: number of samples.
        split: split from which (shape, colour) pairs are drawn.
        size: side in pixels, even.
        seed: base seed of every random draw; each split has its own stream.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 2])
    for start in range(0, count, 1000):
        scenes = draw_scenes(min(1000, count - start), split=split, rng=rng)
        images = render_scenes(scenes, size=size, rng=rng)
        for number, (scene, image) in enumerate(zip(scenes, images, strict=True), start):
            text, stated = scene_caption(scene, rng)
            unseen = not HELD_OUT.isdisjoint({scene[:2], scene[2:4]})
            extra = {"attributes": scene._asdict(), "stated": stated, "unseen_pair": unseen}
            yield Sample(f"{split}_{number:07d}", image, [text], extra)


class FileSamples:
    """Images of a folder, each once with all its captions, in the order of their first mention.

    The rows of one image may lie any distance apart. All rows are held in memory, about 300 bytes each.

    Args:
        folder: folder of the images.
        rows: pairs of file name, relative to the folder, and caption.
    """

    def __init__(self, folder: str | Path, rows: Iterable[tuple[str, str]]) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._captions: dict[str, list[str]] = {}
        for name, text in rows:
            self._captions.setdefault(name, []).append(text)
        self._listed = cache(_spellings)
        self._respelt, self._missing = 0, ""

    def __len__(self) -> int:
        return len(self._captions)

    def __iter__(self) -> Iterator[Sample]:
        copies, self._respelt, self._missing = Counter[str](), 0, ""
        for name, captions in self._captions.items():
            key = _key_of(name)
            copies[key] += 1
            # a "+" is in no key of its own: a_b.png and a.b.png never meet a file called a_b+2.png
            number = f"+{copies[key]}" if copies[key] > 1 else ""
            extra = {"file": encode_text(name).decode("utf-8", "replace")}
            yield Sample(key + number, self._path(name), captions, extra)

    def remarks(self) -> str:
        """Say how many files were found under another spelling, and what is there in place of a missing one."""
        said = f"{self._respelt} file(s) are spelt otherwise in the folder, and were used. " if self._respelt else ""
        return said + self._missing

    def _path(self, name: str) -> Path | BadSample:
        path = Path(os.path.normpath(self.folder / name))
        if not os.path.lexists(path):
            path = Path(os.path.normpath(self.folder / name.strip().replace("\\", "/")))
        if path == self.folder:
            return BadSample("no file name")
        if not path.is_relative_to(self.folder):
            return BadSample("file outside the folder")
        return path if os.path.lexists(self.folder / name) else self._spelt_otherwise(path, name)

    def _spelt_otherwise(self, wanted: Path, name: str) -> Path:
        """Return the one file that fits but for case and Unicode form, or else the path that was asked for."""
        path = self.folder
        for part in wanted.relative_to(self.folder).parts:
            there = self._listed(path)
            fit = [part] if part in there.get(_folded(part), ()) else there.get(_folded(part), [])
            if len(fit) != 1:
                if not self._missing:
                    few = sorted(fit or (each for names in there.values() for each in names))[:5]
                    self._missing = f"Of {name!a} there is in {path}: {', '.join(map(ascii, few)) or 'nothing'}. "
                return wanted
            path /= fit[0]
        self._respelt += 1
        return path


def _folded(name: str) -> str:
    """Return what the spellings of a name have in common: Windows and macOS know neither case nor Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def _spellings(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder, by what their spellings have in common."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            found.setdefault(_folded(name), []).append(name)
    return found


def _key_of(name: str) -> str:
    """Make a key of a file's name: without its ending, anything but letters, digits, - and _ replaced."""
    return re.sub(r"[^\w-]+", "_", os.path.splitext(os.path.normpath(name))[0])[:200]


def table_samples(folder: str, table: str, *, image_column: str, caption_column: str) -> FileSamples:
    """Read images of a folder with the captions of a CSV or TSV file; several rows of one image are several captions.

    Args:
        folder: folder to which the file names in the table are relative.
        table: ``.csv``, or ``.tsv`` with tabs.
        image_column: name of the column of file names.
        caption_column: name of the column of captions.

    Raises:
        MissingFileError: no table.
        InputError: the table lacks a column, or cannot be parsed.
    """
    return FileSamples(folder, _table_rows(table, image_column, caption_column))


def _table_rows(table: str, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(MAX_CELL)
    with Path(table).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.lower().endswith(".tsv") else ",")
        try:
            columns = rows.fieldnames = [column.strip(EDGES) for column in rows.fieldnames or []]
            for column in (image_column, caption_column):
                if column not in columns:
                    raise InputError(
                        f"Expected a column {column!r} in {table}. Got {', '.join(columns)[:200] or 'none'}: name the "
                        "columns with --image_column and --caption_column."
                    )
            for row in rows:
                yield row[image_column] or "", row[caption_column] or ""
        except csv.Error as error:
            raise InputError(f"{table} cannot be read after line {rows.line_num} ({error}): correct it.") from error


def coco_samples(folder: str, annotations: str) -> FileSamples:
    """Read images of COCO with all their captions.

    Args:
        folder: folder of the images.
        annotations: ``captions_*.json``.

    Raises:
        MissingFileError: no such file.
        InputError: the file holds no COCO captions.
    """
    try:
        content = json.loads(Path(annotations).read_bytes())
        names = {
            str(image["id"]): str(image["file_name"]).encode("utf-8", "replace").decode() for image in content["images"]
        }
        captions: dict[str, list[str]] = {number: [] for number in names}
        unknown = 0
        for annotation in content["annotations"]:
            text, found = (annotation["caption"] or "").encode("utf-8", "replace").decode(), str(annotation["image_id"])
            unknown += found not in captions
            captions.get(found, []).append(text)
        rows = [(name, text) for number, name in names.items() for text in captions[number] or [""]]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Expected COCO captions (images with id and file_name, annotations with image_id and caption) in "
            f"{annotations}. Got {type(error).__name__} ({str(error)[:300]}): give another file."
        ) from error
    if unknown:
        log.warning("%s: left aside %d caption(s) of images that it does not list.", annotations, unknown)
    return FileSamples(folder, rows)
