"""The embedding store's loader on one core: prior samples a second, and memory that does not grow with the store.

Stores are synthetic: float16 embeddings of 512 dimensions in shards of 10,000 rows, as img2dataset cuts them. The files
are in the page cache: what is measured is the work of assembling float32 batches, not a disk.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, clock, floor, growth, show
from torch.utils.data import DataLoader

from unclip_pl.data.datamodule import Batches
from unclip_pl.data.sampler import BlockShuffleSampler
from unclip_pl.data.shards import Split
from unclip_pl.data.store import (
    Contents,
    EmbeddingStore,
    ShardFeatures,
    ShardRecord,
    moments_of,
    offsets_of,
    pack_texts,
    write_features,
    write_manifest,
)
from unclip_pl.files import sha256

WIDTH, SHARD = 512, 10_000


def make_store(root: Path, shards: int, tokens: int, *, distinct: int, width: int = WIDTH) -> EmbeddingStore:
    """A store and a source of empty tars.

    Args:
        root: folder of both.
        shards: number of shards, 10,000 rows each.
        tokens: text states of each caption; 0 leaves the pooled embeddings alone.
        distinct: shards that have files of their own; the others are links to them.
        width: dimensions of embeddings and text states.
    """
    source, store = root / "source", root / "store"
    source.mkdir(parents=True)
    records = []
    for number in range(shards):
        tar, file = source / f"train-{number:06d}.tar", store / f"train-{number:06d}.safetensors"
        if number < distinct:
            tar.write_bytes(bytes(1024))
            contents = synthetic(np.random.default_rng(number), tokens, width)
            record = describe(tar, file, contents)
            write_features(file, contents, record, tar.stat().st_mtime_ns + 10**9)
        else:
            for link in (tar, file):
                link.symlink_to(link.with_name(f"train-{number % distinct:06d}{link.suffix}"))
            record = records[number % distinct]._replace(shard=tar.name, file=file.name)
        records.append(record)
    write_manifest(store, records)
    return EmbeddingStore(store, str(source), image_size=1)


def describe(tar: Path, file: Path, contents: Contents) -> ShardRecord:
    """The manifest's line of a synthetic shard."""
    return ShardRecord(
        shard=tar.name,
        source_size=1024,
        source_mark="",
        source_sha256=sha256(tar),
        file=file.name,
        sha256=contents.checksum(),
        clip="synthetic",
        images=SHARD,
        splits=[SHARD, 0, 0],
        captions=SHARD,
        dtype="float16",
        skipped={},
        version="benchmark",
    )


def synthetic(rng: np.random.Generator, tokens: int, width: int) -> Contents:
    """Features of 10,000 images with a caption each."""

    def values(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, width), np.float32).astype(np.float16)

    captions, captions_offsets = pack_texts([f"caption {row}" for row in range(SHARD)])
    rows, zeros = np.arange(SHARD + 1), np.zeros(SHARD, np.int64)
    features = ShardFeatures(
        image_embed=values(SHARD),
        text_embed=values(SHARD),
        text_states=values(SHARD * tokens),
        text_tokens=rng.integers(0, 49408, SHARD * tokens, np.int32),
        text_offsets=offsets_of([tokens] * SHARD),
        caption_rows=rows[:-1].astype(np.int32),
        caption_offsets=rows,
        captions=captions,
        captions_offsets=captions_offsets,
        keys=captions,
        keys_offsets=captions_offsets,
        image_offset=zeros,
        image_size=zeros,
        json_offset=zeros,
        json_size=zeros,
        split=np.zeros(SHARD, np.uint8),
    )
    return Contents(features, moments_of(features.image_embed[:2]), {})


