"""``unclip pack shapes | folder | coco | emoji``: make source shards."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type
from tqdm import tqdm

from unclip_pl.data.transforms import Encoding
from unclip_pl.errors import InputError
from unclip_pl.packing.emoji import EmojiSamples, EmojiSets, read_pairs, write_card
from unclip_pl.packing.pack import Form, pack_shards, require_good
from unclip_pl.packing.samples import (
    FileSamples,
    Sample,
    coco_samples,
    scene_samples,
    shapes_samples,
    table_samples,
)
from unclip_pl.shapes.render import SPLITS

Quality = restricted_number_type("Quality", int, [(">=", 1), ("<=", 100)], join="and")


def pack_shapes(
    out: str,
    *,
    train: NonNegativeInt = 20000,
    val: NonNegativeInt = 1000,
    heldout: NonNegativeInt = 2000,
    size: PositiveInt | None = None,
    words: bool = False,
    objects: Literal[1, 2] = 1,
    seed: NonNegativeInt = 0,
    shard_size: PositiveInt = 2000,
    num_workers: NonNegativeInt = 0,
) -> None:
    """Render and caption the built-in shapes. Run again, it goes on where it stopped.

    Args:
        out: folder of the shards.
        train: training images.
        val: validation images.
        heldout: held-out images, of every (shape, colour) pair; train never shows an eighth of the pairs.
        size: side in pixels; without it 64 with words or two objects, else 32.
        words: write the name of a shape over half of the training images; three in four of their captions name it in
            the place of the shape. Every held-out image has another shape's name.
        objects: shapes in an image; two are small, of different colours, beside or above each other.
        seed: base seed of every random draw.
        shard_size: images of a shard.
        num_workers: threads that encode and write; 0 is this one.
    """
    if words and objects == 2:
        raise InputError("Expected words over one shape. Got --words with --objects 2: leave one of them out.")
    size = size or (64 if words or objects == 2 else 32)
    for split, count in zip(SPLITS, (train, val, heldout), strict=True):
        if count:
            one = partial(shapes_samples, words=words)
            samples = (scene_samples if objects == 2 else one)(count, split=split, size=size, seed=seed)
            form, sizes = Form(encode="png"), {"shard_size": shard_size, "num_workers": num_workers}
            _pack(samples, count, out, split, form, **sizes, max_bad_fraction=0.0)


@dataclass(frozen=True)
class FileOptions:
    """Options of packing image files.

    Args:
        split: train, val or heldout; any other name leaves the split to a hash of the key (96, 2 and 2 %).
        size: pixels of the shorter side; without it every image keeps its size.
        resize: square cuts the central square like CLIP; shorter keeps the whole picture.
        encode: format of all images; without it each keeps its own. A file that is neither resized nor brought into
            another format stays as it is.
        quality: quality of JPEG and WebP images that are encoded, 1 to 100.
        shard_size: images of a shard.
        num_workers: threads that read, resize and write; 0 is this one.
        max_bad_fraction: largest share of images that are missing, damaged or without a caption.
    """

    split: str = "data"
    size: PositiveInt | None = None
    resize: Literal["square", "shorter"] = "square"
    encode: Encoding | None = None
    quality: Quality = 95  # type: ignore[valid-type]
    shard_size: PositiveInt = 1000
    num_workers: NonNegativeInt = 0
    max_bad_fraction: ClosedUnitInterval = 0.01


def pack_folder(
    images: str,
    table: str,
    out: str,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    options: FileOptions,
) -> None:
    """Pack a folder of images whose captions stand in a CSV or TSV file. Run again, it goes on where it stopped.

    Args:
        images: folder of the images.
        table: CSV or TSV file with a header; several rows of one image are several captions.
        out: folder of the shards.
        image_column: column of the file names, relative to the folder.
        caption_column: column of the captions.
        options: how the images are stored.
    """
    samples = table_samples(images, table, image_column=image_column, caption_column=caption_column)
    _pack_files(samples, out, options)


def pack_coco(images: str, annotations: str, out: str, *, options: FileOptions) -> None:
    """Pack COCO images with all their captions. Run again, it goes on where it stopped.

    Args:
        images: folder of the images.
        annotations: captions_train2014.json or the like.
        out: folder of the shards.
        options: how the images are stored.
    """
    _pack_files(coco_samples(images, annotations), out, options)


def pack_emoji(
    paths: list[str],
    out: str,
    *,
    size: PositiveInt = 64,
    shard_size: PositiveInt = 1000,
    num_workers: NonNegativeInt = 0,
) -> None:
    """Pack public sets of emoji as the pairs that our studies use. Run again, it goes on where it stopped.

    The folders hold packages of npm and checkouts; README.md beside the shards says which. A pair whose picture is not
    at hand is left out.

    Args:
        paths: folders of the sets, such as node_modules.
        out: folder of the shards.
        size: side in pixels.
        shard_size: images of a shard.
        num_workers: threads that resize and write; 0 is this one.
    """
    if not paths:
        raise InputError(
            "Expected folders of emoji sets. Got none: write unclip pack emoji --from node_modules --out DIR."
        )
    sets, pairs = EmojiSets([Path(path) for path in paths]), read_pairs()
    for split in SPLITS:
        samples = EmojiSamples(sets, pairs, split, size)
        if len(samples):
            form, sizes = Form(size, encode="png"), {"shard_size": shard_size, "num_workers": num_workers}
            _pack(samples, len(samples), out, split, form, **sizes, max_bad_fraction=FileOptions.max_bad_fraction)
    write_card(Path(out), sets, pairs)
    left = sum(sets.picture(pair) is None for pair in pairs)
    print(f"left out {left:,} of {len(pairs):,} pairs, whose pictures are not at hand: see {Path(out) / 'README.md'}")


def _pack_files(samples: FileSamples, out: str, options: FileOptions) -> None:
    form = Form(options.size, options.resize, options.encode, options.quality)
    sizes = {"shard_size": options.shard_size, "num_workers": options.num_workers}
    _pack(samples, len(samples), out, options.split, form, **sizes, max_bad_fraction=options.max_bad_fraction)


def _pack(
    samples: Iterable[Sample],
    count: int,
    out: str,
    split: str,
    form: Form,
    *,
    shard_size: int,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    """Write shards under a progress bar, then say what was left out."""
    shards = pack_shards(samples, out, split, shard_size=shard_size, form=form, num_workers=num_workers)
    done = []
    with closing(shards), tqdm(desc=split, total=count, unit=" images") as bar:
        for shard in shards:
            done.append(shard)
            bar.update(shard.samples + sum(map(len, shard.skipped.values())))
    for reason in sorted({reason for shard in done for reason in shard.skipped}):
        names = [name for shard in done for name in shard.skipped.get(reason, ())]
        print(f"skipped {len(names)}, {reason}: {', '.join(map(ascii, names[:3]))}{', …' if len(names) > 3 else ''}")
    remarks = samples.remarks() if isinstance(samples, FileSamples) else ""
    require_good(out, done, max_bad_fraction, remarks)
    if remarks:
        print(remarks)
    print(f"{sum(shard.samples for shard in done)} image(s) in {len(done)} shard(s): {Path(out) / split}-*.tar")


COMMANDS = {"shapes": pack_shapes, "folder": pack_folder, "coco": pack_coco, "emoji": pack_emoji}
