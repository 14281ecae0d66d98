"""Tiny shards and a tiny CLIP of fixed random weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec, build_clip
from unclip_pl.data.precompute import precompute
from unclip_pl.packing.pack import write_shards
from unclip_pl.packing.samples import Sample


def make_samples(count: int, prefix: str = "s", seed: int = 0) -> list[Sample]:
    """Noise images; every third has two captions, of different lengths, and some captions are shared."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        captions = [f"number {i % 7}" + " and more" * (i % 4)] + ["a second caption"] * (i % 3 == 0)
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        samples.append(Sample(f"{prefix}{i:04d}", image, captions, {"number": i}))
    return samples


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipSpec:
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    torch.manual_seed(0)
    state = build_clip("tiny-rn").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return ClipSpec("tiny-rn", str(path))


@pytest.fixture(scope="session")
def encoder(clip: ClipSpec) -> ClipEncoder:
    return clip.load()


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> ClipSpec:
    path = tmp_path_factory.mktemp("other") / "clip.safetensors"
    torch.manual_seed(1)
    state = build_clip("tiny-rn").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return ClipSpec("tiny-rn", str(path))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train: 3 shards of 20, 20 and 10; val: 6; heldout: 7."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(make_samples(50, "t"), folder, "train", shard_size=20)
    write_shards(make_samples(6, "v", seed=1), folder, "val")
    write_shards(make_samples(7, "h", seed=2), folder, "heldout")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, source: Path, clip: ClipSpec) -> Path:
    folder = tmp_path_factory.mktemp("store") / "embeddings"
    precompute(str(source), str(folder), clip, batch_size=8, device="cpu")
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Callable[[Path], str]]:
    """Makes a folder's files readable over http, and says where."""
    with ExitStack() as servers:

        def serve(folder: Path) -> str:
            handler = partial(_Quiet, directory=str(folder))
            server = servers.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


@pytest.fixture
def shelved() -> Iterator[Callable[..., str]]:
    """Copies a folder's files into fsspec's memory, and says where."""
    system = fsspec.filesystem("memory")

    def shelve(folder: Path, name: str = "") -> str:
        for path in folder.iterdir():
            system.pipe(f"/shelf/{name}/{path.name}" if name else f"/shelf/{path.name}", path.read_bytes())
        return f"memory://shelf/{name}".rstrip("/")

    yield shelve
    for path in system.find("/shelf"):
        system.rm_file(path)
