"""Streamed images: throughput and memory with 10, 100 and 1,000 shards, in fsspec's memory and over http on loopback.

Every shard has 20 images of 32 px. There are ten different ones; the others are copies under other names. Each case
runs in a process of its own and reads the same number of images, by one reader, through a buffer of 200.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
from measure import Row, clock, show

from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.data.precompute import embed_share, finish
from unclip_pl.data.shards import Shard, list_shards
from unclip_pl.data.store import read_manifest, write_manifest
from unclip_pl.data.streamed import Shuffled, Step, StreamedStore
from unclip_pl.packing.pack import write_shards
from unclip_pl.packing.samples import shapes_samples

COUNTS, DISTINCT, IMAGES, BATCH, BATCHES = (10, 100, 1_000), 10, 20, 20, 150


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


def case(root: str, address: str, count: int) -> None:
    """Read from some shards and print images a second, and MiB that reading added to this process."""
    if address.startswith("memory:"):
        for path in sorted(Path(root, "source").iterdir())[:count]:
            fsspec.filesystem("memory").pipe(f"/shelf/{path.name}", path.read_bytes())
    source, store = f"{address}/train-{{000000..{count - 1:06d}}}.tar", Path(root, f"store-{count}")
    shutil.copytree(Path(root, "store"), store, dirs_exist_ok=True)
    records = read_manifest(store)
    marks = {shard.name: Shard(shard.address).stamp().mark for shard in list_shards(source)}
    write_manifest(store, [records[name]._replace(source_mark=mark) for name, mark in marks.items()])
    embeddings = StreamedStore(store, source, image_size=32)
    stream = Shuffled(embeddings, embeddings.decoder_batch, BATCH, buffer=10 * IMAGES, seed=0, rank=0, world_size=1)
    for _ in range(BATCHES // 5):  # to warm up: buffers, connections, imports
        stream(Step(0, 0))
    before, start = peak(), clock()
    for _ in range(BATCHES):
        stream(Step(0, 0))
    print(json.dumps([BATCH * BATCHES / (clock() - start), peak() - before]))


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
                results = {count: measured(folder, address, count) for count in COUNTS}
                rates = ", ".join(f"{count:,}: {rate:,.0f}/s" for count, (rate, _) in results.items())
                grown = ", ".join(f"{mib:.1f} MiB" for _, mib in results.values())
                first, last = results[COUNTS[0]][0], results[COUNTS[-1]][0]
                name = f"streamed images, 1,000 shards beside 10, {name}"
                found.append(Row(name, last, first, "images/s", last / first, 0.9, f"{rates}; memory grows by {grown}"))
        finally:
            server.terminate()
    return found


def measured(folder: str, address: str, count: int) -> tuple[float, float]:
    """The better rate of two runs, and the larger growth."""
    words = [sys.executable, "-W", "ignore", __file__, "case", folder, address, str(count)]
    runs = [json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout) for _ in range(2)]
    return max(rate for rate, _ in runs), max(mib for _, mib in runs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        case(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        show(rows)
