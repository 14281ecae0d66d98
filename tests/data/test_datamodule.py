import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data import datamodule as module
from unclip_pl.data.datamodule import PairDataModule, UnclipDataModule
from unclip_pl.data.pairs import PairStore
from unclip_pl.data.sampler import RowBatch, row_draws
from unclip_pl.data.shards import Split
from unclip_pl.data.transforms import to_pixels
from unclip_pl.types import ClipBatch, DecoderBatch, EvaluationBatch, PriorBatch, UpsamplerBatch


class Recorder(LightningModule):
    """A task that keeps what it is given."""

    batch_type: type = PriorBatch

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: tuple) -> Tensor:
        self.seen["train"].append((self.current_epoch, batch))
        return self.weight * 0

    def validation_step(self, batch: tuple) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: tuple) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: tuple) -> None:
        self.seen["predict"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def trainer(**options: object) -> Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**(defaults | {"enable_model_summary": False, "num_sanity_val_steps": 0} | options))


@pytest.fixture
def data(source: Path, store: Path, clip: ClipSpec) -> UnclipDataModule:
    return UnclipDataModule(str(source), str(store), clip, batch_size=8)


def test_widths_are_the_clips(data: UnclipDataModule) -> None:
    assert (data.embed_dim, data.text_width, data.context_length, data.image_size) == (64, 128, 16, 32)


def test_a_fit_sees_every_split(data: UnclipDataModule) -> None:
    task = Recorder()
    trainer(max_epochs=2).fit(task, data)
    assert [epoch for epoch, _ in task.seen["train"]] == [0] * 6 + [1] * 6
    epochs = [torch.cat([b.image_embed for e, b in task.seen["train"] if e == epoch]) for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    rows = {tuple(row) for row in torch.cat(epochs).tolist()}
    assert len(rows) == 50
    assert sum(len(batch.image_embed) for batch in task.seen["val"]) == 2 * 6
    runner = trainer()
    runner.test(task, data)
    runner.predict(task, data)
    for stage in ("test", "predict"):
        expected = data.embeddings.prior_batch(RowBatch(data.embeddings.rows(Split.HELDOUT), np.zeros(7, np.uint64)))
        assert torch.equal(torch.cat([batch.image_embed for batch in task.seen[stage]]), expected.image_embed)


@pytest.mark.parametrize("kind", [PriorBatch, DecoderBatch, UpsamplerBatch, EvaluationBatch])
def test_the_task_says_what_a_batch_is(data: UnclipDataModule, kind: type) -> None:
    task = Recorder()
    task.batch_type = kind
    trainer().test(task, data)
    assert {type(batch) for batch in task.seen["test"]} == {kind}


def test_an_unknown_batch_type_is_an_error(data: UnclipDataModule) -> None:
    task = Recorder()
    task.batch_type = ClipBatch
    with pytest.raises(ValueError, match=r"Recorder.batch_type .* PriorBatch"):
        trainer().test(task, data)


def test_workers_change_nothing(source: Path, store: Path, clip: ClipSpec) -> None:
    runs = []
    for workers in (0, 2):
        task = Recorder()
        task.batch_type = EvaluationBatch
        data = UnclipDataModule(str(source), str(store), clip, batch_size=16, num_workers=workers, seed=5)
        trainer(max_epochs=2, limit_val_batches=0).fit(task, data)
        runs.append(task.seen["train"])
    assert len(runs[0]) == 6
    for (_, one), (_, two) in zip(*runs, strict=True):
        assert one.captions == two.captions
        assert torch.equal(one.image, two.image)


def test_images_of_another_size(source: Path, store: Path, clip: ClipSpec) -> None:
    data = UnclipDataModule(str(source), str(store), clip, image_size=16)
    assert data.embeddings.upsampler_batch(RowBatch(np.array([0]), np.zeros(1, np.uint64))).image.shape[-1] == 16


def test_statistics_make_a_missing_store(source: Path, clip: ClipSpec, tmp_path: Path) -> None:
    data = UnclipDataModule(f"{source}/val-*.tar", str(tmp_path / "new"), clip)
    assert Path(data.statistics).is_file()
    assert len(data.embeddings) == 6


def test_several_processes_do_not_wait_for_one(
    source: Path, clip: ClipSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = UnclipDataModule(str(source), str(tmp_path / "new"), clip)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"5 shards .* 4 processes .* `unclip precompute"):
        _ = data.statistics
    made = []
    monkeypatch.setattr(module, "precompute", lambda *args, **__: made.append(args))
    data.ensure_store(4, allowed=5)
    assert len(made) == 1


def test_a_split_without_images(source: Path, clip: ClipSpec, tmp_path: Path) -> None:
    data = UnclipDataModule(f"{source}/train-*.tar", str(tmp_path / "new"), clip, batch_size=8)
    trainer(max_epochs=1).fit(Recorder(), data)
    with pytest.raises(ValueError, match="Expected heldout images"):
        trainer().test(Recorder(), data)


@pytest.fixture(params=["kept", "read again"])
def pairs(request: pytest.FixtureRequest, source: Path, encoder: ClipEncoder) -> PairStore:
    memory = 2**31 if request.param == "kept" else 0
    return PairStore(str(source), encoder.tokenize, image_size=32, memory=memory)


def test_pairs_are_those_of_the_store(pairs: PairStore, data: UnclipDataModule) -> None:
    rows = np.random.default_rng(0).permutation(63)
    batch = RowBatch(rows, row_draws(rows, seed=0, epoch=0))
    ours, theirs = pairs.batch(batch), data.embeddings.decoder_batch(batch)
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.tokens[:, : theirs.text.tokens.shape[1]], theirs.text.tokens)
    assert np.array_equal(pairs.rows(Split.HELDOUT), data.embeddings.rows(Split.HELDOUT))


