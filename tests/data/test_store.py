import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unclip_pl.clip.encoder import ClipEncoder
from unclip_pl.data import store as store_module
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import (
    EmbeddingStore,
    pack_texts,
    read_contents,
    read_manifest,
    unpack_texts,
    write_features,
    write_manifest,
)

SAMPLES = {"t": 50, "v": 6, "h": 7}


@pytest.fixture(scope="module")
def opened(store: Path, source: Path) -> EmbeddingStore:
    return EmbeddingStore(store, str(source), image_size=32)


def first(rows: list[int] | np.ndarray) -> RowBatch:
    return RowBatch(np.asarray(rows), np.zeros(len(rows), np.uint64))


def keys_of(opened: EmbeddingStore) -> np.ndarray:
    """Return the key of every row."""
    features = [opened.features(shard) for shard in range(len(opened.shards))]
    return np.array([key for f in features for key in unpack_texts(f.keys, f.keys_offsets, np.arange(len(f.split)))])


def test_rows_are_all_samples_by_split(opened: EmbeddingStore) -> None:
    keys = {split: keys_of(opened)[opened.rows(split)].tolist() for split in Split}
    assert keys[Split.TRAIN] == [f"t{i:04d}" for i in range(50)]
    assert keys[Split.VAL] == [f"v{i:04d}" for i in range(6)]
    assert keys[Split.HELDOUT] == [f"h{i:04d}" for i in range(7)]
    assert len(opened) == 63


def test_blocks_cover_a_split_and_keep_to_one_shard(opened: EmbeddingStore) -> None:
    blocks = opened.blocks(Split.TRAIN, 8)
    assert blocks.lengths.tolist() == [8, 8, 4, 8, 8, 4, 8, 2]
    assert np.array_equal(blocks.rows(np.arange(8)), opened.rows(Split.TRAIN))
    assert [opened.count(split) for split in Split] == [50, 6, 7]


def test_everything_of_a_row_belongs_together(opened: EmbeddingStore, encoder: ClipEncoder) -> None:
    rows = np.random.default_rng(0).permutation(len(opened))[:32]
    batch = opened.evaluation_batch(first(rows))
    assert batch.image.shape == (32, 3, 32, 32)
    assert batch.image.abs().max() <= 1
    torch.testing.assert_close(encoder.encode_image(batch.image), batch.image_embed, rtol=2e-3, atol=2e-3)
    text = encoder.describe(batch.captions)
    assert torch.equal(batch.text.tokens, text.tokens)
    assert torch.equal(batch.text.mask, text.mask)
    torch.testing.assert_close(batch.text.states, text.states, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.text.embed, text.embed, rtol=2e-3, atol=2e-3)
    assert [meta["number"] for meta in batch.metadata] == [int(key[1:]) for key in keys_of(opened)[rows]]
    assert {value.dtype for value in (batch.image, batch.image_embed, batch.text.states)} == {torch.float32}


def test_batch_types_agree(opened: EmbeddingStore) -> None:
    rows = first([60, 3, 21, 3])
    prior, decoder = opened.prior_batch(rows), opened.decoder_batch(rows)
    assert torch.equal(prior.image_embed, decoder.image_embed)
    assert torch.equal(prior.text.states, decoder.text.states)
    assert torch.equal(opened.upsampler_batch(rows).image, decoder.image)
    assert torch.equal(decoder.image[1], decoder.image[3])


def test_a_batch_is_its_rows_one_by_one(opened: EmbeddingStore) -> None:
    rows = [7, 62, 0, 33, 41]
    batch = opened.prior_batch(first(rows))
    for place, row in enumerate(rows):
        one = opened.prior_batch(first([row]))
        length = one.text.mask.sum()
        assert one.text.mask.all()
        assert torch.equal(batch.image_embed[place], one.image_embed[0])
        assert torch.equal(batch.text.embed[place], one.text.embed[0])
        for ours, alone in ((batch.text.states, one.text.states), (batch.text.tokens, one.text.tokens)):
            assert torch.equal(ours[place, :length], alone[0])
            assert not ours[place, length:].any()
        assert batch.text.mask[place].sum() == length
    assert batch.text.mask.any(0).all(), "cut to the longest"


def test_draws_choose_among_a_row_s_own_captions(opened: EmbeddingStore) -> None:
    rows = np.zeros(6, np.int64) + opened.rows(Split.TRAIN)[3]  # two captions
    batch = RowBatch(rows, np.arange(6, dtype=np.uint64))
    captions = opened.captions(batch)
    assert captions == ["number 3 and more and more and more", "a second caption"] * 3
    embed = opened.prior_batch(batch).text.embed
    assert torch.equal(embed[::2], embed[:1].expand(3, -1))
    assert F.cosine_similarity(embed[0], embed[1], dim=0) < 0.999


