"""`unclip precompute` with ViT-B/32 (random weights) against what its parts allow.

The peer is the sum of open_clip's own encode_image and encode_text on batches that lie ready, and of decoding and
cropping the images: what a program with no overhead would take on as many cores, without overlap. Ours also reads and
hashes the tars, tokenises, and writes, hashes and syncs the store. Growth is that of the
quickstart's CLIP: ViT-B/32 would need hours.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, clock, faster, floor, flops, growth, show
from PIL import Image

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.precompute import embed_share, finish
from unclip_pl.data.shards import index_shard, list_shards, read_span
from unclip_pl.data.transforms import load_square, to_pixels
from unclip_pl.packing.pack import write_shards
from unclip_pl.packing.samples import Sample, shapes_samples

IMAGES, SHARD, BATCH = 128, 64, 32
SHAPES = 1000  # of a shard
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "large",
    "small",
    "red",
    "old",
    "quiet",
    "harbour",
    "with",
    "two",
    "boats",
    "and",
    "a",
    "dog",
    "near",
    "water",
    "at",
    "dusk",
]


def samples() -> list[Sample]:
    """JPEGs of 256 × 320 pixels with some structure, each with a caption of 5 to 25 words, all different."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
        image = small.resize((320, 256), Image.Resampling.BICUBIC)
        caption = " ".join(rng.choice(WORDS, rng.integers(4, 25))) + f" {number}"
        found.append(Sample(f"{number:06d}", image, [caption], {}))
    return found


def parts(source: str, clip: ClipEncoder) -> dict[str, float]:
    """Seconds for all images and captions, one part after the other."""
    seconds = dict.fromkeys(("decode", "encode_image", "encode_text"), 0.0)
    for shard in list_shards(source):
        entries = index_shard(shard.path).entries
        with shard.path.open("rb") as file:
            files = [read_span(file, *entry.image) for entry in entries]
        start = clock()
        images = torch.stack([load_square(data, clip.image_size) for data in files])
        seconds["decode"] += clock() - start
        pixels = clip.preprocess(to_pixels(images))
        tokens = clip.tokenize([caption for entry in entries for caption in entry.captions])
        with torch.no_grad():
            for name, inputs in (("encode_image", pixels), ("encode_text", tokens)):
                encode, start = getattr(clip.model, name), clock()
                for batch in inputs.split(BATCH):
                    encode(batch)
                seconds[name] += clock() - start
    return seconds


def rows() -> list[Row]:
    """Pairs a second, the better of two turns of each."""
    clip = ClipSpec("ViT-B-32").load()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder) / "source")
        write_shards(samples(), source, "train", shard_size=SHARD)
        parts(source, clip)  # to warm up
        for turn in range(2):
            store, start = str(Path(folder) / str(turn)), clock()
            embed_share(source, store, clip, batch_size=BATCH)
            finish(source, store, clip)
            ours.append(clock() - start)
            theirs.append(parts(source, clip))
    best = min(theirs, key=lambda seconds: sum(seconds.values()))
    allowed = sum(best.values())
    image = torch.zeros(BATCH, 3, clip.image_size, clip.image_size)
    done = flops(lambda: clip.encode_image(image)) / BATCH * IMAGES / best["encode_image"]
    note = ", ".join(f"{name} {1e3 * seconds / IMAGES:.1f} ms" for name, seconds in best.items())
    note += f" a pair; encode_image does {floor().flops(done)}"
    each = {"ours": min(ours) / IMAGES, "parts": allowed / IMAGES}
    return [faster("precompute, ViT-B/32, a pair", each, "parts", 0.95, note), growth_with_rows()]


def growth_with_rows() -> Row:
    """5,000 to 20,000 shapes of 32 px by the tiny CLIP."""
    clip, counts, seconds = ClipSpec("tiny-rn").load(), (5_000, 10_000, 20_000), []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(shapes_samples(max(counts), split="train", size=32, seed=0), folder, "train", shard_size=SHAPES)
        for count in counts:
            source = f"{folder}/train-{{000000..{count // SHAPES - 1:06d}}}.tar"
            store, start = f"{folder}/{count}", clock()
            embed_share(source, store, clip, batch_size=256)
            finish(source, store, clip)
            seconds.append(clock() - start)
    return growth("precompute with rows (tiny CLIP, shapes)", counts, seconds)


if __name__ == "__main__":
    show(rows)
