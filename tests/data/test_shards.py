import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from unclip_pl.data.shards import (
    MAX_TEXT,
    Split,
    decode_entries,
    index_shard,
    no_samples,
    read_span,
    split_of_file,
    split_of_key,
)
from unclip_pl.errors import InputError

BOM = b"\xef\xbb\xbf"  # what editors on Windows begin a file with


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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
        ({"json": json.dumps({"captions": ["p", "q"]}).encode()}, ["p", "q"]),
        ({"json": json.dumps({"caption": ["p"]}).encode(), "txt": b" "}, ["p"]),
        ({"json": json.dumps({"captions": ["p", "q"]}).encode(), "txt": b"t\nu"}, ["t", "u"]),
        ({"json": json.dumps({"captions": ["p", "q"]}).encode(), "txt": b"p"}, ["p"]),
        ({"json": json.dumps({"captions": ["p\nq", "r"]}).encode(), "txt": BOM + b"p\r\nq\r\nr \r\n"}, ["p\nq", "r"]),
        ({"json": json.dumps({"captions": [" "], "caption": "p"}).encode()}, ["p"]),
        ({"json": json.dumps({"caption": "p"}).encode(), "txt": b"\xff"}, ["p"]),
        ({"json": b'{"caption": ""}', "txt": b"t"}, ["t"]),
        ({"json": b'{"captions": ["", " \\ufeff"]}', "txt": b"t"}, ["t"]),
        ({"json": BOM + b'{"caption": "\\ufeffp"}'}, ["p"]),
        ({"txt": BOM + b"a\r\n" + BOM + b"b"}, ["a", "b"]),
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


@pytest.mark.parametrize(
    ("caption_key", "captions"),
    [
        ("", ["t"]),
        ("txt", ["t"]),
        (".txt", ["t"]),
        ("json", ["j"]),
        ("caption", ["j"]),
        ("prompt", ["p", "q"]),
        (".cap", ["c", "d"]),
        ("CAP", ["c", "d"]),
        ("output.txt", ["o"]),
        ("TEXT", ["T"]),
    ],
)
def test_a_caption_key_says_where_captions_are(tmp_path: Path, caption_key: str, captions: list[str]) -> None:
    meta = {"caption": "j", "prompt": ["p", "q"], "TEXT": "T"}
    files = {"png": b"?", "txt": b"t", "json": json.dumps(meta).encode(), "cap": BOM + b"c\nd", "output.txt": b"o"}
    path = write_tar(tmp_path / "train.tar", {f"a.{suffix}": data for suffix, data in files.items()})
    assert index_shard(path, caption_key).entries[0].captions == captions
    assert index_shard(path, f".{caption_key.strip('.')}x").skipped == {"no caption": ["a"]}


def test_captions_that_differ_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {}
    for number in range(6):
        texts = {"txt": b"new", "json": json.dumps({"caption": "new" if number % 3 else "old"}).encode()}
        members |= {f"{number}.{suffix}": data for suffix, data in {"png": b"?", **texts}.items()}
    path = write_tar(tmp_path / "x.tar", members)
    assert {caption for entry in index_shard(path).entries for caption in entry.captions} == {"new"}
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("x.tar: 2 of 6 samples")
    for key in ("json", "txt"):
        index_shard(path, key)
    assert len(caplog.records) == 1


def test_what_may_be_captions_is_listed(tmp_path: Path) -> None:
    """And an image under another name."""
    meta = json.dumps({"prompt": "p", "caption": "", "seed": 3, "tags": ["a"]}).encode()
    members = {
        "a.png": b"?",
        "a.json": meta,
        "b.png": b"?",
        "b.cap": b"b",
        "c.input.png": b"?",
        "d.png": b"?",
        "d.txt": b"d",
    }
    index = index_shard(write_tar(tmp_path / "x.tar", members))
    assert sorted(index.others) == [".cap", ".input.png", "prompt", "tags"]
    assert index_shard(tmp_path / "x.tar", "PROMPT").others.count(".txt") == 1
    assert str(no_samples("s", 1, {"no caption": 2}, index.others)).endswith(
        "The samples also have prompt, tags, .cap, .input.png."
    )
    assert index_shard(write_tar(tmp_path / "y.tar", {"a.png": b"?", "a.txt": b"a", "a.cap": b"b"})).others == []


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


