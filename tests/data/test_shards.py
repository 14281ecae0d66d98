import io
import json
import tarfile
from pathlib import Path

import pytest

from unclip_pl.data.shards import (
    Split,
    decode_entries,
    index_shard,
    list_shards,
    read_span,
    split_of_file,
    split_of_key,
)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_sources_are_folders_globs_ranges_and_files(tmp_path: Path) -> None:
    names = [f"train-{i:02d}.tar" for i in range(8, 12)]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()

    def found(source: str) -> list[str]:
        return [path.name for path in list_shards(f"{tmp_path}{source}")]

    assert found("") == found("/*.tar") == found("/train-{08..11}.tar") == names
    assert found("/train-1?.tar") == names[2:]
    assert found("/train-09.tar") == [names[1]]
    with pytest.raises(FileNotFoundError, match=r"train-12.tar does not exist"):
        found("/train-{08..12}.tar")
    with pytest.raises(FileNotFoundError, match="unclip pack"):
        found("/val*.tar")
    with pytest.raises(ValueError, match="local shards"):
        list_shards("https://example.org/a.tar")


def test_two_shards_of_one_name_are_an_error(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").touch()
    with pytest.raises(ValueError, match="different names"):
        list_shards(f"{tmp_path}/*/x.tar")


def test_members_are_grouped_at_the_first_dot_and_located(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "train.tar",
        {"dir.x/a.b.png": b"?", "a.PNG": b"image", "a.txt": b"one\n\n two \none", "c.txt": b"lonely", "._a.png": b"?"},
    )
    index = index_shard(path)
    (entry,) = index.entries
    assert (entry.key, entry.captions, entry.split) == ("a", ["one", "two"], Split.TRAIN)
    with path.open("rb") as file:
        assert read_span(file, *entry.image) == b"image"
    assert index.skipped == {"no image": ["dir.x/a", "c"]}


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"json": json.dumps({"captions": ["p", "q"]}).encode(), "txt": b"t"}, ["p", "q"]),
        ({"json": json.dumps({"caption": ["p"]}).encode(), "txt": b"t"}, ["p"]),
        ({"json": json.dumps({"caption": "two\nlines"}).encode(), "txt": b"two\nlines"}, ["two\nlines"]),
        ({"json": b'{"caption": null, "url": "u"}', "txt": b"t"}, ["t"]),
        ({"json": b"{broken", "txt": b"t"}, ["t"]),
        ({"json": b"[" * 100_000, "txt": b"t"}, ["t"]),
        ({"json": b'{"caption": "half \\ud83d"}'}, ["half ?"]),
        ({"txt": "café".encode()}, ["café"]),
    ],
)
def test_where_captions_come_from(tmp_path: Path, files: dict[str, bytes], captions: list[str]) -> None:
    path = write_tar(tmp_path / "train.tar", {"a.png": b"?"} | {f"a.{suffix}": data for suffix, data in files.items()})
    assert index_shard(path).entries[0].captions == captions


def test_bad_samples_are_counted_by_reason(tmp_path: Path) -> None:
    members = {"a.png": b"", "b.png": b"", "b.txt": b"\xff", "c.png": b"", "c.txt": b" \n", "d.png": b"", "d.txt": b"d"}
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("d.png"))
    index = index_shard(path)
    assert [entry.key for entry in index.entries] == ["d"]
    assert index.skipped == {
        "no caption": ["a", "c"],
        "undecodable caption": ["b"],
        "duplicate key": ["d"],
    }


@pytest.mark.parametrize("cut", [512 + 100, 512 + 600 + 100, 2 * 1024 + 700])
def test_a_broken_tar_gives_what_lies_before_the_break(tmp_path: Path, cut: int) -> None:
    members = {"a.png": b"x" * 500, "a.txt": b"a", "b.png": b"x" * 500, "b.txt": b"b"}
    path = write_tar(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:cut])
    index = index_shard(path)
    assert index.skipped["broken tar"] == ["x.tar"]
    assert [entry.key for entry in index.entries] == (["a"] if cut > 2048 else [])


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    members = {"a.png": b"x", "a.txt": b"a", "b.png": b"x", "b.txt": b"b"}
    path = write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"z" * 512
    path.write_bytes(data)
    index = index_shard(path)
    assert [entry.key for entry in index.entries] == ["a"]
    assert index.skipped == {"broken tar": ["x.tar"]}


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="no tar file"):
        index_shard(path)


def test_file_names_decide_the_split_or_else_the_key() -> None:
    names = ["train-0.tar", "val-0.tar", "heldout-0.tar", "test.tar", "00000.tar"]
    splits = [Split.TRAIN, Split.VAL, Split.HELDOUT, Split.HELDOUT, None]
    assert [split_of_file(Path(name)) for name in names] == splits
    drawn = [split_of_key(f"key{i}") for i in range(20_000)]
    shares = [drawn.count(split) / len(drawn) for split in Split]
    assert shares == pytest.approx([0.96, 0.02, 0.02], abs=0.004)
    assert drawn == [split_of_key(f"key{i}") for i in range(20_000)]


def test_decoding_keeps_order_and_names_what_is_bad(source: Path, tmp_path: Path) -> None:
    shard = source / "train-000000.tar"
    entries = index_shard(shard).entries
    bad = entries[3]._replace(image=entries[3].image._replace(size=10))
    mixed = [*entries[:3], bad, *entries[4:]]
    batches = list(decode_entries(shard, mixed, 32, 7))
    assert [len(batch) for batch in batches] == [7, 7, 6]
    flat = [pair for batch in batches for pair in batch]
    assert [entry.key for entry, _ in flat] == [entry.key for entry in mixed]
    assert [str(image) for entry, image in flat if entry is bad] == ["undecodable image"]
