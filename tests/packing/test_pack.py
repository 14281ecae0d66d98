import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from unclip_pl.cli import main
from unclip_pl.data.shards import Split, decode_entries, index_shard, parse_json, read_span
from unclip_pl.data.transforms import load_square, suffix_of
from unclip_pl.packing import pack as module
from unclip_pl.packing.pack import AS_THEY_ARE, Form, pack_shards, read_packed, write_shards
from unclip_pl.packing.samples import (
    FileSamples,
    Sample,
    coco_samples,
    scene_samples,
    shapes_samples,
    table_samples,
)
from unclip_pl.shapes.captions import parse
from unclip_pl.shapes.scenes import parse_scene


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(color: str, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("RGB", size, color))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve noise images in a folder, and a table with two captions of every third."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    rows = [("image", "caption")]
    for i in range(12):
        pixels = rng.integers(0, 256, (20, 24 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}")
        rows += [(f"{i:02d}.{('png', 'jpg', 'webp')[i % 3]}", f"photo {i}")]
    rows += [(f"{i:02d}.png", "again, later") for i in range(0, 12, 3)]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def listed(photos: Path) -> FileSamples:
    table = str(photos.parent / "captions.csv")
    return table_samples(str(photos), table, image_column="image", caption_column="caption")


def pack_words(photos: Path, out: Path, *more: str) -> list[str]:
    words = ["pack", "folder", "--images", str(photos), "--table", str(photos.parent / "captions.csv")]
    return [*words, "--out", str(out), "--shard_size", "5", *more]


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shards(shapes_samples(25, split="train", size=16), tmp_path / folder, "train", shard_size=10)
    assert list(contents(tmp_path / "a")) == [*(f"train-00000{i}.tar" for i in range(3)), "train.manifest.jsonl"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_several_workers_write_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for folder, workers in (("a", 0), ("b", 2)):
        form = Form(16, "shorter", "jpg", 90)
        write_shards(listed(photos), tmp_path / folder, "data", shard_size=5, form=form, num_workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    shutil.copy(photos.parent / "captions.csv", tmp_path / "elsewhere")
    write_shards(listed(tmp_path / "elsewhere" / "photos"), tmp_path / "c", "data", shard_size=5, form=form)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_webdataset_reads_what_is_packed(photos: Path, tmp_path: Path) -> None:
    """The reader of webdataset itself, whose format this is, finds the same samples."""
    shards = write_shards(listed(photos), tmp_path, "data", shard_size=5)
    found = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    samples = list(listed(photos))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in samples]
    for ours, theirs in zip(samples, found, strict=True):
        assert isinstance(ours.image, Path)
        assert theirs[ours.image.suffix[1:]] == ours.image.read_bytes()
        assert theirs["txt"].decode().splitlines() == ours.captions
        assert json.loads(theirs["json"]) == {"captions": ours.captions, "file": ours.image.name}


def packed_now(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, form: Form = AS_THEY_ARE) -> list[str]:
    """Pack, and say which shards were written for it."""
    written: list[str] = []
    pack = module._pack

    def spy(job: module._Job, stop: threading.Event) -> module.PackedShard:
        written.append(job.path.name)
        return pack(job, stop)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_pack", spy)
        list(pack_shards(listed(photos), out, "data", shard_size=5, form=form))
    return written


def test_what_is_done_is_not_done_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, names = tmp_path / "out", [f"data-00000{i}.tar" for i in range(3)]
    assert packed_now(photos, out, monkeypatch) == names
    whole = contents(out)
    assert packed_now(photos, out, monkeypatch) == []
    (out / names[1]).unlink()
    assert packed_now(photos, out, monkeypatch) == [names[1]]
    (out / names[2]).write_bytes(whole[names[2]][:-512])
    assert packed_now(photos, out, monkeypatch) == [names[2]]
    manifest = out / "data.manifest.jsonl"
    manifest.write_bytes(whole[manifest.name][:-9] + b'\n[1]\n{"shard": []}\n\xff')  # as a kill can leave it, or worse
    assert packed_now(photos, out, monkeypatch) == [names[2]]
    os.utime(photos / "06.png")  # the same bytes, but who knows
    assert packed_now(photos, out, monkeypatch) == [names[1]]
    assert contents(out) == whole
    (photos / "06.png").unlink()  # packed is packed: originals may go
    assert packed_now(photos, out, monkeypatch) == []
    assert packed_now(photos, out, monkeypatch, Form(8)) == names


def test_a_missing_image_that_comes_later_is_packed_later(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "07.jpg").rename(tmp_path / "07.jpg")
    assert len(packed_now(photos, tmp_path / "out", monkeypatch)) == 3
    record = read_packed(tmp_path / "out" / "data.manifest.jsonl")["data-000001.tar"]
    assert (record.samples, record.skipped) == (4, {"missing file": ["07.jpg"]})
    assert packed_now(photos, tmp_path / "out", monkeypatch) == []
    (tmp_path / "07.jpg").rename(photos / "07.jpg")
    os.utime(photos / "07.jpg", (0, 0))  # older than the tar, as after a run with the wrong folder
    assert packed_now(photos, tmp_path / "out", monkeypatch) == ["data-000001.tar"]


def test_shapes_say_what_they_show(tmp_path: Path) -> None:
    samples = list(shapes_samples(12, split="heldout", size=16, seed=3))
    (path,) = write_shards(samples, tmp_path, "heldout")
    entries = index_shard(path).entries
    ((*decoded,),) = decode_entries(path, entries, 16, 12)
    for sample, (entry, image) in zip(samples, decoded, strict=True):
        assert (entry.key, entry.captions, entry.split) == (sample.key, sample.captions, Split.HELDOUT)
        assert isinstance(image, torch.Tensor)
        assert np.array_equal(image.permute(1, 2, 0), sample.image)
        with path.open("rb") as file:
            meta = parse_json(read_span(file, *entry.json))
        assert parse(entry.captions[0]) == meta["stated"]
        assert meta["stated"].items() <= meta["attributes"].items()


#: What 40 samples of seed 3 were before there were words and scenes: images, keys, captions and JSON.
BEFORE = {
    (32, "train"): "60a3009385b18c28", (32, "val"): "affbfdc1dbd9fd37", (32, "heldout"): "73100b2685ae9197",
    (64, "train"): "5357d5bd86048072", (64, "val"): "bce220f26d1d8c3b", (64, "heldout"): "4c1058ba83b68417",
}  # fmt: skip


@pytest.mark.parametrize(("size", "split"), BEFORE)
def test_shapes_are_what_they_always_were(size: int, split: Any) -> None:
    found = hashlib.sha256()
    for sample in shapes_samples(40, split=split, size=size, seed=3):
        assert isinstance(sample.image, np.ndarray)
        found.update(sample.image.tobytes())
        found.update(json.dumps([sample.key, sample.captions, sample.extra]).encode())
    assert found.hexdigest()[:16] == BEFORE[size, split]


def test_words_are_written_over_the_same_pictures() -> None:
    """Three in four captions of pictures with a word say it; all else is what it is without words."""
    plain, written = (list(shapes_samples(400, split="train", size=64, words=words)) for words in (False, True))
    said = []
    for before, after in zip(plain, written, strict=True):
        word = after.extra.pop("word")
        assert np.array_equal(before.image, after.image) == (not word)
        if word and "shape" in before.extra["stated"]:
            said.append(before.extra["stated"] != after.extra["stated"] or word == before.extra["attributes"]["shape"])
            assert after.extra["stated"]["shape"] in (word, before.extra["stated"]["shape"])
        assert parse(after.captions[0]) == after.extra["stated"]
        assert after.extra["attributes"] == before.extra["attributes"]
    # A word is the picture's own shape in one picture of eight, where a caption says it in either case.
    right = 3 / 4 + 1 / 4 / 8
    assert abs(np.mean(said) - right) < 3 * (right * (1 - right) / len(said)) ** 0.5
    plain, written = (list(shapes_samples(40, split="heldout", size=64, words=words)) for words in (False, True))
    assert [sample.captions for sample in plain] == [sample.captions for sample in written]
    assert all(sample.extra["word"] != sample.extra["attributes"]["shape"] for sample in written)


def test_scenes_say_what_they_show() -> None:
    for sample in scene_samples(60, split="heldout"):
        assert sample.image.shape == (64, 64, 3)  # type: ignore[union-attr]
        assert parse_scene(sample.captions[0]) == sample.extra["stated"]
        assert sample.extra["stated"].items() <= sample.extra["attributes"].items()
    assert not any(sample.extra["unseen_pair"] for sample in scene_samples(60, split="train"))


def test_words_and_scenes_are_packed_at_64_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--train", "3", "--val", "0", "--heldout", "0"]
    for name, option in (("plain", []), ("words", ["--words", "true"]), ("scenes", ["--objects", "2"])):
        assert main(["pack", "shapes", "--out", str(tmp_path / name), *counts, *option]) == 0
        (entry, *_) = index_shard(tmp_path / name / "train-000000.tar").entries
        with (tmp_path / name / "train-000000.tar").open("rb") as file:
            side = Image.open(io.BytesIO(read_span(file, *entry.image))).size[0]
        assert side == (32 if name == "plain" else 64)
    out = str(tmp_path / "both")
    assert main(["pack", "shapes", "--out", out, *counts, "--words", "true", "--objects", "2"]) == 1
    assert main(["pack", "shapes", "--out", out, *counts, "--words", "true", "--size", "32"]) == 1
    said = capsys.readouterr().err
    assert "leave one of them out" in said
    assert "give --size 64" in said


def test_splits_of_one_seed_differ() -> None:
    train, val = (next(shapes_samples(1, split=split)) for split in ("train", "val"))
    assert not np.array_equal(train.image, val.image)


@pytest.mark.parametrize("encode", ["png", "jpg", "webp"])
def test_encodings_are_what_they_say(tmp_path: Path, encode: str) -> None:
    sample = Sample("a", Image.new("RGB", (8, 8), "red"), ["x"], {})
    (path,) = write_shards([sample], tmp_path, "train", form=Form(encode=encode))  # type: ignore[arg-type]
    (entry,) = index_shard(path).entries
    with path.open("rb") as file:
        assert suffix_of(read_span(file, *entry.image)) == encode


@pytest.mark.parametrize("keys", [["a.b"], ["a/b"], [""], ["a", "a"]])
def test_unfit_keys_leave_nothing_behind(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shards([Sample(key, png("red"), ["x"], {}) for key in keys], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_larger_pack_are_an_error(tmp_path: Path) -> None:
    write_shards(shapes_samples(4, split="val", size=8), tmp_path, "val", shard_size=2)
    with pytest.raises(ValueError, match=r"val-000001\.tar of an earlier pack"):
        write_shards(shapes_samples(2, split="val", size=8), tmp_path, "val", shard_size=2)


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Got none"):
        write_shards([], tmp_path, "train")


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("TSV", "\t")])
def test_folder_with_table(tmp_path: Path, suffix: str, delimiter: str) -> None:
    names = ["a.b.png", "a.b.png", "a_b.png", "sub/c.png", "./sub/c.png", "no.png", "größe 1.png", "a.b.png"]
    table = tmp_path / f"captions.{suffix}"
    rows = [("file", "text"), *((name, f"caption {i}") for i, name in enumerate(names))]
    table.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows))
    samples = table_samples(str(tmp_path), str(table), image_column="file", caption_column="text")
    assert len(samples) == 6
    assert [(sample.key, sample.image, sample.captions) for sample in samples] == [
        ("a_b", tmp_path / "a.b.png", ["caption 0", "caption 1", "caption 7"]),
        ("a_b+2", tmp_path / "a_b.png", ["caption 2"]),
        ("sub_c", tmp_path / "sub/c.png", ["caption 3"]),
        ("sub_c+2", tmp_path / "sub/c.png", ["caption 4"]),
        ("no", tmp_path / "no.png", ["caption 5"]),
        ("größe_1", tmp_path / "größe 1.png", ["caption 6"]),
    ]
    with pytest.raises(ValueError, match=r"Expected a column 'image'.*Got file, text.*--image_column"):
        table_samples(str(tmp_path), str(table), image_column="image", caption_column="text")


