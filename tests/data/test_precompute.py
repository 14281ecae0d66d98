import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.cli import main
from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data import precompute as module
from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.data.pairs import PairStore
from unclip_pl.data.precompute import Part, deal, embed_share, finish, pending, precompute
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Shard
from unclip_pl.data.store import EmbeddingStore, map_features, read_contents, read_manifest, read_moments, unpack_texts
from unclip_pl.errors import InputError
from unclip_pl.nn.space import EmbeddingSpace, Moments
from unclip_pl.packing.pack import Sample, write_shards


@pytest.fixture
def pair(source: Path, store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of source and store that a test may break."""
    return Path(shutil.copytree(source, tmp_path / "source")), Path(shutil.copytree(store, tmp_path / "store"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source: Path | str, store: Path, encoder: ClipEncoder, *, verify: bool = False) -> None:
    """What ``precompute`` does, without building CLIP each time."""
    embed_share(str(source), str(store), encoder, batch_size=8, verify=verify)
    finish(str(source), str(store), encoder)


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


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were given to CLIP."""
    names: list[str] = []
    embed_shard = module.embed_shard

    def spy(opened: Any, *rest: Any) -> object:
        names.append(opened.shard.name)
        return embed_shard(opened, *rest)

    monkeypatch.setattr(module, "embed_shard", spy)
    return names


def test_what_is_done_is_not_done_again(pair: tuple[Path, Path], encoder: ClipEncoder, embedded: list[str]) -> None:
    source, store = pair
    before = contents(store)

    def again(*, verify: bool = False) -> list[str]:
        embedded.clear()
        run(source, store, encoder, verify=verify)
        assert contents(store) == before
        return list(embedded)

    assert again() == again(verify=True) == []
    os.utime(source / "val-000000.tar")  # touched, not changed
    assert again() == []
    (store / "heldout-000000.safetensors").unlink()
    cut = store / "train-000002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert again() == ["heldout-000000.tar", "train-000002.tar"]
    for name in ("manifest.jsonl", "statistics.safetensors"):
        (store / name).unlink()
        assert again() == []


@pytest.mark.parametrize("place", ["head", "arrays", "manifest"])
def test_verify_finds_what_no_reader_would_notice(
    pair: tuple[Path, Path], encoder: ClipEncoder, embedded: list[str], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, store = pair
    before = contents(store)
    record = read_manifest(store)["train-000001.tar"]
    damaged = store / ("manifest.jsonl" if place == "manifest" else record.file)
    data = bytearray(damaged.read_bytes())
    at = len(data) - 1 if place == "arrays" else data.index(record.sha256.encode())
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    damaged.write_bytes(data)
    run(source, store, encoder, verify=True)
    assert embedded == ["train-000001.tar"]
    assert "train-000001.safetensors is not as it was written" in caplog.text
    assert contents(store) == before


def test_a_changed_shard_is_embedded_again(pair: tuple[Path, Path], encoder: ClipEncoder, embedded: list[str]) -> None:
    source, store = pair
    tar = source / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"number 1")] = ord("N")  # as long as before
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"val-000000.tar is not the file .* `unclip precompute`"):
        EmbeddingStore(store, str(source), image_size=32)
    write_shards(samples(3), source, "val")
    assert [shard.name for shard in pending(str(source), str(store), encoder.fingerprint)] == ["val-000000.tar"]
    run(source, store, encoder)
    assert read_manifest(store)["val-000000.tar"].images == 3
    assert embedded == ["val-000000.tar"]
    assert pending(str(source), str(store), encoder.fingerprint) == []


