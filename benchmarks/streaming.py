"""Streamed images: throughput and memory with 10, 100 and 1,000 shards, in fsspec's memory and over http on loopback.

Every shard has 100 images of 32 px. There are ten different ones; the others are copies under other names. One reader
reads the same number of images from each number of shards, through a buffer of 200. Seconds are those of the
processor, so that other work on the machine does not count.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
from measure import Row, show

from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.data.precompute import embed_share, finish
from unclip_pl.data.shards import list_shards
from unclip_pl.data.store import read_manifest, write_manifest
from unclip_pl.data.streamed import Shuffled, Step, StreamedStore
from unclip_pl.packing.pack import write_shards
from unclip_pl.packing.samples import shapes_samples

COUNTS, DISTINCT, IMAGES = (10, 100, 1_000), 10, 100
BATCH, BATCHES, TURNS = 50, 60, 5


def prepare(root: Path) -> None:
    """Embed ten shards, and copy shards and embeddings to a thousand."""
    source, store, clip = root / "source", root / "store", ClipSpec("tiny-rn").load()
    write_shards(shapes_samples(DISTINCT * IMAGES, split="train", size=32, seed=0), source, "train", shard_size=IMAGES)
    embed_share(str(source), str(store), clip, batch_size=100)
    finish(str(source), str(store), clip)
    records = list(read_manifest(store).values())
    for number in range(DISTINCT, max(COUNTS)):
        record = records[number % DISTINCT]
        copy = record._replace(shard=f"train-{number:06d}.tar", file=f"train-{number:06d}.safetensors")
        shutil.copy(source / record.shard, source / copy.shard)
        shutil.copy(store / record.file, store / copy.file)
        records.append(copy)
    write_manifest(store, records)


def case(root: str, address: str) -> None:
    """Print images a processor second, and MiB that reading adds to this process, for each number of shards.

    The numbers take turns, so that a busy machine slows all of them.
    """
    if address.startswith("memory:"):
        for path in Path(root, "source").iterdir():
            fsspec.filesystem("memory").pipe(f"/shelf/{path.name}", path.read_bytes())
    streams = {count: opened(root, address, count) for count in COUNTS}
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    grown = dict.fromkeys(COUNTS, 0.0)
    for turn in range(TURNS + 1):  # the first fills buffers and opens connections
        for count, stream in streams.items():
            before, start = peak(), time.process_time()
            for _ in range(BATCHES):
                stream(Step(0, 0))
            if turn:
                rates[count].append(BATCH * BATCHES / (time.process_time() - start))
                grown[count] += peak() - before
    print(json.dumps([[max(found) for found in rates.values()], list(grown.values())]))


def opened(root: str, address: str, count: int) -> Shuffled:
    """Return a stream of some of the shards, whose embeddings are of that address."""
    source, store = f"{address}/train-{{000000..{count - 1:06d}}}.tar", Path(root, f"store-{address[:4]}-{count}")
    shutil.copytree(Path(root, "store"), store)
    records = read_manifest(store)
    marks = {shard.name: shard.stamp().mark for shard in list_shards(source)}
    write_manifest(store, [records[name]._replace(source_mark=mark) for name, mark in marks.items()])
    embeddings = StreamedStore(store, source, image_size=32)
    options = {"buffer": 2 * IMAGES, "seed": 0, "rank": 0, "world_size": 1}
    return Shuffled(embeddings, embeddings.decoder_batch, BATCH, **options)


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows() -> list[Row]:
    """Images a second from 1,000 shards beside 10, and the memory that reading adds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        words = [
            sys.executable,
            "-u",
            "-m",
            "http.server",
            "0",
            "--bind",
            "127.0.0.1",
            "--directory",
            f"{folder}/source",
        ]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout
            port = server.stdout.readline().split(" port ")[1].split()[0]
            for name, address in (("memory", "memory://shelf"), ("http", f"http://127.0.0.1:{port}")):
                words = [sys.executable, "-W", "ignore", __file__, "case", folder, address]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                rates, grown = json.loads(done.stdout)
                note = ", ".join(f"{count:,}: {rate:,.0f}/s" for count, rate in zip(COUNTS, rates, strict=True))
                note += f"; memory grows by {', '.join(f'{mib:.1f}' for mib in grown)} MiB"
                row = (f"streamed images, 1,000 shards beside 10, {name}", rates[-1], rates[0], "images/s")
                found.append(Row(*row, rates[-1] / rates[0], 0.9, note))
        finally:
            server.terminate()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        case(sys.argv[2], sys.argv[3])
    else:
        show(rows)
