"""Stores without token states: training encodes the captions of each batch, and comes to the same losses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from unclip_pl.cli import main
from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.datamodule import StreamedImages, UnclipDataModule
from unclip_pl.data.precompute import Part, embed_share, finish, precompute
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.store import map_features, read_manifest
from unclip_pl.errors import InputError
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.space import EmbeddingSpace
from unclip_pl.packing.pack import write_shards
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.types import DecoderBatch, EvaluationBatch, PriorBatch, UpsamplerBatch

from .conftest import make_samples
from .test_datamodule import Recorder, trainer


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, source: Path, clip: ClipSpec) -> Path:
    """The store of the same source without states."""
    folder = tmp_path_factory.mktemp("bare") / "embeddings"
    precompute(str(source), str(folder), clip, batch_size=8, device="cpu", states=False)
    return folder


def test_a_store_without_states_lacks_nothing_else(store: Path, bare: Path) -> None:
    whole, left = read_manifest(store), read_manifest(bare)
    assert {record.states for record in left.values()} == {False}
    for name, record in left.items():
        assert record == whole[name]._replace(sha256=record.sha256, states=False)
        ours, theirs = map_features(bare / record.file), map_features(store / record.file)
        for field, one, other in zip(ours._fields, ours, theirs, strict=True):
            assert field == "text_states" or (one == other).all()
        assert ours.text_states.shape == (len(ours.text_tokens), 0)
    sizes = [(folder / "train-000000.safetensors").stat().st_size for folder in (bare, store)]
    assert sizes[0] < 0.75 * sizes[1]  # at this CLIP's widths
    null, same = (EmbeddingSpace(str(folder / "statistics.safetensors")).null_text for folder in (bare, store))
    assert torch.equal(null.states, same.states)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (UnclipDataModule, PriorBatch),
        (UnclipDataModule, DecoderBatch),
        (UnclipDataModule, UpsamplerBatch),
        (StreamedImages, EvaluationBatch),
    ],
)
def test_batches_are_those_of_a_store_with_states(
    source: Path, store: Path, bare: Path, clip: ClipSpec, kind: Any, data: type[UnclipDataModule]
) -> None:
    seen = []
    for folder in (store, bare):
        task = Recorder()
        task.batch_type = kind
        trainer().test(task, data(str(source), str(folder), clip, batch_size=3))
        seen.append(task.seen["test"])
    assert len(seen[0]) == 3
    for ours, theirs in zip(*seen, strict=True):
        for name in set(kind._fields) & {"image", "image_embed"}:
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        if kind is not UpsamplerBatch:
            torch.testing.assert_close(ours.text.states, theirs.text.states, rtol=2e-3, atol=2e-3)
            for name in ("tokens", "mask", "embed"):
                assert torch.equal(getattr(ours.text, name), getattr(theirs.text, name))


def test_chosen_rows_are_complete_batches(source: Path, store: Path, bare: Path, clip: ClipSpec) -> None:
    """Scores while training ask for some rows, for later ones, and for earlier ones again."""
    exact = UnclipDataModule(str(source), str(store), clip)
    others = [UnclipDataModule(str(source), str(bare), clip), StreamedImages(str(source), str(store), clip)]
    for rows in ([1, 4, 30], [31, 60], [0]):
        chosen = RowBatch(np.array(rows), np.zeros(len(rows), np.uint64))
        expected = exact.batch(EvaluationBatch, chosen, torch.device("cpu"))
        for data in others:
            found = data.batch(EvaluationBatch, chosen, torch.device("cpu"))
            assert (found.captions, found.metadata) == (expected.captions, expected.metadata)
            assert torch.equal(found.image, expected.image)
            torch.testing.assert_close(found.text.states, expected.text.states, rtol=2e-3, atol=2e-3)


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_prior_trains_to_the_same_loss(source: Path, store: Path, bare: Path, clip: ClipSpec, precision: str) -> None:
    """To rounding: a store's states are halves. The networks begin alike, and the noise is the same."""
    losses = []
    for folder in (store, bare):
        torch.manual_seed(0)
        data = UnclipDataModule(str(source), str(folder), clip, batch_size=16)
        net = PriorTransformer(data.embed_dim, data.text_width, data.context_length, width=32, layers=2, heads=2)
        task, kept = DiffusionPriorTask(net, data.statistics), Losses()
        trainer(max_steps=4, limit_val_batches=1, callbacks=[kept], precision=precision).fit(task, data)
        losses.append(torch.tensor(kept.values))
    assert len(losses[0]) == 4
    torch.testing.assert_close(*losses, rtol=1e-3 if precision == "32-true" else 2e-2, atol=0)


def test_the_other_kind_is_refused(source: Path, store: Path, bare: Path, encoder: ClipEncoder) -> None:
    for folder, states, kept in ((store, False, "yes"), (bare, True, "no")):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for part in (None, Part(1, 2)):
            with pytest.raises(InputError, match=rf"--states {kept}, as .* was made.*or another --store"):
                embed_share(str(source), str(folder), encoder, batch_size=8, states=states, part=part)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_parts_of_both_kinds_make_no_store(source: Path, encoder: ClipEncoder, tmp_path: Path) -> None:
    for number in (1, 2):
        embed_share(str(source), str(tmp_path), encoder, batch_size=8, part=Part(number, 2), states=number == 1)
    with pytest.raises(InputError, match=r"none or not all of 1/2: .*or others \(caption_key, states\)"):
        finish(str(source), str(tmp_path), encoder, states=False)
    embed_share(str(source), str(tmp_path), encoder, batch_size=8, part=Part(1, 2), states=False)
    finish(str(source), str(tmp_path), encoder, states=False)


def test_a_fit_completes_a_store_of_its_kind(source: Path, bare: Path, clip: ClipSpec, tmp_path: Path) -> None:
    tars, store = Path(shutil.copytree(source, tmp_path / "s")), Path(shutil.copytree(bare, tmp_path / "store"))
    write_shards(make_samples(9, "new", seed=4), tars, "train-more")
    data = UnclipDataModule(str(tars), str(store), clip)
    data.prepare_data()
    assert {record.states for record in read_manifest(store).values()} == {False}
    assert len(data.embeddings) == 72


def test_the_command(
    source: Path, bare: Path, clip: ClipSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["precompute", "--source", str(source), "--store", str(tmp_path), "--batch_size", "8"]
    words += ["--accelerator", "cpu", "--clip.name", clip.name, "--clip.pretrained", clip.pretrained]
    assert main([*words, "--states", "no", "--part", "1/1"]) == 0
    assert main([*words, "--states", "no", "--finish"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in bare.iterdir()
    }
    assert main(words) == 1
    assert "Expected --states no, as" in capsys.readouterr().err
