"""Where samples come from: the shapes renderer, a folder with a table, COCO captions."""

import csv
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.shards import encode_text
from unclip_pl.data.transforms import BadSample
from unclip_pl.errors import InputError
from unclip_pl.shapes.captions import caption
from unclip_pl.shapes.render import HELD_OUT, Split, draw_attributes, render

MAX_CELL = 2**24  # characters of one cell of a table: what a quote that never closes may swallow


#: An image; (H, W, 3) uint8; bytes, or the path, of an image file; or why there is none.
Picture = Image.Image | np.ndarray | bytes | Path | BadSample


class Sample(NamedTuple):
    """One sample to pack."""

    key: str  # unique, without dots, slashes and spaces
    image: Picture
    captions: list[str]
    extra: dict[str, Any]  # further entries of key.json


def shapes_samples(count: int, *, split: Split, size: int = 32, seed: int = 0) -> Iterator[Sample]:
    """Rendered shapes with one caption each; the JSON has all attributes, the stated ones, and
    whether train never shows the pair.

    Args:
        count: number of samples.
        split: whose (shape, colour) pairs are drawn.
        size: side in pixels.
        seed: of everything; each split has its own stream.
    """
    rng = np.random.default_rng([seed, ("train", "val", "heldout").index(split)])
    for start in range(0, count, 1000):
        attributes = draw_attributes(min(1000, count - start), split=split, rng=rng)
        images = render(attributes, size=size, rng=rng)
        for number, (names, image) in enumerate(zip(attributes, images, strict=True), start):
            text, stated = caption(names, rng)
            unseen = (names.shape, names.color) in HELD_OUT
            extra = {"attributes": names._asdict(), "stated": stated, "unseen_pair": unseen}
            yield Sample(f"{split}_{number:07d}", image, [text], extra)


class FileSamples:
    """Images of a folder, each once with all its captions, in the order of their first mention.

    The rows of one image may lie any distance apart: SQLite sorts them in a temporary file, so that memory does not
    grow with the table.

    Args:
        folder: of the images.
        rows: (file name, caption), the name relative to the folder.

    Raises:
        OSError: no room for the temporary file.
    """

    def __init__(self, folder: str | Path, rows: Iterable[tuple[str, str]]) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._table = sqlite3.connect("")  # a temporary file, gone with the connection
        self._table.create_function("key_of", 1, _key_of, deterministic=True)
        self._table.execute("CREATE TABLE rows (name BLOB, text BLOB)")
        try:
            self._table.executemany(
                "INSERT INTO rows VALUES (?, ?)", ((encode_text(a), encode_text(b)) for a, b in rows)
            )
            self._table.execute("CREATE TABLE images AS SELECT name, min(rowid) AS first FROM rows GROUP BY name")
            self._table.execute("CREATE INDEX image_of ON images (name)")
        except sqlite3.OperationalError as error:
            raise InputError(
                f"Captions cannot be sorted in a temporary file: {error}. Set TMPDIR to where is room."
            ) from error

    def __len__(self) -> int:
        return self._table.execute("SELECT count(*) FROM images").fetchone()[0]

    def __iter__(self) -> Iterator[Sample]:
        for _, group in groupby(self._table.execute(_IN_ORDER), key=itemgetter(0)):
            rows = list(group)
            _, name, key, copy, _ = rows[0]
            captions = [text.decode("utf-8", "surrogateescape") for *_, text in rows]
            file = name.decode("utf-8", "surrogateescape")
            extra = {"file": name.decode("utf-8", "replace")}
            # a "+" is in no key of its own: a_b.png and a.b.png never meet a file called a_b+2.png
            yield Sample(key if copy == 1 else f"{key}+{copy}", self._path(file), captions, extra)

    def _path(self, name: str) -> Path | BadSample:
        path = Path(os.path.normpath(self.folder / name))
        if path == self.folder:
            return BadSample("no file name")
        return path if path.is_relative_to(self.folder) else BadSample("file outside the folder")


_IN_ORDER = """
SELECT first, name, key, copy, text
FROM (SELECT *, row_number() OVER (PARTITION BY key ORDER BY first) AS copy
      FROM (SELECT name, first, key_of(name) AS key FROM images)) AS keyed
JOIN rows USING (name)
ORDER BY first, rows.rowid
"""


def _key_of(name: bytes) -> str:
    """A file's name as a key: without its ending, anything but letters, digits, - and _ replaced."""
    stem = os.path.splitext(os.path.normpath(name.decode("utf-8", "surrogateescape")))[0]
    return re.sub(r"[^\w-]+", "_", stem)[:200]


def table_samples(folder: str, table: str, *, image_column: str, caption_column: str) -> FileSamples:
    """Images of a folder with the captions of a CSV or TSV file, several rows of one image being several captions.

    Args:
        folder: what the file names in the table are relative to.
        table: ``.csv``, or ``.tsv`` with tabs.
        image_column: name of the column of file names.
        caption_column: name of the column of captions.

    Raises:
        FileNotFoundError: no table.
        ValueError: it lacks a column, or cannot be parsed.
    """
    return FileSamples(folder, _table_rows(table, image_column, caption_column))


def _table_rows(table: str, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(MAX_CELL)
    with Path(table).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.lower().endswith(".tsv") else ",")
        try:
            columns = rows.fieldnames or []
            for column in (image_column, caption_column):
                if column not in columns:
                    raise InputError(
                        f"Expected a column {column!r} in {table}. Got {', '.join(columns)[:200] or 'none'}: name the "
                        "columns with --image_column and --caption_column."
                    )
            for row in rows:
                yield row[image_column] or "", row[caption_column] or ""
        except csv.Error as error:
            raise InputError(f"{table} cannot be read after line {rows.line_num}: {error}.") from error


def coco_samples(folder: str, annotations: str) -> FileSamples:
    """Images of COCO with all their captions.

    Args:
        folder: of the images.
        annotations: ``captions_*.json``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no COCO captions file.
    """
    try:
        content = json.loads(Path(annotations).read_bytes())
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"].encode("utf-8", "replace").decode())
        rows = [
            (str(image["file_name"]), text) for image in content["images"] for text in captions[image["id"]] or [""]
        ]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Expected COCO captions (images with id and file_name, annotations with image_id and caption) in "
            f"{annotations}. Got {type(error).__name__}: {error}"[:500]
        ) from error
    return FileSamples(folder, rows)
