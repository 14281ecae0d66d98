"""Images in a stream: the samples of the exact reader, in an order of the stream's own."""

import io
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from unclip_pl.cli import main
from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.datamodule import StreamedImages, UnclipDataModule
from unclip_pl.data.precompute import embed_share, finish
from unclip_pl.data.sampler import RowBatch, row_draws
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.streamed import Shuffled, Step, StepSampler, StreamedStore
from unclip_pl.errors import InputError
from unclip_pl.packing.pack import write_shards
from unclip_pl.types import EvaluationBatch, PriorBatch

from .test_datamodule import Recorder, trainer


@pytest.fixture
def remote(
    source: Path, encoder: ClipEncoder, tmp_path: Path, served: Callable[[Path], str], shelved: Callable[[Path], str]
) -> Callable[[str], tuple[str, str]]:
    """Makes source and store of shards behind a scheme."""

    def make(scheme: str) -> tuple[str, str]:
        url = {"local": str, "memory": shelved, "http": served}[scheme](source)
        embed_share(url, str(tmp_path / scheme), encoder, batch_size=8)
        finish(url, str(tmp_path / scheme), encoder)
        return url, str(tmp_path / scheme)

    return make


def evaluated(data: UnclipDataModule) -> Recorder:
    """A task that has seen one epoch of training, and the other splits."""
    task, runner = Recorder(), trainer(max_epochs=2)
    task.batch_type = EvaluationBatch
    runner.fit(task, data)
    runner.test(task, data)
    return task