@pytest.mark.parametrize("between", [None, 512, 3 * 2**20], ids=["as cat does", "one block", "many blocks"])
def test_tars_that_were_joined_are_read_as_one(tmp_path: Path, between: int | None) -> None:
    """Members lie at absolute places, and the same key in two of them is there twice."""
    parts = [{f"{key}.png": key.encode(), f"{key}.txt": b"caption"} for key in "abc"]
    data = [write_tar(tmp_path / "part.tar", part).read_bytes() for part in [*parts, parts[0]]]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(data) if between is None else bytes(between).join(each[:2048] for each in data))
    index = index_shard(path)
    with path.open("rb") as file:
        images = [read_span(file, *entry.image) for entry in index.entries]
    assert images == [b"a", b"b", b"c"]
    assert index.skipped == {"duplicate key": ["a"]}


@pytest.mark.parametrize("rest", [b"more", b"x" * 512, bytes(5000) + b"x" * 2000])
def test_other_bytes_after_the_end_are_a_broken_tar(tmp_path: Path, rest: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.txt": b"a"})
    path.write_bytes(path.read_bytes() + rest)
    index = index_shard(path)
    assert [entry.key for entry in index.entries] == ["a"]
    assert index.skipped == {"broken tar": ["x.tar"]}


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    members = {"a.png": b"x", "a.txt": b"a", "b.png": b"x", "b.txt": b"b"}
    path = write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"z" * 512
    path.write_bytes(data)
    index = index_shard(path)
    assert [entry.key for entry in index.entries] == ["a"]
    assert index.skipped == {"broken tar": ["x.tar"]}


@pytest.mark.parametrize("data", [b"", b"hello" * 1000, bytes(100)], ids=["empty", "text", "zeros"])
def test_what_is_no_tar_holds_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    assert index_shard(path)[:2] == ([], {"broken tar": ["x.tar"]})


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (gzip.compress, "gzip.*gunzip"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_what_stands_in_for_a_tar_is_named(tmp_path: Path, wrap: Callable[[bytes], bytes], said: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"BZh91AY&SY.png": b"?", "BZh91AY&SY.txt": b"a"})
    assert len(index_shard(path).entries) == 1
    path.write_bytes(wrap(path.read_bytes()))
    with pytest.raises(InputError, match=rf"uncompressed tar.*x\.tar.*{said}"):
        index_shard(path)


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    assert index_shard(write_tar(tmp_path / "x.tar", {}))[:2] == ([], {})


def test_a_second_sample_of_a_key_is_one_bad_sample(tmp_path: Path) -> None:
    """However many files it has; the first stays."""
    path = write_tar(tmp_path / "x.tar", {"a.png": b"1", "a.txt": b"one"})
    with tarfile.open(path, "a") as tar:
        for name in ["b.png", "b.txt", "a.png", "a.txt", "a.json", "a.png", "a.txt"]:
            tar.addfile(tarfile.TarInfo(name))
    index = index_shard(path)
    assert [(entry.key, entry.captions) for entry in index.entries] == [("a", ["one"])]
    assert index.skipped == {"duplicate key": ["a", "a"], "no caption": ["b"]}


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ({}, "no caption"),
        ({"txt": b""}, "no caption"),
        ({"txt": b" \t\r\n"}, "no caption"),
        ({"json": b'{"caption": ""}'}, "no caption"),
        ({"json": b'{"caption": 3}'}, "no caption"),
        ({"txt": BOM + b"\r\n"}, "no caption"),
        ({"txt": "café".encode("latin-1")}, "undecodable caption"),
        ({"txt": "x".encode("utf-16")}, "undecodable caption"),
        ({"txt": b"x" * (MAX_TEXT + 1)}, "caption too long"),
    ],
)
def test_bad_captions_have_a_reason(tmp_path: Path, captions: dict[str, bytes], reason: str) -> None:
    members = {"a.png": b"?"} | {f"a.{suffix}": data for suffix, data in captions.items()}
    assert index_shard(write_tar(tmp_path / "x.tar", members))[:2] == ([], {reason: ["a"]})