def test_a_shard_that_changes_while_it_is_embedded_is_found(
    pair: tuple[Path, Path], encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = pair
    embed_shard, tar = module.embed_shard, source / "val-000000.tar"

    def meanwhile(opened: Any, *rest: Any) -> object:
        write_shards(samples(3), source, "val")
        return embed_shard(opened, *rest)

    os.truncate(tar, tar.stat().st_size - 512)  # to be embedded again
    monkeypatch.setattr(module, "embed_shard", meanwhile)
    with pytest.raises(InputError, match=r"or have changed since, such as .*val-000000.tar"):
        run(source, store, encoder)
    with pytest.raises(ValueError, match="is not the file"):
        EmbeddingStore(store, str(source), image_size=32)


def test_an_interrupted_run_keeps_what_it_had(
    source: Path, store: Path, encoder: ClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_shard, target = module.embed_shard, tmp_path / "store"

    def breaks(opened: Any, *rest: Any) -> object:
        if opened.shard.name == "train-000001.tar":
            raise KeyboardInterrupt
        return embed_shard(opened, *rest)

    monkeypatch.setattr(module, "embed_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(source, target, encoder)
    assert sorted(path.stem for path in target.iterdir()) == ["heldout-000000", "train-000000"]
    with pytest.raises(FileNotFoundError, match="unclip precompute"):
        EmbeddingStore(target, str(source), image_size=32)
    monkeypatch.setattr(module, "embed_shard", embed_shard)
    run(source, target, encoder)
    assert contents(target) == {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize("world_size", [2, 7])
def test_any_number_of_ranks_writes_the_same_bytes(
    source: Path, store: Path, encoder: ClipEncoder, tmp_path: Path, world_size: int
) -> None:
    """Also where some have nothing to do, and whichever is first."""
    for rank in reversed(range(world_size)):
        with pytest.raises(ValueError, match=r"have no embeddings .* `unclip precompute` again"):
            finish(str(source), str(tmp_path), encoder)
        embed_share(str(source), str(tmp_path), encoder, batch_size=8, rank=rank, world_size=world_size)
    finish(str(source), str(tmp_path), encoder)
    assert contents(tmp_path) == contents(store)


def test_a_part_writes_its_own_files_and_no_others(
    source: Path, store: Path, encoder: ClipEncoder, tmp_path: Path
) -> None:
    tars = sorted(path.stem for path in source.glob("*.tar"))
    for number in (3, 1, 2):
        before = {path.name: path.stat() for path in tmp_path.iterdir()}
        embed_share(str(source), str(tmp_path), encoder, batch_size=8, part=Part(number, 3))
        after = {path.name: path.stat() for path in tmp_path.iterdir()}
        assert after.keys() - before.keys() == {f".part-{number}-of-3"} | {
            f"{n}.safetensors" for n in tars[number - 1 :: 3]
        }
        assert {name: after[name] for name in before} == before
    finish(str(source), str(tmp_path), encoder)
    assert contents(tmp_path) == contents(store)


def test_parts_of_several_processes_leave_out_no_shard() -> None:
    shards = [Shard(f"{i:03d}.tar") for i in range(50)]
    shares = [deal(deal(shards, part, 3), rank, 4) for part in range(3) for rank in range(4)]
    assert sorted(shard.address for share in shares for shard in share) == [shard.address for shard in shards]


def test_missing_parts_are_named(source: Path, encoder: ClipEncoder, tmp_path: Path) -> None:
    for number in (1, 4):  # of six, the last of which have no shards
        embed_share(str(source), str(tmp_path), encoder, batch_size=8, part=Part(number, 6))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"all 6 parts. Got none or not all of 2/6, 3/6, 5/6: run them again"):
        finish(str(source), str(tmp_path), encoder)
    assert contents(tmp_path) == before


def test_parts_of_different_clips_or_captions_are_refused(
    source: Path, encoder: ClipEncoder, other_clip: ClipSpec, tmp_path: Path
) -> None:
    embed_share(str(source), str(tmp_path), encoder, batch_size=8, part=Part(1, 2))
    embed_share(str(source), str(tmp_path), other_clip.load(), batch_size=8, part=Part(2, 2))
    with pytest.raises(InputError, match="unclip precompute") as error:
        finish(str(source), str(tmp_path), encoder)
    assert other_clip.load().fingerprint in str(error.value)
    embed_share(str(source), str(tmp_path / "captions"), encoder, batch_size=8, part=Part(1, 2))
    embed_share(str(source), str(tmp_path / "captions"), encoder, caption_key="txt", batch_size=8, part=Part(2, 2))
    with pytest.raises(InputError, match="none or not all of 2/2"):
        finish(str(source), str(tmp_path / "captions"), encoder)


def test_a_part_leaves_a_finished_store_s_captions_alone(pair: tuple[Path, Path], encoder: ClipEncoder) -> None:
    source, store = pair
    before = contents(store)
    with pytest.raises(InputError, match=r"caption_key '' of the finished store .* Got 'txt': .*manifest.jsonl"):
        embed_share(str(source), str(store), encoder, caption_key="txt", batch_size=8, part=Part(1, 2))
    assert contents(store) == before


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/2/3", "²/4"])
def test_a_part_that_there_is_not(text: str) -> None:
    with pytest.raises(InputError, match=rf"from 1/N to N/N, such as 3/64. Got '{text}'"):
        Part.parse(text)
    assert Part.parse("3/64") == (3, 64)


def test_shards_are_dealt_evenly() -> None:
    shards = [Shard(f"{i:05d}.tar") for i in range(65_000)]
    shares = [deal(shards, rank, 512) for rank in range(512)]
    assert {len(share) for share in shares} == {126, 127}
    assert sorted(shard.address for share in shares for shard in share) == [shard.address for shard in shards]


@pytest.mark.parametrize("scheme", ["file", "memory", "http"])
def test_shards_behind_urls(
    scheme: str,
    source: Path,
    store: Path,
    encoder: ClipEncoder,
    tmp_path: Path,
    embedded: list[str],
    served: Callable[[Path], str],
    shelved: Callable[[Path], str],
) -> None:
    url = {"file": lambda folder: f"file://{folder}", "memory": shelved, "http": served}[scheme](source)
    tars = f"{url}/train-{{000000..000002}}.tar"
    for _ in range(2):  # the second time it knows them
        embed_share(tars, str(tmp_path), encoder, batch_size=8)
        finish(tars, str(tmp_path), encoder)
    assert embedded == [f"train-00000{i}.tar" for i in range(3)]
    assert len(list(tmp_path.iterdir())) == 5  # no copies
    ours, theirs = read_manifest(tmp_path), read_manifest(store)
    for name in ours:
        assert ours[name] == theirs[name]._replace(source_mark=ours[name].source_mark)
        assert bool(ours[name].source_mark) == (scheme != "file")
    batch = RowBatch(np.array([3, 45, 20]), np.zeros(3, np.uint64))
    local = EmbeddingStore(store, f"{source}/train-*.tar", image_size=32)
    remote = EmbeddingStore(tmp_path, tars, image_size=32)
    for part, same in zip(remote.prior_batch(batch).text, local.prior_batch(batch).text, strict=True):
        assert torch.equal(part, same)
    if scheme == "http":
        with pytest.raises(ValueError, match="whole files only"):  # Python's own server knows no ranges
            remote.upsampler_batch(batch)
    else:
        assert torch.equal(remote.upsampler_batch(batch).image, local.upsampler_batch(batch).image)
        assert remote.metadata(batch) == local.metadata(batch)


def test_a_changed_remote_shard_is_embedded_again(
    source: Path, encoder: ClipEncoder, tmp_path: Path, embedded: list[str], shelved: Callable[[Path], str]
) -> None:
    url = f"{shelved(source)}/val-000000.tar"
    run(url, tmp_path, encoder)
    fsspec.filesystem("memory").pipe("/shelf/val-000000.tar", (source / "val-000000.tar").read_bytes())
    run(url, tmp_path, encoder)
    assert embedded == ["val-000000.tar"] * 2


def test_a_remote_shard_that_is_gone(source: Path, encoder: ClipEncoder, tmp_path: Path, shelved: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"memory://shelf/val-000001.tar does not exist"):
        run(f"{shelved(source)}/val-{{000000..000001}}.tar", tmp_path, encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["val-000000.safetensors"]


def test_two_stores_that_were_begun_by_different_clips(
    source: Path, encoder: ClipEncoder, other_clip: ClipSpec, tmp_path: Path
) -> None:
    """No manifest tells yet: the files do."""
    embed_share(str(source), str(tmp_path), encoder, batch_size=8, world_size=2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="unclip precompute") as error:
        run(source, tmp_path, other_clip.load())
    assert encoder.fingerprint in str(error.value)
    assert contents(tmp_path) == before


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
    assert read_contents(store / record.file).skipped == {"undecodable image": ["k9"]}


def test_another_caption_key_is_noticed(tmp_path: Path, clip: ClipSpec, caplog: pytest.LogCaptureFixture) -> None:
    """`unclip precompute` notices it and embeds again; a fit notices it and does not."""
    source, store = tmp_path / "source", str(tmp_path / "store")
    for name in ("train", "val"):
        write_shards(
            [Sample(f"k{i}", np.zeros((8, 8, 3), np.uint8), ["old"], {"prompt": "new"}) for i in range(3)], source, name
        )
    precompute(str(source / "val-*.tar"), store, clip, device="cpu")
    precompute(str(source / "train-*.tar"), store, clip, device="cpu")
    before = contents(tmp_path / "store")
    lines = [json.loads(line) for line in before["manifest.jsonl"].splitlines()]
    for line in lines:  # a store of before there were caption keys
        del line["caption_key"], line["others"]
    (tmp_path / "store" / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    fingerprint = clip.load().fingerprint
    assert pending(str(source), store, fingerprint) == []
    with pytest.raises(InputError, match=r"caption_key '', but this run uses 'prompt': set .*--caption_key 'prompt'"):
        pending(str(source), store, fingerprint, "prompt")
    precompute(str(source / "train-*.tar"), store, clip, caption_key="prompt", device="cpu")
    assert "making 1 shard(s) again, with caption_key 'prompt'" in caplog.text
    records = read_manifest(tmp_path / "store")
    assert [records[f"{name}-000000.tar"].caption_key for name in ("train", "val")] == ["prompt", ""]
    features = map_features(tmp_path / "store" / "train-000000.safetensors")
    assert unpack_texts(features.captions, features.captions_offsets, np.arange(1)) == ["new"]
    with pytest.raises(InputError, match="'prompt', but this run uses ''"):
        UnclipDataModule(str(source / "train-*.tar"), store, clip).prepare_data()


def test_an_error_says_where_captions_may_be_and_the_key_is_enough(tmp_path: Path, clip: ClipSpec) -> None:
    write_tar(tmp_path / "s" / "train.tar", {"a.png": png(), "a.caption": b"a", "b.png": png(), "b.caption": b"b"})
    words = (str(tmp_path / "s"), str(tmp_path / "store"), clip)
    with pytest.raises(InputError, match=r"no caption: 2.*set caption_key.*have \.caption\."):
        precompute(*words, device="cpu")
    with pytest.raises(InputError, match=r"set caption_key.*have \.caption\."):
        PairStore(words[0], clip.load().tokenize, image_size=32)
    UnclipDataModule(*words, caption_key=".caption").prepare_data()
    assert read_manifest(tmp_path / "store")["train.tar"].captions == 2
    assert len(PairStore(words[0], clip.load().tokenize, image_size=32, caption_key="caption").entries) == 2


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


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
    (tmp_path / "manifest.jsonl").write_bytes(lines[0].encode() + b"\n\xff\xfe")
    with pytest.raises(ValueError, match=r"manifest.jsonl, line 2"):
        read_manifest(tmp_path)


def test_a_pickle_in_a_store_s_place_is_not_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "sprung").touch, ()

    source, store = pair
    for victim in (store / "train-000000.safetensors", store / "statistics.safetensors"):
        victim.unlink()
        victim.write_bytes(pickle.dumps(Trap()))
        os.utime(victim)
    with pytest.raises(ValueError, match=r"train-000000.safetensors is missing or damaged"):
        EmbeddingStore(store, str(source), image_size=32)
    with pytest.raises(ValueError, match=r"statistics.safetensors is damaged"):
        EmbeddingSpace(str(store / "statistics.safetensors"))
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_whole(
    small_disk: Path, source: Path, store: Path, clip: ClipSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["precompute", "--source", str(source), "--clip.name", clip.name, "--clip.pretrained", clip.pretrained]
    words += ["--batch_size", "8", "--accelerator", "cpu", "--store"]
    assert main([*words, str(small_disk)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    made = contents(small_disk)
    assert made
    assert made.items() <= contents(store).items()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main([*words, str(small_disk)]) == 0
    assert contents(small_disk) == contents(store)


def test_a_store_that_must_not_be_written_to(
    small_disk: Path, source: Path, clip: ClipSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = ["precompute", "--source", str(source), "--clip.name", clip.name, "--clip.pretrained", clip.pretrained]
    assert main([*words, "--accelerator", "cpu", "--store", str(small_disk)]) == 1
    said = capsys.readouterr().err
    assert "Read-only file system" in said
    assert str(small_disk) in said
    assert "Traceback" not in said


def test_another_source_of_equal_names_and_sizes_is_another_source(tmp_path: Path, encoder: ClipEncoder) -> None:
    """Tars are padded to 10 KiB. The other one is older than the features, as a source that was there before is."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder, first in ((other, 7), (ours, 0)):
        images = [np.full((8, 8, 3), first + i, np.uint8) for i in range(4)]
        write_shards([Sample(f"k{i}", image, [f"{first + i}"], {}) for i, image in enumerate(images)], folder, "train")
    assert (ours / "train-000000.tar").stat().st_size == (other / "train-000000.tar").stat().st_size
    run(ours, tmp_path / "store", encoder)
    assert not pending(str(ours), str(tmp_path / "store"), encoder.fingerprint)
    assert [shard.name for shard in pending(str(other), str(tmp_path / "store"), encoder.fingerprint)] == [
        "train-000000.tar"
    ]
    with pytest.raises(ValueError, match="is not the file that was embedded"):
        EmbeddingStore(tmp_path / "store", str(other))


def test_statistics_are_those_of_all_that_a_store_holds(
    pair: tuple[Path, Path], encoder: ClipEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a part of the source is looked at again; what is gone from the store is forgotten."""
    source, store = pair
    before = contents(store)
    run(source / "heldout-000000.tar", store, encoder)
    assert contents(store) == before
    assert "more shard(s) than" in caplog.text
    cut = store / "val-000000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    run(source / "heldout-000000.tar", store, encoder)
    assert "val-000000.tar" not in read_manifest(store)
    assert "train-000000.tar" in read_manifest(store)


@pytest.mark.parametrize("name", ["statistics", "text-statistics"])
def test_a_shard_does_not_overwrite_the_statistics(name: str, tmp_path: Path, encoder: ClipEncoder) -> None:
    write_shards(samples(3), tmp_path, "train")
    (tmp_path / "train-000000.tar").rename(tmp_path / f"{name}.tar")
    with pytest.raises(InputError, match=rf"another name than {name}.tar.*rename"):
        run(tmp_path, tmp_path / "store", encoder)


def test_clip_s_pairs_count_the_bad_samples_of_all_shards(
    tmp_path: Path, encoder: ClipEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    for number, bad in enumerate((3, 2)):
        write_shards(samples(4, bad), tmp_path / str(number), "train")
        (tmp_path / str(number) / "train-000000.tar").rename(tmp_path / f"train-{number}.tar")
    for shard in tmp_path.glob("*.tar"):  # no captions: they are counted when a shard is indexed
        with tarfile.open(shard) as tar:
            infos = [info for info in tar if info.name not in ("k0.txt", "k0.json")]
            kept = [(info, (tar.extractfile(info) or io.BytesIO()).read()) for info in infos]
        with tarfile.open(shard, "w") as tar:
            for info, data in kept:
                tar.addfile(info, io.BytesIO(data))
    PairStore(str(tmp_path), encoder.tokenize, image_size=32)
    assert "skipped 7 sample(s)" in caplog.text
