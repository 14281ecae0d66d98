"""Makes source shards: from the shapes renderer, from a folder with a table, from COCO captions."""

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.atomic import replacing
from unclip_pl.data.transforms import BadSample, Encoding, center_square, decode_image, suffix_of
from unclip_pl.shapes.captions import caption
from unclip_pl.shapes.render import HELD_OUT, Split, draw_attributes, render

_CODECS: dict[Encoding, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
    "webp": ("WEBP", {"quality": 95}),
}


class Sample(NamedTuple):
    """One sample to pack."""

    key: str  # unique, without dots and slashes
    image: (
        Image.Image | np.ndarray | bytes
    )  # (H, W, 3) uint8 arrays; bytes of a PNG, JPEG or WebP file stay as they are
    captions: list[str]
    extra: dict[str, Any]  # further entries of key.json


def write_shards(
    samples: Iterable[Sample], out_dir: str | Path, split: str, *, shard_size: int = 1000, encode: Encoding = "png"
) -> list[Path]:
    """Write ``split-000000.tar``, …: the same samples give the same bytes.

    Args:
        samples: in the order of the tars.
        out_dir: folder; shards of that name are replaced.
        split: first part of the file names; train, val and heldout are read back as splits.
        shard_size: samples of a tar.
        encode: image format of arrays and PIL images.

    Returns:
        The shards written.

    Raises:
        ValueError: no samples, an unfit key, or shards of an earlier, larger pack lie after the new ones.
    """
    folder, paths, keys = Path(out_dir), list[Path](), set[str]()
    stream = iter(samples)
    while chunk := list(islice(stream, shard_size)):
        path = folder / f"{split}-{len(paths):06d}.tar"
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in chunk:
                _check_key(sample.key, keys)
                for suffix, data in _members(sample, encode):
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")  # time 0, user 0: nothing of this machine
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        paths.append(path)
    if not paths:
        raise ValueError(f"Expected samples to pack as {split} into {folder}. Got none.")
    if stale := sorted(path.name for path in folder.glob(f"{split}-*.tar") if path not in paths):
        raise ValueError(
            f"{folder} holds {', '.join(stale)} of an earlier pack after the {len(paths)} new: remove them."
        )
    return paths


def _check_key(key: str, keys: set[str]) -> None:
    if not re.fullmatch(r"[^./\s]+", key):
        raise ValueError(
            f"Expected a key without dots, slashes and spaces: readers cut it at the first dot. Got {key!r}."
        )
    if key in keys:
        raise ValueError(f"Expected different keys. Got {key!r} twice.")
    keys.add(key)


def _members(sample: Sample, encode: Encoding) -> Iterator[tuple[str, bytes]]:
    if isinstance(sample.image, bytes):
        yield suffix_of(sample.image), sample.image
    else:
        image = Image.fromarray(sample.image) if isinstance(sample.image, np.ndarray) else sample.image
        buffer, (name, options) = io.BytesIO(), _CODECS[encode]
        image.save(buffer, name, **options)
        yield encode, buffer.getvalue()
    captions = [" ".join(text.split()) for text in sample.captions]  # a line each
    yield "txt", "\n".join(captions).encode()
    meta = {"captions": captions, **sample.extra}
    yield "json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()


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


def table_samples(
    folder: str, table: str, *, image_column: str, caption_column: str, size: int | None, skipped: Counter[str]
) -> Iterator[Sample]:
    """Images of a folder with the captions of a CSV or TSV file, several rows of one image being several captions.

    Args:
        folder: what the file names in the table are relative to.
        table: ``.csv``, or ``.tsv`` with tabs.
        image_column: name of the column of file names.
        caption_column: name of the column of captions.
        size: side of the central square to cut; None keeps the files as they are.
        skipped: counts images that are missing or damaged, by reason.

    Raises:
        FileNotFoundError: no table.
        ValueError: it lacks a column.
    """
    with Path(table).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t" if table.endswith(".tsv") else ",")
        columns = rows.fieldnames or []
        for column in (image_column, caption_column):
            if column not in columns:
                raise ValueError(
                    f"Expected a column {column!r} in {table}. Got {', '.join(columns) or 'none'}: name the columns "
                    "with --image_column and --caption_column."
                )
        captions: dict[str, list[str]] = {}
        for row in rows:
            captions.setdefault(row[image_column] or "", []).append(row[caption_column] or "")
    yield from _file_samples(Path(folder), captions, size, skipped)


def coco_samples(folder: str, annotations: str, *, size: int | None, skipped: Counter[str]) -> Iterator[Sample]:
    """Images of COCO with all their captions.

    Args:
        folder: of the images.
        annotations: ``captions_*.json``.
        size: side of the central square to cut; None keeps the files as they are.
        skipped: counts images that are missing or damaged, by reason.

    Raises:
        ValueError: no COCO captions file.
    """
    try:
        content = json.loads(Path(annotations).read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected COCO captions (images with id and file_name, annotations with image_id and caption) in "
            f"{annotations}. Got {error!r}."
        ) from error
    yield from _file_samples(Path(folder), captions, size, skipped)


def _file_samples(
    folder: Path, captions: dict[str, list[str]], size: int | None, skipped: Counter[str]
) -> Iterator[Sample]:
    keys: Counter[str] = Counter()
    for name, texts in captions.items():
        try:
            image = _read(folder / name, size)
        except BadSample as reason:
            skipped[str(reason)] += 1
            continue
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(name).with_suffix(""))) or "_"
        keys[key] += 1
        unique = key if keys[key] == 1 else f"{key}--{keys[key]}"
        yield Sample(unique, image, texts, {"file": name})


def _read(path: Path, size: int | None) -> Image.Image | bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample("missing file") from error
    if size is not None:
        return center_square(decode_image(data), size)
    suffix_of(data)
    return data