def rate(store: EmbeddingStore, batch_size: int, seconds: float = 4.0) -> float:
    """Prior samples a second over whole batches, the best of three stretches."""
    sampler, best = BlockShuffleSampler(store.blocks(Split.TRAIN), batch_size), 0.0
    loader = DataLoader(Batches(store.prior_batch), batch_size=None, sampler=sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        begin, seen = clock(), 0
        for batch in loader:
            seen += len(batch.image_embed)
            if clock() - begin > seconds:
                break
        best = max(best, seen / (clock() - begin))
    return best


def growth_with_rows(root: Path) -> Row:
    """A pass over 10 k to 1 M pooled rows, the best of two, in batches of 4,096."""
    counts, seconds = (10_000, 100_000, 1_000_000), []
    for count in counts:
        store = make_store(root / f"{count}", count // SHARD, 0, distinct=min(10, count // SHARD))
        sampler = BlockShuffleSampler(store.blocks(Split.TRAIN), 4096)
        loader = DataLoader(Batches(store.prior_batch), batch_size=None, sampler=sampler)
        passes = []
        for _ in range(2):
            begin = clock()
            for _batch in loader:
                pass
            passes.append(clock() - begin)
        seconds.append(min(passes))
    return growth("loader, a pass with rows (pooled)", counts, seconds)


def opened(root: Path) -> tuple[int, float]:
    """A process of its own that opens a store and draws 300 batches.

    Returns:
        Its anonymous bytes (mapped files do not count), and its seconds until the first batch.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--open", str(root)], capture_output=True, text=True, check=True, env=os.environ
    )
    size, seconds = done.stdout.split()
    return int(size), float(seconds)


def draw(root: Path, batches: int = 300) -> tuple[int, float]:
    """Return bytes of memory and seconds until the first batch; ``opened`` runs this in a process of its own."""
    begin = clock()
    store = EmbeddingStore(root / "store", str(root / "source"), image_size=1)
    sampler = BlockShuffleSampler(store.blocks(Split.TRAIN), 256)
    first, drawn = 0.0, 0
    while drawn < batches:
        for rows in sampler:
            store.prior_batch(rows)
            first, drawn = first or clock() - begin, drawn + 1
            if drawn == batches:
                break
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]), first


def paper_scale(root: Path) -> list[Row]:
    """The paper's 650 M pairs: 65,000 shards, one line of the manifest each."""
    size, seconds = opened(make_store(root, 65_000, 0, distinct=1, width=8).path.parent)
    note = f"65,000 shards, {65_000 * SHARD:,} rows; {size / 2**20:.0f} MiB anonymous in all, of them 450 for torch"
    return [
        Row("loader: a store of 650 M rows, until its first batch", seconds, None, "s", None, 10, note),
        Row("loader: a store of 650 M rows, memory", size / 2**30, None, "GiB", None, 1, note),
    ]


def rows() -> list[Row]:
    """Rates on one core, and memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for what, tokens, shards, least in (("pooled", 0, 40, 200_000), ("with 12 text states", 12, 8, 50_000)):
            store = make_store(root / str(tokens), shards, tokens, distinct=shards)
            for batch_size in (4096, 256):
                found = rate(store, batch_size)
                moved = (2 + tokens) * WIDTH * (2 + 4) * found
                note = f"{found:,.0f} samples/s, {moved / 1e9:.1f} GB/s; memcpy {floor().memcpy / 1e9:.1f} GB/s"
                name = f"loader: a prior sample, {what}, batches of {batch_size:,}"
                measured.append(Row(name, 1e6 / found, None, "µs", None, 1e6 / least, note))
        (small, _), (large, _) = (opened(make_store(root / f"{n}", n, 12, distinct=1).path.parent) for n in (1, 100))
        note = f"{small / 2**20:.0f} and {large / 2**20:.0f} MiB anonymous after 300 batches of 256"
        measured.append(Row("loader: memory at 1 M rows over 10 k", large / small, None, "×", None, 1.2, note))
        measured += [growth_with_rows(root / "growth"), *paper_scale(root / "paper")]
    torch.set_num_threads(threads)
    return measured


if __name__ == "__main__":
    if sys.argv[1:2] == ["--open"]:
        print(*draw(Path(sys.argv[2])))
    else:
        show(rows)
