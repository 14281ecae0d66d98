"""Seeded damage to a data set's files, and what may come of it: a result that agrees with itself, or one clear error.

The tests try 1,908 inputs; ``python tests/data/test_mutation.py --count 20000`` as many as you like.
"""

import argparse
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unclip_pl import cli
from unclip_pl.clip.encoder import ClipSpec, build_clip
from unclip_pl.data.precompute import precompute
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import decode_entries, index_shard
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.files import read_checkpoint
from unclip_pl.nn.space import EmbeddingSpace
from unclip_pl.packing.pack import Form, read_packed, write_shards
from unclip_pl.packing.samples import Sample

CONFIG = """\
# a comment, as a user would write it
images: no/such/folder
annotations: no/such/file.json
out: no/such/target
split: train
size: 256
resize: shorter
encode: jpg
quality: 95
max_bad_fraction: 0.01
"""

#: What the command line shows as one line; anything else would be a traceback.
CLEAR = cli.EXPECTED
#: Seconds that one damaged input of a few kilobytes may take. A hang is what this is for, not speed.
PATIENCE = 20.0


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four faults: bytes changed, a part cut out, zeroed or doubled, the end cut off, digits changed."""
    for _ in range(rng.integers(1, 5)):
        if not data:
            return data
        start = int(rng.integers(len(data)))
        stop = min(len(data), start + int(2 ** rng.uniform(0, 11)))
        match rng.integers(8):
            case 0:
                data = data[:start] + rng.bytes(stop - start) + data[stop:]
            case 1:
                data = data[:start] + data[stop:]
            case 2:
                data = data[:start] + bytes(stop - start) + data[stop:]
            case 3:
                data = data[:stop] + data[start:stop] + data[stop:]
            case 4:
                data = data[:start]
            case 5:
                data = data[:start] + bytes([data[start] ^ 1 << int(rng.integers(8))]) + data[start + 1 :]
            case 6:
                place = start - start % 512  # a tar's header field: size, type, checksum
                field = place + int(rng.choice([100, 124, 135, 148, 156, 257]))
                data = data[:field] + rng.bytes(1) + data[field + 1 :]
            case 7:
                digits = [i for i in range(start, stop) if data[i : i + 1].isdigit()]
                for i in digits[:3]:
                    data = data[:i] + b"%d" % rng.integers(10) + data[i + 1 :]
    return data


class Bench:
    """A small data set, its store, a checkpoint and a config, whole; each trial damages one file of a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng = folder, np.random.default_rng(0)
        samples = []
        for i in range(6):
            pixels = rng.integers(0, 256, (12, 10 + i, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, ("PNG", "JPEG", "WEBP")[i % 3])
            samples.append(Sample(f"k{i}", buffer.getvalue(), [f"caption {i % 4}", "another"][: 1 + i % 2], {"n": i}))
        (self.tar,) = write_shards(samples, folder / "source", "train", form=Form())
        weights = folder / "clip.safetensors"
        save_file({key: value.contiguous() for key, value in build_clip("tiny-rn").state_dict().items()}, weights)
        precompute(str(folder / "source"), str(folder / "store"), ClipSpec("tiny-rn", str(weights)), device="cpu")
        self.checkpoint = folder / "last.ckpt"
        torch.save({"state_dict": {"w": torch.arange(6.0)}, "epoch": 3, "names": ["a", "b"]}, self.checkpoint)
        self.config = folder / "pack.yaml"
        self.config.write_text(CONFIG)
        self.trials: dict[str, tuple[Path, Callable[[Path], None]]] = {
            "tar": (self.tar, self.read_tar),
            "pack manifest": (folder / "source" / "train.manifest.jsonl", self.read_pack_manifest),
            "manifest": (folder / "store" / "manifest.jsonl", self.read_store),
            "features": (folder / "store" / "train-000000.safetensors", self.read_store),
            "statistics": (folder / "store" / "statistics.safetensors", self.read_statistics),
            "config": (self.config, self.read_config),
            "checkpoint": (self.checkpoint, self.read_checkpoint),
        }

    def read_tar(self, path: Path) -> None:
        """Check that every entry lies inside the file, is decoded or has a reason, and is counted once."""
        index = index_shard(path)
        length, keys = path.stat().st_size, [entry.key for entry in index.entries]
        assert len(set(keys)) == len(keys)
        assert all(
            e.image.offset >= 0 and e.image.offset + e.image.size <= length and e.captions for e in index.entries
        )
        assert all(reason and names for reason, names in index.skipped.items())
        found = [pair for batch in decode_entries(path, index.entries, 8, 4) for pair in batch]
        assert [entry for entry, _ in found] == index.entries
        assert all(image.shape == (3, 8, 8) if isinstance(image, torch.Tensor) else str(image) for _, image in found)
        assert index_shard(path) == index

    def read_pack_manifest(self, path: Path) -> None:
        """Ignore damaged lines."""
        read_packed(path)

    def read_store(self, path: Path) -> None:
        """Read all rows, with a caption each, unless the store is refused."""
        store = EmbeddingStore(path.parent, str(self.folder / "source"), image_size=8)
        assert len(store) == 6
        batch = RowBatch(np.arange(6), np.arange(6, dtype=np.uint64))
        text = store.prior_batch(batch).text
        assert text.mask.any(1).all()
        assert text.states.shape[:2] == text.mask.shape
        assert all(store.captions(batch))
        store.decoder_batch(batch)
        store.metadata(batch)

    def read_statistics(self, path: Path) -> None:
        EmbeddingSpace(str(path))

    def read_config(self, path: Path) -> None:
        """Parse a config; the file that it names is missing, so even a whole one ends in one line."""
        said = io.StringIO()
        with redirect_stderr(said):
            assert cli.run(["pack", "coco", "--config", str(path)]) != 0
        assert "Traceback" not in said.getvalue()
        assert said.getvalue()

    def read_checkpoint(self, path: Path) -> None:
        """Check that a checkpoint is whole, to the last byte that matters, unless it is refused."""
        found = read_checkpoint(path)
        assert torch.equal(found["state_dict"]["w"], torch.arange(6.0))
        assert (found["epoch"], found["names"]) == (3, ["a", "b"])


def trial(bench: Bench, kind: str, seed: int) -> str:
    """Damage one file and read it.

    Returns:
        ``fine``, or the type of the clear error.

    Raises:
        Exception: what would have been a traceback, a wrong count or a hang.
    """
    path, read = bench.trials[kind]
    data = damaged(path.read_bytes(), np.random.default_rng([seed, len(kind)]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if path.parent == bench.folder / "store":
            shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        (folder / path.name).write_bytes(data)
        begin = time.process_time()
        try:
            read(folder / path.name)
        except CLEAR as error:
            return type(error).__name__ if str(error) else "an error without a word"
        assert time.process_time() - begin < PATIENCE
        return "fine"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", ["tar", "pack manifest", "manifest", "features", "statistics", "config", "checkpoint"])
def test_damage_is_refused_in_one_clear_error_or_harmless(bench: Bench, kind: str) -> None:
    count = 100 if kind == "config" else 300  # a parser is built for each config
    came = {trial(bench, kind, seed) for seed in range(count)}
    assert came <= {"fine", "InputError", "UnknownFormatError", "MissingFileError", "UnicodeDecodeError", "OSError"}


def test_damaged_training_configs_are_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read by Lightning's own parser, which takes its time: few of them."""
    whole = (
        (Path("configs") / "prior" / "tiny.yaml").read_text().replace("../data", str(Path("configs/data").resolve()))
    )
    for seed in range(8):
        path = tmp_path / f"{seed}.yaml"
        path.write_bytes(damaged(whole.encode(), np.random.default_rng(seed)))
        try:
            status = cli.run(["fit", "--config", str(path), "--print_config"])
        except SystemExit as ended:  # jsonargparse's own errors, and a config that was printed
            status = ended.code
        assert status in (0, 1, 2)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert status == 0 or "error: " in said


def main(count: int, first: int) -> int:
    """Try and count; what went wrong is printed with the seed that repeats it."""
    wrong, came = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for seed in range(first, first + count):
            kind = list(bench.trials)[seed % len(bench.trials)]
            try:
                came[f"{kind}: {trial(bench, kind, seed)}"] += 1
            except Exception as error:
                wrong += 1
                print(f"--kind {kind!r} --seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    for line, number in sorted(came.items()):
        print(f"{number:6d} {line}")
    print(f"{count} damaged inputs, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    sys.exit(main(options.count, options.first))