def test_each_distinct_caption_is_stored_once(opened: EmbeddingStore) -> None:
    features = opened.features([shard.name for shard in opened.shards].index("train-000000.tar"))
    texts = unpack_texts(features.captions, features.captions_offsets, np.arange(len(features.text_embed)))
    assert len(set(texts)) == len(texts)
    assert texts.count("a second caption") == 1
    assert len(features.caption_rows) == 20 + 7


def test_a_store_travels_to_workers_as_its_path(opened: EmbeddingStore) -> None:
    message = pickle.dumps(opened)
    assert len(message) < 1000
    batch = first([5, 50])
    assert torch.equal(pickle.loads(message).prior_batch(batch).image_embed, opened.prior_batch(batch).image_embed)


def test_texts_survive_packing() -> None:
    texts = ["", "naïve", "日本", "bytes \udcff of another encoding"]
    assert unpack_texts(*pack_texts(texts), np.array([3, 0, 2, 1])) == [texts[3], texts[0], texts[2], texts[1]]


def test_errors_name_the_shard(store: Path, source: Path, tmp_path: Path) -> None:
    shards, embeddings = Path(shutil.copytree(source, tmp_path / "a")), Path(shutil.copytree(store, tmp_path / "b"))
    shutil.copy(shards / "val-000000.tar", shards / "val-000001.tar")
    with pytest.raises(FileNotFoundError, match=r"val-000001.tar: run `unclip precompute`"):
        EmbeddingStore(embeddings, str(shards), image_size=32)
    (shards / "val-000001.tar").unlink()
    file = embeddings / "heldout-000000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"heldout-000000.safetensors is missing or damaged"):
        EmbeddingStore(embeddings, str(shards), image_size=32)
    shutil.copy(embeddings / "val-000000.safetensors", file)
    with pytest.raises(ValueError, match=r"heldout-000000.safetensors: expected 7 images"):
        EmbeddingStore(embeddings, str(shards), image_size=32)
    with (shards / "train-000000.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(ValueError, match=r"train-000000.tar is not the file that was embedded"):
        EmbeddingStore(embeddings, str(shards), image_size=32)


def test_an_unknown_format_is_said_in_one_line(store: Path, source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    manifest = (copy / "manifest.jsonl").read_text()
    (copy / "manifest.jsonl").write_text(manifest.replace('"format": 1', '"format": 2, "shape": "new"'))
    with pytest.raises(ValueError, match=r"manifest\.jsonl in format 1\. Got 2: install the version"):
        EmbeddingStore(copy, str(source), image_size=32)
    (copy / "manifest.jsonl").write_text(manifest.replace(', "format": 1', ""))  # of before there were versions
    assert len(EmbeddingStore(copy, str(source), image_size=32)) == 63


def test_images_in_memory_equal_those_on_disk_and_are_decoded_once(
    opened: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = EmbeddingStore(opened.path, opened.source, image_size=32)
    without = EmbeddingStore(opened.path, opened.source, image_size=32, image_memory=0)
    decoded = []
    load = store_module.load_square
    monkeypatch.setattr(store_module, "load_square", lambda data, size: decoded.append(size) or load(data, size))
    for rows in ([5, 2, 5, 40], [2, 40, 41]):
        assert torch.equal(kept.upsampler_batch(first(rows)).image, without.upsampler_batch(first(rows)).image)
    assert len(decoded) == 4 + 7  # rows 2, 5, 40, 41 once; each of the seven places without a memory


def test_a_store_may_leave_out_token_states(store: Path, source: Path, tmp_path: Path) -> None:
    """All else is the same. A store that mixes both kinds is refused."""
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    records = {}
    for name, record in read_manifest(copy).items():
        path = copy / record.file
        contents = read_contents(path)
        bare = contents.features.text_states[:, :0]
        contents = contents._replace(features=contents.features._replace(text_states=bare))
        records[name] = record._replace(states=False, sha256=contents.checksum())
        write_features(path, contents, records[name], path.stat().st_mtime_ns)
    write_manifest(copy, records.values())
    whole, without = (EmbeddingStore(path, str(source), image_size=32) for path in (store, copy))
    assert (whole.has_states, without.has_states) == (True, False)
    rows = first([60, 3, 21])
    expected, found = whole.prior_batch(rows), without.prior_batch(rows)
    assert found.text.states.shape == (*expected.text.states.shape[:2], 0)
    assert torch.equal(found.image_embed, expected.image_embed)
    for one, other in zip(found.text, expected.text, strict=True):
        assert one is found.text.states or torch.equal(one, other)
    heldout = next(record for name, record in read_manifest(store).items() if "heldout" in name)
    shutil.copy(store / heldout.file, copy / heldout.file)
    write_manifest(copy, [*(record for record in records.values() if record.shard != heldout.shard), heldout])
    with pytest.raises(ValueError, match="token states of some shards and not of others"):
        EmbeddingStore(copy, str(source), image_size=32)