@pytest.mark.parametrize(
    ("there", "row"),
    [
        ("images/a.png", "images\\a.png"),
        ("images/a.png", ".\\Images\\A.PNG "),
        ("\u00e9.png", "e\u0301.png"),
        ("e\u0301/x.png", "\u00e9/x.png"),
        ("a.JPG", "a.jpg"),
        ("Stra\u00dfe.png", "STRASSE.png"),
    ],
)
def test_names_of_other_systems_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str, row: str
) -> None:
    """Backslashes, another case and the other Unicode form, where exactly one file fits."""
    path = tmp_path / "in" / there
    path.parent.mkdir(parents=True)
    path.write_bytes(png("teal"))
    (tmp_path / "t.csv").write_bytes(f"\ufeffimage, caption\r\n{row},\ufeffa square\r\n".encode("utf-8-sig"))
    words = ["pack", "folder", "--images", str(tmp_path / "in"), "--table", str(tmp_path / "t.csv")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "1 file(s) are spelt otherwise" in capsys.readouterr().out
    assert index_shard(tmp_path / "out" / "data-000000.tar").entries[0].captions == ["a square"]
    path.unlink()  # a shard stays when its images go
    assert main([*words, "--out", str(tmp_path / "out")]) == 0


def test_a_missing_file_comes_with_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("b.png", "B.PNG", "sub/c.png", "d.PNG", "d.png"):
        (tmp_path / "in" / name).write_bytes(png("teal"))
    for rows, said in (
        (["B.png"], "Of 'B.png' there is in .*in: 'B.PNG', 'b.png'"),  # two fit: neither is taken
        (["sub/x.png"], "Of 'sub/x.png' there is in .*sub: 'c.png'"),
        (["..\\in\\..\\t.csv"], "file outside the folder: 1"),
    ):
        (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{row},a square\n" for row in rows))
        words = ["pack", "folder", "--images", str(tmp_path / "in"), "--table", str(tmp_path / "t.csv")]
        assert main([*words, "--out", str(tmp_path / "out")]) == 1
        assert re.search(said, capsys.readouterr().err)
    samples = FileSamples(tmp_path / "in", [("d.png", "x"), ("d.PNG", "y")])
    assert [sample.image for sample in samples] == [tmp_path / "in" / "d.png", tmp_path / "in" / "d.PNG"]
    assert samples.remarks() == ""


def test_a_subset_of_coco(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions of images that the file does not list are counted; a table program turns numbers into texts."""
    content = {
        "images": [{"id": "9", "file_name": "train\\A.JPG"}],
        "annotations": [
            {"image_id": 9, "caption": "one"},
            {"image_id": 8, "caption": "?"},
            {"image_id": 9, "caption": None},
        ],
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(b"?")
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    (sample,) = coco_samples(str(tmp_path), str(tmp_path / "c.json"))
    assert (sample.image, sample.captions) == (tmp_path / "train" / "a.jpg", ["one", ""])
    assert "left aside 1 caption(s) of images that it does not list" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Got none"),
        ("image,caption\n".encode("utf-16"), "Expected a column 'image'"),
        (b'image,caption\na.png,"' + b"x" * (2**24 + 9), "cannot be read after line 1 .field larger"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        table_samples(str(tmp_path), str(tmp_path / "t.csv"), image_column="image", caption_column="caption")


def test_coco(tmp_path: Path) -> None:
    (tmp_path / "000000000009.png").write_bytes(png("green"))
    content = {
        "images": [{"id": 9, "file_name": "000000000009.png"}, {"id": 10, "file_name": "x.png"}],
        "annotations": [{"image_id": 9, "caption": "first"}, {"image_id": 9, "caption": "second\n"}],
    }
    annotations = tmp_path / "captions.json"
    annotations.write_text(json.dumps(content))
    samples = coco_samples(str(tmp_path), str(annotations))
    found = [(sample.key, sample.captions) for sample in samples]
    assert found == [("000000000009", ["first", "second\n"]), ("x", [""])]
    (path,) = write_shards(samples, tmp_path / "out", "val")
    assert members(path) == {
        "000000000009.png": png("green"),
        "000000000009.txt": b"first\nsecond",
        "000000000009.json": b'{"captions": ["first", "second"], "file": "000000000009.png"}',
    }
    assert index_shard(path).entries[0].captions == ["first", "second"]


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "nothing", '{"images": [1], "annotations": []}', '{"images": [], "annotations": [{"image_id": 1}]}'],
)
def test_what_are_no_coco_captions(tmp_path: Path, content: str) -> None:
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match="Expected COCO captions"):
        coco_samples(str(tmp_path), str(tmp_path / "captions.json"))


def one(image: object, form: Form, folder: Path) -> tuple[str, bytes]:
    """Name and bytes of an image as it is packed."""
    (path,) = write_shards([Sample("k", image, ["x"], {})], folder, "data", form=form)  # type: ignore[arg-type]
    name, data = next(iter(members(path).items()))
    return name, data


def test_an_image_with_nothing_to_do_stays_byte_by_byte(tmp_path: Path) -> None:
    data = encoded(Image.linear_gradient("L"), "JPEG", quality=30)
    assert one(data, Form(), tmp_path) == ("k.jpg", data)
    assert one(data, Form(encode="jpg", quality=90), tmp_path) == ("k.jpg", data)


def test_resizing_keeps_the_format_unless_another_is_asked_for(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        name, data = one(encoded(image, kind), Form(16), tmp_path)
        assert (name, suffix_of(data)) == (f"k.{suffix}", suffix)
        assert Image.open(io.BytesIO(data)).size == (16, 16)
    name, data = one(encoded(image), Form(16, "shorter", "webp"), tmp_path)
    assert name == "k.webp"
    assert Image.open(io.BytesIO(data)).size == (24, 16)
    square = one(encoded(image), Form(16), tmp_path)[1]
    assert torch.equal(load_square(square, 16), load_square(encoded(image), 16))  # what CLIP would have seen
    small, large = (len(one(encoded(image), Form(16, "square", "jpg", q), tmp_path)[1]) for q in (20, 95))
    assert small < large


def test_turned_pictures_are_packed_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    kept = Image.open(io.BytesIO(one(data, Form(10, "shorter"), tmp_path)[1]))
    assert (kept.size, kept.getexif()) == ((10, 20), {})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form(resize="shorter"), "--size"),
        (Form(size=0), "1 to 8192"),
        (Form(quality=101), "1 to 100"),
    ],
)
def test_unfit_forms(tmp_path: Path, form: Form, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards([], tmp_path, "data", form=form)


def test_every_bad_sample_is_named_by_its_reason(photos: Path, tmp_path: Path) -> None:
    good = png("red")
    (photos / "bad").mkdir()
    files = {"cut.png": good[:40], "none.png": b"", "text.png": b"hello"}
    files["gif.png"] = encoded(Image.new("L", (2, 2)), "GIF")
    files |= dict.fromkeys(("blank.png", "latin.png", "long.png", "ok.png"), good)
    for name, data in files.items():
        (photos / "bad" / name).write_bytes(data)
    os.mkfifo(photos / "bad" / "pipe.png")
    (photos / "bad" / "loop.png").symlink_to("loop.png")
    captions = {"blank.png": b" \t", "latin.png": "café".encode("latin-1"), "long.png": b"x" * (2**20 + 1)}
    inside = [f"bad/{name}" for name in [*files, "pipe.png", "loop.png", "gone.png"]]
    rows = [(name.encode(), captions.get(name[4:], "fine 🦊".encode())) for name in inside]
    rows += [(name, b"x") for name in (b"../captions.csv", b"/etc/hostname", b"", b"n\0ul.png", b"z" * 300)]
    table = photos.parent / "bad.csv"
    table.write_bytes(b"image,caption\n" + b"".join(b"%b,%b\n" % row for row in rows))
    samples = table_samples(str(photos), str(table), image_column="image", caption_column="caption")
    (shard,) = pack_shards(samples, tmp_path / "out", "data", shard_size=100, form=Form(8))
    assert shard.samples == 1
    assert shard.skipped == {
        "undecodable image": ["bad/cut.png"],
        "empty image file": ["bad/none.png"],
        "no PNG, JPEG or WebP image": ["bad/text.png", "bad/gif.png"],
        "no caption": ["bad/blank.png"],
        "undecodable caption": ["bad/latin.png"],
        "caption too long": ["bad/long.png"],
        "no plain file": ["bad/pipe.png"],
        "missing file": ["bad/loop.png", "bad/gone.png", "n\0ul.png", "z" * 300],
        "file outside the folder": ["../captions.csv", "/etc/hostname"],
        "no file name": [""],
    }
    assert index_shard(tmp_path / "out" / shard.shard).entries[0].captions == ["fine 🦊"]


def test_too_many_bad_samples_are_an_error_and_nothing_is_lost(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "03.png").write_bytes(b"")
    assert main(pack_words(photos, tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert "1 of 12 samples" in said.err
    assert "empty image file: 1" in said.err
    assert "--max_bad_fraction" in said.err
    assert "skipped 1, empty image file: '03.png'" in said.out
    assert main(pack_words(photos, tmp_path / "out", "--max_bad_fraction", "0.1")) == 0
    assert "11 image(s) in 3 shard(s)" in capsys.readouterr().out


def test_no_usable_image_is_an_error(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in photos.iterdir():
        path.unlink()
    assert main(pack_words(photos, tmp_path / "out", "--max_bad_fraction", "1")) == 1
    assert "none that is usable (missing file: 12)" in capsys.readouterr().err


def test_a_disk_that_fills_up_keeps_earlier_shards(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addfile, written = tarfile.TarFile.addfile, 0

    def full(self: tarfile.TarFile, *rest: object) -> None:
        nonlocal written
        written += 1
        if written > 20:  # in the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        addfile(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        assert main(pack_words(photos, tmp_path / "out")) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "out")) == ["data-000000.tar", "data.manifest.jsonl"]
    assert main(pack_words(photos, tmp_path / "out")) == 0
    assert main(pack_words(photos, tmp_path / "whole")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_target_that_must_not_be_written_to(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(pack_words(photos, tmp_path / "file" / "out")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") <= 3
    assert str(tmp_path / "file") in said


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "unclip_pl", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0
    )


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_stopped_by_a_signal_and_started_again(tmp_path: Path, number: int, status: int) -> None:
    """It ends at once, and the shards are those of an undisturbed run."""
    counts = ["--train", "720", "--val", "0", "--heldout", "0", "--shard_size", "60"]
    words = ["pack", "shapes", "--num_workers", "1", *counts, "--out"]
    process = start([*words, str(tmp_path / "out")])
    first = tmp_path / "out" / "train-000001.tar"
    deadline = time.monotonic() + 600
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == status
    assert "Traceback" not in said
    assert 1 < len(list((tmp_path / "out").glob("train-*.tar"))) < 12
    assert main(["pack", "shapes", *counts, "--out", str(tmp_path / "out")]) == 0
    assert main(["pack", "shapes", *counts, "--out", str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
