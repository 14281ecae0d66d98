"""``unclip pack shapes | folder | coco``: make source shards."""

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from tqdm import tqdm

from unclip_pl.data.pack import Encoding, Sample, coco_samples, shapes_samples, table_samples, write_shards
from unclip_pl.shapes.render import Split


def pack_shapes(
    out: str,
    *,
    train: int = 20000,
    val: int = 1000,
    heldout: int = 2000,
    size: int = 32,
    seed: int = 0,
    shard_size: int = 2000,
) -> None:
    """Render and caption the built-in shapes.

    Args:
        out: folder of the shards.
        train: training images.
        val: validation images.
        heldout: images of (shape, colour) pairs that train never shows together.
        size: side in pixels.
        seed: of everything that is drawn.
        shard_size: images of a shard.
    """
    for split, count in zip(get_args(Split), (train, val, heldout), strict=True):
        if count:
            samples = shapes_samples(count, split=split, size=size, seed=seed)
            write_shards(tqdm(samples, split, count, unit=" images"), out, split, shard_size=shard_size)


def pack_folder(
    images: str,
    table: str,
    out: str,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    split: str = "data",
    size: int | None = None,
    encode: Encoding = "jpg",
    shard_size: int = 1000,
) -> None:
    """Pack a folder of images whose captions stand in a CSV or TSV file.

    Args:
        images: folder of the images.
        table: CSV or TSV file with a header; several rows of one image are several captions.
        out: folder of the shards.
        image_column: column of the file names, relative to the folder.
        caption_column: column of the captions.
        split: train, val or heldout; any other name leaves the split to a hash of the key (96, 2 and 2 %).
        size: side of the central square to cut; without it the files stay as they are.
        encode: format of the squares.
        shard_size: images of a shard.
    """
    skipped: Counter[str] = Counter()
    samples = table_samples(
        images, table, image_column=image_column, caption_column=caption_column, size=size, skipped=skipped
    )
    _write(samples, out, split, shard_size, encode, skipped)


def pack_coco(
    images: str,
    annotations: str,
    out: str,
    *,
    split: str = "data",
    size: int | None = None,
    encode: Encoding = "jpg",
    shard_size: int = 1000,
) -> None:
    """Pack COCO images with all their captions.

    Args:
        images: folder of the images.
        annotations: captions_train2014.json or the like.
        out: folder of the shards.
        split: train, val or heldout; any other name leaves the split to a hash of the key (96, 2 and 2 %).
        size: side of the central square to cut; without it the files stay as they are.
        encode: format of the squares.
        shard_size: images of a shard.
    """
    skipped: Counter[str] = Counter()
    samples = coco_samples(images, annotations, size=size, skipped=skipped)
    _write(samples, out, split, shard_size, encode, skipped)


def _write(
    samples: Iterator[Sample], out: str, split: str, shard_size: int, encode: Encoding, skipped: Counter[str]
) -> None:
    """Write shards, then say what was left out."""
    try:
        write_shards(tqdm(samples, split, unit=" images"), out, split, shard_size=shard_size, encode=encode)
    finally:
        for reason, count in skipped.most_common():
            print(f"skipped {count} image(s): {reason}")


COMMANDS = {"shapes": pack_shapes, "folder": pack_folder, "coco": pack_coco}