@pytest.mark.parametrize("caption", ["🦊 on 🧊", "x" * MAX_TEXT, "é" * (MAX_TEXT // 2), "nul\0inside", "النص"])
def test_long_and_unusual_captions_pass_unchanged(tmp_path: Path, caption: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"?", "a.txt": caption.encode()})
    assert index_shard(path).entries[0].captions == [caption]


def test_names_with_spaces_accents_and_other_encodings_are_keys(tmp_path: Path) -> None:
    names = ["a b", "ñandú 🦊", "x" * 200, "Ω/β", "./c", "-rf", "$(id)", "a\udce9"]
    path = write_tar(tmp_path / "x.tar", {f"{name}.{s}": b"y" for name in names for s in ("png", "txt")})
    assert [entry.key for entry in index_shard(path).entries] == names


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "..//evil", "a\nb", "\x1b[2Ja", "tab\t"])
def test_names_that_lead_out_of_a_folder_or_into_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{name}.png": b"?", f"{name}.txt": b"caption"})
    assert index_shard(path)[:2] == ([], {"unsafe name": [name]})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
        caption = tarfile.TarInfo("a.txt")
        caption.size = 1
        tar.addfile(caption, io.BytesIO(b"x"))
        tar.addfile(link.replace(name="b.png"))
    assert index_shard(path)[:2] == ([], {"image is a link, a device or sparse": ["a", "b"]})


def raw_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with any bytes for a size."""
    head = bytearray(name.encode().ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"00000000000\0")
    head += b" " * 8 + kind + bytes(100) + b"ustar\00000" + bytes(247)
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256


@pytest.mark.parametrize(
    "crafted",
    [
        raw_header("b.png", NEGATIVE),  # read backwards, the tar never ends
        raw_header("b.png", b"\x80" + b"\x7f" * 11),
        raw_header("b", b"77777777777", b"x"),
        raw_header("b", NEGATIVE, b"L"),
        raw_header("b", b"00000000030", b"x") + b"16 size=-1024\n 8".ljust(512, b"\0") + raw_header("b.png", b"0"),
        raw_header("b", b"00000001000", b"x") + b"16 GNU.sparse.map=1,2,3\n".ljust(512, b"\0"),
        raw_header("b", b"00000400000", b"x") + b"1" * 2**17 + raw_header("b.png", b"0"),
        raw_header("b", b"00000000000", b"x") * 3000,
    ],
)
def test_crafted_headers_end_the_tar_and_nothing_else(tmp_path: Path, crafted: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"?", "a.txt": b"caption"})
    path.write_bytes(path.read_bytes()[: 4 * 512] + crafted + bytes(1024))
    index = index_shard(path)
    assert [entry.key for entry in index.entries] == ["a"]
    assert index.skipped["broken tar"] == ["x.tar"]


def test_sparse_files_are_not_read_as_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(raw_header("b.png", b"00000001000", b"S") + bytes(512 + 1024))
    assert index_shard(path)[:2] == ([], {"image is a link, a device or sparse": ["b"]})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_as_tarfile_reads_it(tmp_path: Path, format: int) -> None:
    path, names = tmp_path / "x.tar", ["short", "folder/" * 12 + "deep", "ä" * 40]
    names += [] if format == tarfile.USTAR_FORMAT else ["n" * 180, "long/" * 60 + "n"]
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            for suffix, data in (("png", bytes([number]) * 600 * number), ("txt", f"caption {number}".encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size, info.uname, info.mtime = len(data), "bigdata", 1.5
                tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("README"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = index_shard(path)
    assert index.skipped == {}
    assert [entry.key for entry in index.entries] == names
    with tarfile.open(path) as tar, path.open("rb") as file:
        for entry in index.entries:
            member = tar.extractfile(f"{entry.key}.png")
            assert member is not None
            assert read_span(file, *entry.image) == member.read()


def test_file_names_decide_the_split_or_else_the_key() -> None:
    names = ["train-0.tar", "val-0.tar", "heldout-0.tar", "test.tar", "00000.tar"]
    splits = [Split.TRAIN, Split.VAL, Split.HELDOUT, Split.HELDOUT, None]
    assert [split_of_file(name) for name in names] == splits
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