@pytest.mark.parametrize(("scheme", "workers"), [("local", 2), ("memory", 0), ("http", 0)])
def test_samples_are_the_exact_readers(
    remote: Callable[[str], tuple[str, str]],
    source: Path,
    store: Path,
    clip: ClipSpec,
    scheme: str,
    workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also from a server that gives whole files only; in training in another order, else in the very same."""
    exact = evaluated(UnclipDataModule(str(source), str(store), clip, batch_size=8))
    data = StreamedImages(*remote(scheme), clip, shuffle=20, batch_size=8, num_workers=workers)
    streamed = evaluated(data)
    assert caplog.text.count("StreamedImages cannot go on at the sample") == 1
    for split in ("val", "test"):
        for ours, theirs in zip(streamed.seen[split], exact.seen[split], strict=True):
            assert_same(ours, theirs)
    local = EmbeddingStore(store, str(source), image_size=32)
    row_of = {local.metadata(one(row))[0]["number"]: row for row in local.rows(Split.TRAIN).tolist()}
    epochs: tuple[list[int], list[int]] = ([], [])
    assert len(streamed.seen["train"]) == 12
    for epoch, batch in streamed.seen["train"]:
        rows = np.array([row_of[meta["number"]] for meta in batch.metadata])
        assert_same(batch, local.evaluation_batch(RowBatch(rows, row_draws(rows, seed=0, epoch=epoch))))
        epochs[epoch].extend(rows.tolist())
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    if not workers:  # one reader: every sample once, but for the rest of an epoch
        assert [len(set(rows)) for rows in epochs] == [48, 48]
        assert not data.embeddings.skipped.total()


def one(row: int) -> RowBatch:
    return RowBatch(np.array([row]), np.zeros(1, np.uint64))


def assert_same(ours: EvaluationBatch, theirs: EvaluationBatch) -> None:
    assert (ours.captions, ours.metadata) == (theirs.captions, theirs.metadata)
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.image_embed, theirs.image_embed)
    for one_part, other_part in zip(ours.text, theirs.text, strict=True):
        assert torch.equal(one_part, other_part)


def test_splits_inside_shards(clip: ClipSpec, encoder: ClipEncoder, source: Path, tmp_path: Path) -> None:
    """Rows of a shard stand split by split, files in its tar do not."""
    for path in source.glob("train-*.tar"):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "mixed" / path.name.replace("train", "part"))
    many = [sample._replace(key=f"{sample.key}x{i}") for i in range(8) for sample in samples_of(50)]
    write_shards(many, tmp_path / "mixed", "part", shard_size=100)
    words = (str(tmp_path / "mixed"), str(tmp_path / "store"), clip)
    exact, streamed = (kind(*words, batch_size=8) for kind in (UnclipDataModule, StreamedImages))
    exact.prepare_data()
    assert all(exact.embeddings.count(split) for split in Split)
    for split in (Split.VAL, Split.HELDOUT):
        batches = []
        for data in (exact, streamed):
            task, runner = Recorder(), trainer()
            task.batch_type = EvaluationBatch
            data.trainer = runner
            runner.strategy.connect(task)
            batches.append(list(data._evaluation(split)))
        for ours, theirs in zip(*batches, strict=True):
            assert_same(ours, theirs)


def samples_of(count: int) -> list[Any]:
    from .conftest import make_samples

    return make_samples(count)


def test_every_rank_makes_as_many_batches_of_shards_of_its_own(source: Path, store: Path) -> None:
    def rows(rank: int, step: Step) -> list[int]:
        embeddings, seen = StreamedStore(store, str(source), image_size=32), []
        stream = Shuffled(embeddings, seen.append, 5, buffer=7, seed=3, rank=rank, world_size=3)
        for _ in range(3):
            stream(step)
        assert {len(batch.rows) for batch in seen} == {5}
        return [row for batch in seen for row in batch.rows.tolist()]

    ranks = [rows(rank, Step(0, 0)) for rank in range(3)]  # shards of 20, 20 and 10: the last repeats
    assert len(set(ranks[0]) | set(ranks[1]) | set(ranks[2])) == sum(len(set(rank)) for rank in ranks)
    assert [len(rank) for rank in ranks] == [15, 15, 15]
    assert rows(0, Step(0, 0)) == ranks[0]
    assert rows(0, Step(0, 2)) != ranks[0]
    assert rows(0, Step(1, 0)) != ranks[0]


def test_steps_of_a_resumed_epoch() -> None:
    sampler = StepSampler(5, epoch=2, start=3)
    assert list(sampler) == [Step(2, 3)] * 2
    sampler.set_epoch(3)
    assert list(sampler) == [Step(3, 0)] * 5
    assert len(sampler) == 5


def test_samples_without_an_embedding_are_counted_and_skipped(
    tmp_path: Path, clip: ClipSpec, encoder: ClipEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Those whose caption precompute could not use; and embeddings whose sample does not come."""
    first, second = io.BytesIO(), io.BytesIO()
    for tape, numbers in ((first, range(6)), (second, range(6, 8))):
        with tarfile.open(fileobj=tape, mode="w") as tar:
            for sample in (samples_of(8)[number] for number in numbers):
                caption = b"" if sample.key in ("s0002", "s0004") else sample.captions[0].encode()
                for suffix, data in (("png", png(sample.image)), ("txt", caption), ("PNG", b"again")):
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (tmp_path / "s").mkdir()
    (tmp_path / "s/train.tar").write_bytes(first.getvalue() + second.getvalue())  # a stream ends with the first
    embed_share(str(tmp_path / "s"), str(tmp_path / "store"), encoder, batch_size=8)
    finish(str(tmp_path / "s"), str(tmp_path / "store"), encoder, max_bad_fraction=0.9)
    store = StreamedStore(tmp_path / "store", str(tmp_path / "s"), image_size=32)
    assert len(store) == 6
    for _ in range(2):
        assert [sample.row for sample in store.samples(0, range(6))] == [0, 1, 2, 3]
    assert store.skipped == {"no embedding": 4, "not in the stream": 4}
    assert caplog.text.count("skipped 2 sample(s), no embedding: s0002, s0004") == 1
    assert caplog.text.count("skipped 2 sample(s), not in the stream: s0006, s0007") == 1


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def test_priors_read_no_shard(source: Path, store: Path, clip: ClipSpec, tmp_path: Path) -> None:
    data, exact = (kind(str(source), str(store), clip, batch_size=8) for kind in (StreamedImages, UnclipDataModule))
    tasks = [Recorder(), Recorder()]
    for task, each in zip(tasks, (data, exact), strict=True):
        assert task.batch_type is PriorBatch
        trainer(max_epochs=1).fit(task, each)
    for (_, ours), (_, theirs) in zip(tasks[0].seen["train"], tasks[1].seen["train"], strict=True):
        assert torch.equal(ours.image_embed, theirs.image_embed)


def test_a_remote_shard_that_changed_or_is_gone(remote: Callable[[str], tuple[str, str]], source: Path) -> None:
    url, store = remote("memory")
    streamed = StreamedStore(store, f"{url}/train-{{000000..000002}}.tar", image_size=32)
    system = fsspec.filesystem("memory")
    system.pipe("/shelf/train-000001.tar", (source / "train-000001.tar").read_bytes())
    with pytest.raises(InputError, match=r"train-000001.tar is not the file that was embedded"):
        list(streamed.samples(1, range(63)))
    system.rm_file("/shelf/train-000001.tar")
    with pytest.raises(InputError, match=r"train-000001.tar does not exist"):
        list(streamed.samples(1, range(63)))


def test_a_broken_tar_is_read_as_far_as_it_goes(
    source: Path, store: Path, encoder: ClipEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (source / "train-000000.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(data[: len(data) // 2 + 700])
    embed_share(str(tmp_path), str(tmp_path / "store"), encoder, batch_size=8)
    finish(str(tmp_path), str(tmp_path / "store"), encoder, max_bad_fraction=0.5)
    streamed = StreamedStore(tmp_path / "store", str(tmp_path), image_size=32)
    assert [sample.row for sample in streamed.samples(0, range(63))] == list(range(len(streamed)))
    assert "train.tar: broken tar (ReadError)" in caplog.text


def fitted(data: UnclipDataModule, **options: object) -> None:
    task = Recorder()
    task.batch_type = EvaluationBatch
    trainer(max_epochs=1, limit_val_batches=0, **options).fit(task, data)


def test_what_a_stream_cannot_do(source: Path, store: Path, clip: ClipSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def data(**options: Any) -> StreamedImages:
        return StreamedImages(str(source), str(store), clip, **({"batch_size": 8} | options))

    with pytest.raises(InputError, match=r"no trainer.overfit_batches. Got 50: use UnclipDataModule"):
        fitted(data(), overfit_batches=2)
    with pytest.raises(InputError, match=r"at least batch_size × ranks = 64 × 1 training images"):
        fitted(data(batch_size=64))
    streamed = Shuffled(data().embeddings, len, 8, buffer=8, seed=0, rank=3, world_size=4)
    with pytest.raises(InputError, match=r"a shard for each of 4 readers .* Got 3 shards"):
        streamed(Step(0, 0))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match=r"install unclip_pl\[stream\]"):
        fitted(data())


def test_it_is_chosen_by_its_class_path(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "configs/decoder/tiny.yaml", "--data", "unclip_pl.data.datamodule.StreamedImages"]
    assert main([*words, "--data.init_args.shuffle", "500", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "class_path: unclip_pl.data.datamodule.StreamedImages" in printed
    assert "shuffle: 500" in printed
    assert "source: data/raw/shapes" in printed
    assert "batch_size: 32" in printed
