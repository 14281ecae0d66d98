"""Dumps of embeddings as stores: what is in them comes back, a killed import goes on, and a prior trains on it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from unclip_pl.cli import main
from unclip_pl.commands.reproduce import _read_through
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split, split_of_key
from unclip_pl.data.store import (
    EmbeddingStore,
    ShardFeatures,
    read_contents,
    read_manifest,
    unpack_texts,
    write_features,
    write_manifest,
)
from unclip_pl.files import read_tensors
from unclip_pl.generation.priors import DiffusionPriorSpec, LinearPriorSpec
from unclip_pl.interop import embeddings as module
from unclip_pl.training.cli import build

N, D, E = 300, 6, 4


class Pairs:
    """Embeddings with keys and captions, in any order."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.image, self.text = rng.normal(size=(N, D)), rng.normal(size=(N, E))
        self.keys = [f"{i:09d}" for i in range(N)]
        self.captions = [f"caption {i}" for i in range(N)]

    def write(self, folder: Path, rows: np.ndarray, number: int, *, nested: bool = False) -> None:
        for name, values in (("img_emb", self.image), ("text_emb", self.text)):
            path = folder / name if nested else folder
            path.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{name}_{number}.npy", values[rows].astype(np.float16))
        path = folder / "metadata" if nested else folder
        path.mkdir(parents=True, exist_ok=True)
        columns = {"image_path": [self.keys[i] for i in rows], "caption": [self.captions[i] for i in rows]}
        pq.write_table(pa.table(columns), path / f"metadata_{number}.parquet", row_group_size=70)


@pytest.fixture
def pairs() -> Pairs:
    return Pairs()


