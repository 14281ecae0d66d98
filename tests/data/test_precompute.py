import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data import precompute as module
from unclip_pl.data.atomic import replacing
from unclip_pl.data.features import map_features, read_moments
from unclip_pl.data.manifest import read_manifest
from unclip_pl.data.pack import Sample, write_shards
from unclip_pl.data.precompute import pending, precompute
from unclip_pl.nn.space import EmbeddingSpace, Moments


@pytest.fixture
def pair(source: Path, store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of source and store that a test may break."""
    return Path(shutil.copytree(source, tmp_path / "source")), Path(shutil.copytree(store, tmp_path / "store"))


def samples(count: int, bad: int = 0) -> list[Sample]:
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(count)] + [b"\x89PNG\r\n\x1a\nbroken"] * bad
    return [Sample(f"k{i}", image, [f"caption {i}"], {}) for i, image in enumerate(images)]


def test_manifest_describes_every_shard(source: Path, store: Path, encoder: ClipEncoder) -> None:
    records = read_manifest(store)
    assert sorted(records) == sorted(path.name for path in source.glob("*.tar"))
    assert sum(record.images for record in records.values()) == 63
    assert {record.clip for record in records.values()} == {encoder.fingerprint}
    assert {record.dtype for record in records.values()} == {"float16"}
    assert {path.name for path in store.iterdir()} == {
        "manifest.jsonl",
        "statistics.safetensors",
        *(record.file for record in records.values()),
    }
    assert pending(str(source), str(store), encoder.fingerprint) == []


def test_statistics_are_of_the_training_images(store: Path, encoder: ClipEncoder) -> None:
    embed = np.concatenate([map_features(path).image_embed for path in sorted(store.glob("train-*"))])
    unit = torch.nn.functional.normalize(torch.from_numpy(embed).double(), dim=-1)
    space = EmbeddingSpace(str(store / "statistics.safetensors"))
    torch.testing.assert_close(space.mean, unit.mean(0).float())
    torch.testing.assert_close(space.eigenvalues.sum(), unit.var(0).sum().float())
    assert space.fingerprint == encoder.fingerprint
    null = encoder.describe([""])
    torch.testing.assert_close(space.null_text.states, null.states)
    torch.testing.assert_close(space.null_text.tokens, null.tokens)


def test_moments_of_shards_add_up(store: Path) -> None:
    files = sorted(store.glob("train-*"))
    whole = Moments.of(torch.from_numpy(np.concatenate([map_features(f).image_embed for f in files])))
    total = read_moments(files[0])
    for file in files[1:]:
        total = total.plus(read_moments(file))
    for ours, theirs in zip(total, whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert read_moments(store / "val-000000.safetensors").total == 0


def test_what_is_done_is_not_done_again(
    pair: tuple[Path, Path], clip: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = pair
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    embedded: list[str] = []
    embed_shard = module.embed_shard

    def spy(shard: Path, *rest: object) -> object:
        embedded.append(shard.name)
        return embed_shard(shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "embed_shard", spy)

    def again() -> list[str]:
        embedded.clear()
        precompute(str(source), str(store), clip, batch_size=8, device="cpu")
        return list(embedded)

    assert again() == []
    os.utime(source / "val-000000.tar")  # touched, not changed
    assert again() == []
    (store / "heldout-000000.safetensors").unlink()
    damaged = store / "train-000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert again() == ["heldout-000000.tar", "train-000001.tar"]
    after = {path.name: path.read_bytes() for path in store.iterdir()}
    assert after == before
    assert again() == []


def test_a_changed_shard_is_embedded_again(pair: tuple[Path, Path], clip: ClipSpec, encoder: ClipEncoder) -> None:
    source, store = pair
    write_shards(samples(3), source, "val")
    assert [path.name for path in pending(str(source), str(store), encoder.fingerprint)] == ["val-000000.tar"]
    precompute(str(source), str(store), clip, device="cpu")
    assert read_manifest(store)["val-000000.tar"].images == 3


def test_an_interrupted_run_keeps_what_it_had(
    source: Path, store: Path, clip: ClipSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_shard, target = module.embed_shard, tmp_path / "store"

    def breaks(shard: Path, *rest: object) -> object:
        if shard.name == "train-000001.tar":
            raise KeyboardInterrupt
        return embed_shard(shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "embed_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        precompute(str(source), str(target), clip, device="cpu")
    assert sorted(read_manifest(target)) == ["heldout-000000.tar", "train-000000.tar"]
    monkeypatch.setattr(module, "embed_shard", embed_shard)
    precompute(str(source), str(target), clip, batch_size=8, device="cpu")
    for name in ("train-000000", "train-000001"):
        ours, theirs = map_features(target / f"{name}.safetensors"), map_features(store / f"{name}.safetensors")
        assert ours.keys.tobytes() == theirs.keys.tobytes()
        np.testing.assert_allclose(ours.image_embed, theirs.image_embed, rtol=2e-3, atol=2e-3)  # batches differ


def test_another_clip_is_refused_by_name(source: Path, store: Path, encoder: ClipEncoder, other_clip: ClipSpec) -> None:
    other = other_clip.load().fingerprint
    with pytest.raises(ValueError, match="unclip precompute") as error:
        precompute(str(source), str(store), other_clip, device="cpu")
    assert encoder.fingerprint in str(error.value)
    assert other in str(error.value)
    with pytest.raises(ValueError, match=other):
        pending(str(source), str(store), other)


def test_bad_samples_are_skipped_counted_and_named(tmp_path: Path, clip: ClipSpec) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    write_shards(samples(9, bad=1), source, "train")
    with pytest.raises(ValueError, match=r"1 of 10 samples .* \(undecodable image: 1\).*--max_bad_fraction"):
        precompute(str(source), str(store), clip, device="cpu")
    precompute(str(source), str(store), clip, max_bad_fraction=0.1, device="cpu")
    record = read_manifest(store)["train-000000.tar"]
    assert (record.images, record.captions, record.skipped) == (9, 9, {"undecodable image": 1})
    with safe_open(store / record.file, framework="numpy") as file:
        assert json.loads(file.metadata()["skipped"]) == {"undecodable image": ["k9"]}


def test_nothing_usable_is_an_error(tmp_path: Path, clip: ClipSpec) -> None:
    with pytest.raises(FileNotFoundError, match="unclip pack"):
        precompute(str(tmp_path), str(tmp_path / "store"), clip, device="cpu")
    write_shards(samples(0, bad=2), tmp_path, "train")
    with pytest.raises(ValueError, match=r"no usable sample in 1 shard\(s\) \(undecodable image: 2\)"):
        precompute(str(tmp_path), str(tmp_path / "store"), clip, device="cpu")


def test_a_source_for_evaluation_alone_has_statistics(tmp_path: Path, clip: ClipSpec) -> None:
    write_shards(samples(5), tmp_path, "val")
    precompute(str(tmp_path), str(tmp_path / "store"), clip, device="cpu")
    assert EmbeddingSpace(str(tmp_path / "store" / "statistics.safetensors")).mean.isfinite().all()


def test_a_damaged_manifest_line_is_named(store: Path, tmp_path: Path) -> None:
    lines = (store / "manifest.jsonl").read_text().splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join([lines[0], lines[1][:40]]))
    with pytest.raises(ValueError, match=r"manifest.jsonl, line 2"):
        read_manifest(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def break_off() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