def test_a_batch_keeps_its_size_whatever_went_bad_since(tmp_path: Path, source: Path, encoder: ClipEncoder) -> None:
    shutil.copytree(source, tmp_path / "shards")
    pairs = PairStore(str(tmp_path / "shards"), encoder.tokenize, image_size=32, memory=0)
    rows = pairs.rows(Split.TRAIN)[:5]
    draws = np.zeros(5, np.uint64)
    before = pairs.batch(RowBatch(rows, draws))
    shard, entry = pairs.entries[rows[1]]
    with shard.open("r+b") as file:
        file.seek(entry.image[0])
        file.write(b"junk")
    after = pairs.batch(RowBatch(rows, draws))
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now, was[[0, 2, 3, 4, 0]])


def test_shifts_move_whole_images_and_repeat_the_edge(pairs: PairStore) -> None:
    rows = pairs.rows(Split.TRAIN)
    draws = row_draws(rows, seed=0, epoch=0)
    still, moved = pairs.batch(RowBatch(rows, draws)), pairs.batch(RowBatch(rows, draws), shift=2)
    padded = F.pad(still.image, (2, 2, 2, 2), mode="replicate")
    windows = {(y, x): padded[:, :, y : y + 32, x : x + 32] for y in range(5) for x in range(5)}
    found = {place for i in range(50) for place, w in windows.items() if torch.equal(w[i], moved.image[i])}
    assert all(any(torch.equal(w[i], moved.image[i]) for w in windows.values()) for i in range(50))
    assert len(found) > 12
    assert torch.equal(still.tokens, moved.tokens)


def test_pair_datamodule_feeds_a_clip(source: Path, clip: ClipSpec) -> None:
    data, task = PairDataModule(str(source), clip, batch_size=16, shift=1), Recorder()
    trainer(max_epochs=2).fit(task, data)
    assert len(task.seen["train"]) == 6
    assert {type(batch) for _, batch in task.seen["train"]} == {ClipBatch}
    (val, _) = task.seen["val"]
    assert val.image.shape == (6, 3, 32, 32)
    assert val.tokens.shape == (6, 16)
    assert torch.equal(val.image, to_pixels(data.pairs.images[data.pairs.rows(Split.VAL)]))