@pytest.fixture
def dump(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of 170 and 130 rows, imported in pieces of 64."""
    monkeypatch.setattr(module, "ROWS", 64)
    pairs.write(tmp_path / "dump", np.arange(170), 0)
    pairs.write(tmp_path / "dump", np.arange(170, N), 1)
    return tmp_path / "dump"


def run(*words: object) -> int:
    return main(["import", "embeddings", *map(str, words)])


def content(store: Path) -> dict[str, tuple[np.ndarray, np.ndarray, str, int]]:
    """Return (z_i, z_t, caption, split) of every key."""
    opened, found = EmbeddingStore(store), {}
    for split in Split:
        rows = opened.rows(split)
        batch = RowBatch(rows, np.zeros(len(rows), np.uint64))
        prior, captions = opened.prior_batch(batch), opened.captions(batch)
        keys = [
            key
            for shard in range(len(opened.shards))
            for key in np.array(unpack_texts(*opened.features(shard)[9:11], np.arange(opened.records[shard].images)))[
                opened.features(shard).split == split
            ]
        ]
        for key, *values in zip(keys, prior.image_embed.numpy(), prior.text.embed.numpy(), captions, strict=True):
            found[str(key)] = (*values, int(split))
    return found


def test_a_dump_comes_back_row_by_row(dump: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(dump, "--out", tmp_path / "store") == 0
    told = capsys.readouterr().out
    norms = np.linalg.norm(pairs.image.astype(np.float16).astype(np.float32), axis=1)
    assert "300 pairs" in told
    assert f"z_i of 6 numbers: norms {norms.min():.3f} to {norms.max():.3f}, mean {norms.mean():.3f}" in told
    found = content(tmp_path / "store")
    assert found.keys() == set(pairs.keys)
    for i, key in enumerate(pairs.keys):
        image, text, caption, split = found[key]
        assert np.array_equal(image, pairs.image[i].astype(np.float16))
        assert np.array_equal(text, pairs.text[i].astype(np.float16))
        assert (caption, split) == (f"caption {i}", split_of_key(key))
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 3 + 3 + 1


def test_a_killed_import_goes_on(dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(dump, "--out", tmp_path / "whole") == 0
    written = []
    write = module.write_features

    def killed(path: Path, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(module, "write_features", killed)
    assert run(dump, "--out", tmp_path / "store") == 130
    with pytest.raises(FileNotFoundError, match="Expected a finished store"):
        EmbeddingStore(tmp_path / "store")
    monkeypatch.setattr(module, "write_features", lambda path, *rest: written.append(path.name) or write(path, *rest))
    assert run(dump, "--out", tmp_path / "store") == 0
    assert len(written) == len(set(written)) == 6, "nothing is read twice"
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "store").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "store" / name).read_bytes() for name in files)


def test_a_corrected_dump_is_read_again(
    dump: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    right = pairs.image[20:30].copy()
    pairs.image[20:30] = np.nan
    pairs.write(dump, np.arange(170), 0)
    assert run(dump, "--out", tmp_path / "store") == 1
    assert "10 rows cannot be used" in capsys.readouterr().err
    pairs.image[20:30] = right
    pairs.write(dump, np.arange(170), 0)
    pairs.captions[200] = "another caption"
    pairs.write(dump, np.arange(170, N), 1)
    assert run(dump, "--out", tmp_path / "store") == 0
    found = content(tmp_path / "store")
    assert np.array_equal(found[pairs.keys[25]][0], pairs.image[25].astype(np.float16))
    assert found[pairs.keys[200]][2] == "another caption"
    before = _read_through(str(tmp_path / "store"), tmp_path, note=False)
    for path in dump.iterdir():
        os.utime(path)  # touched, not changed: no study of the store begins again
    assert run(dump, "--out", tmp_path / "store") == 0
    assert _read_through(str(tmp_path / "store"), tmp_path, note=False) == before


def test_two_dumps_are_joined_by_key(pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another order, files of other sizes, clip-retrieval's folders; one image has no text."""
    pairs.write(tmp_path / "images", np.arange(N), 0, nested=True)
    order = np.random.default_rng(1).permutation(np.arange(1, N))
    for number, rows in enumerate(np.split(order, [40, 41])):
        pairs.write(tmp_path / "texts", rows, number, nested=True)
    assert run(tmp_path / "images", tmp_path / "texts", "--out", tmp_path / "store") == 0
    assert "skipped 1 row(s), no partner: 000000000" in caplog.text
    found = content(tmp_path / "store")
    assert found.keys() == set(pairs.keys[1:])
    assert all(np.array_equal(found[key][1], pairs.text[int(key)].astype(np.float16)) for key in found)
    pairs.write(tmp_path / "texts", order[:3], 3, nested=True)
    assert run(tmp_path / "images", tmp_path / "texts", "--out", tmp_path / "other") == 1


def test_plain_files_and_columns_the_other_way_round(dump: Path, pairs: Pairs, tmp_path: Path) -> None:
    for name, values in (("one", pairs.image), ("other", pairs.text)):
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    assert run(tmp_path / "one.npy", tmp_path / "other.npy", "--out", tmp_path / "plain") == 0
    plain = content(tmp_path / "plain")
    image, text, caption, _ = plain["00000-000000007"]
    assert np.array_equal(image, pairs.image[7].astype(np.float16))
    assert caption == ""
    named = ["--image_column", "one", "--text_column", "other", "--caption_column", ""]
    assert run(tmp_path, *named, "--out", tmp_path / "named") == 0
    assert EmbeddingStore(tmp_path / "named").fingerprint == EmbeddingStore(tmp_path / "plain").fingerprint
    assert run(dump, "--image_column", "text_emb", "--text_column", "img_emb", "--out", tmp_path / "reverse") == 0
    image, text, *_ = content(tmp_path / "reverse")[pairs.keys[7]]
    assert np.array_equal(text, pairs.image[7].astype(np.float16))
    assert np.array_equal(image, pairs.text[7].astype(np.float16))


def test_bad_rows_are_named_and_left_out(
    dump: Path, pairs: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    pairs.image[3, 0], pairs.text[70], pairs.image[200, 1] = np.nan, 0, 1e6
    with np.errstate(over="ignore"):
        pairs.write(dump, np.arange(170), 0)
        pairs.write(dump, np.arange(170, N), 1)
    assert run(dump, "--out", tmp_path / "store", "--max_bad_fraction", "0.005") == 1
    assert "3 rows cannot be used (not finite in float16: 2, all zeros: 1)" in capsys.readouterr().err
    assert run(dump, "--out", tmp_path / "store") == 0
    assert "00000-00000: skipped 1 row(s), not finite in float16: 000000003" in caplog.text
    assert content(tmp_path / "store").keys() == set(pairs.keys) - {pairs.keys[i] for i in (3, 70, 200)}
    assert EmbeddingStore(tmp_path / "store").records[1].skipped == {"all zeros": 1}


def short(dump: Path) -> None:
    pairs = Pairs()
    np.save(dump / "text_emb_1.npy", pairs.text[:5].astype(np.float16))


def truncated(dump: Path) -> None:
    path = dump / "img_emb_1.npy"
    path.write_bytes(path.read_bytes()[:-100])


def integers(dump: Path) -> None:
    np.save(dump / "img_emb_0.npy", np.zeros((170, D), np.int8))


def wide(dump: Path) -> None:
    np.save(dump / "img_emb_1.npy", np.zeros((130, D + 1), np.float16))


def gone(dump: Path) -> None:
    (dump / "metadata_1.parquet").unlink()


def wordless(dump: Path) -> None:
    pq.write_table(pa.table({"key": [str(i) for i in range(170)], "TEXT": ["a"] * 170}), dump / "metadata_0.parquet")


def no_table(dump: Path) -> None:
    (dump / "metadata_0.parquet").write_bytes(b"PAR1 and no more")


def pickled(dump: Path) -> None:
    np.save(dump / "img_emb_0.npy", np.array([{}]), allow_pickle=True)


def several(dump: Path) -> None:
    with (dump / "img_emb_0.npy").open("wb") as file:
        np.savez(file, a=np.zeros((3, 6), np.float16))


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (short, "Expected as many rows in {dump}/img_emb_1.npy as in {dump}/text_emb_1.npy. Got 130 and 5"),
        (truncated, "{dump}/img_emb_1.npy is damaged or no .npy file"),
        (integers, "Expected embeddings (N, d) of float16 or float32. Got int8 (170, 6) in {dump}/img_emb_0.npy"),
        (wide, "Expected embeddings of one width. Got 6 in {dump}/img_emb_0.npy and 7 in {dump}/img_emb_1.npy"),
        (gone, "{dump}/img_emb_1.npy has no counterpart of its number on the other side"),
        (wordless, "Expected a column 'caption' of captions in {dump}/metadata_0.parquet. Got key, TEXT"),
        (no_table, "{dump}/metadata_0.parquet is damaged or no parquet file"),
        (pickled, "{dump}/img_emb_0.npy is damaged or no .npy file"),
        (several, "Expected one array. Got {dump}/img_emb_0.npy, which holds several: save each by np.save"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    break_it: Callable[[Path], None], line: str, dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    break_it(dump)
    assert run(dump, "--out", tmp_path / "store") == 1
    error = capsys.readouterr().err
    assert line.format(dump=dump) in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_wrong_words_are_one_line(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, line in (
        ((dump, "--image_column", "image"), "Expected image_*.npy in"),
        ((dump, dump, dump), "Expected one folder, two folders, or two .npy files"),
        ((dump / "no",), "No file or folder at"),
    ):
        assert run(*words, "--out", tmp_path / "store") == 1
        assert line in capsys.readouterr().err
    assert run(dump, "--out", tmp_path / "store") == 0
    np.save(dump / "img_emb_1.npy", np.ones((130, D), np.float16))
    assert run(dump, "--out", tmp_path / "store") == 1
    assert "holds the embeddings 'import-" in capsys.readouterr().err


def fit(store: Path, out: Path, *more: str) -> object:
    words = ["--config", "configs/prior/embeddings.yaml", "--data.init_args.store", str(store)]
    words += [
        "--data.init_args.batch_size",
        "32",
        "--trainer.max_steps",
        "3",
        "--trainer.enable_model_summary",
        "false",
    ]
    words += ["--model.init_args.net.init_args.width", "16", "--model.init_args.net.init_args.layers", "1"]
    words += ["--model.init_args.net.init_args.heads", "2", "--trainer.precision", "32-true"]
    words += ["--trainer.logger.init_args.save_dir", str(out), "--trainer.logger.init_args.name", "fit"]
    cli = build([*words, "--trainer.logger.init_args.version", "", "--trainer.val_check_interval", "3", *more])
    cli.fit(model=cli.model, datamodule=cli.datamodule)
    return cli


def test_a_prior_trains_on_it_and_draws(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Between spaces of two widths, with a learned null and guidance; the checkpoint alone is enough."""
    assert run(dump, "--out", tmp_path / "store") == 0
    cli = fit(tmp_path / "store", tmp_path)
    assert cli.model.learned_null.abs().sum() > 0
    spec = DiffusionPriorSpec("fit/checkpoints/last.ckpt", guidance=2.0, candidates=1)
    prior = spec.load(tmp_path)
    text = EmbeddingStore(tmp_path / "store").prior_batch(RowBatch(np.arange(5), np.zeros(5, np.uint64))).text
    assert prior.embed(text, generator=torch.Generator().manual_seed(0)).shape == (5, D)
    assert prior.fingerprint.startswith("import-")
    out = ["--data.init_args.store", str(tmp_path / "store"), "--model.init_args.run", str(tmp_path / "fit")]
    logs = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    words = [*out, *logs, "--model.init_args.out", str(tmp_path)]
    assert main(["predict", "--config", "configs/predict/embeddings.yaml", *words]) == 0
    drawn = read_tensors(tmp_path / "image_embed-00000.safetensors", ["image_embed"], what="", command="")
    assert drawn.tensors["image_embed"].shape == (EmbeddingStore(tmp_path / "store").count(Split.HELDOUT), D)
    assert drawn.metadata["fingerprint"] == prior.fingerprint
    (tmp_path / "image_embed-00001.safetensors").touch()  # of two processes, earlier
    assert main(["predict", "--config", "configs/predict/embeddings.yaml", *words]) == 1
    assert "image_embed-00001.safetensors, which more of them wrote: remove" in capsys.readouterr().err
    assert main(["test", "--config", "configs/evaluate/embeddings.yaml", *out, *logs]) == 0
    assert "calibration_gap" in capsys.readouterr().out
    assert main(["linear", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "linear.safetensors")]) == 0
    assert LinearPriorSpec("linear.safetensors").load(tmp_path).embed(text).shape == (5, D)


def leave_out_states(store: Path) -> ShardFeatures:
    """Take the token states out of a store of one shard."""
    (record,) = read_manifest(store).values()
    whole = read_contents(store / record.file)
    contents = whole._replace(features=whole.features._replace(text_states=whole.features.text_states[:, :0]))
    record = record._replace(states=False, sha256=contents.checksum())
    write_features(store / record.file, contents, record, 0)
    write_manifest(store, [record])
    return contents.features


def test_precomputed_and_imported_pairs_train_to_the_same_loss(mini_run: Path, tmp_path: Path) -> None:
    """To the last bit: the same pairs, in the same order, with the same batches."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(next((mini_run / "data").glob("train-*.tar")), source / "pairs-0.tar")
    clip = ["--clip.name", "tiny-rn", "--clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
    assert main(["precompute", "--source", str(source), "--store", str(tmp_path / "made"), *clip]) == 0
    features = leave_out_states(tmp_path / "made")
    rows = np.arange(len(features.image_embed))
    assert (np.diff(features.caption_offsets) == 1).all(), "one caption each"
    dump = tmp_path / "dump"
    dump.mkdir()
    np.save(dump / "img_emb_0.npy", features.image_embed)
    np.save(dump / "text_emb_0.npy", features.text_embed[features.caption_rows])
    pq.write_table(
        pa.table({"key": unpack_texts(features.keys, features.keys_offsets, rows)}), dump / "metadata_0.parquet"
    )
    assert run(dump, "--caption_column", "", "--out", tmp_path / "imported") == 0
    losses = [
        fit(tmp_path / name, tmp_path / f"{name}-fit").trainer.callback_metrics["train/loss"]
        for name in ("made", "imported")
    ]
    assert torch.equal(*losses)
