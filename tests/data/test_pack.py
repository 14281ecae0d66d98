import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.data.pack import Sample, coco_samples, shapes_samples, table_samples, write_shards
from unclip_pl.data.shards import Split, decode_entries, index_shard, parse_json, read_span
from unclip_pl.data.transforms import suffix_of
from unclip_pl.shapes.captions import parse


def png(color: str, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shards(shapes_samples(25, split="train", size=16), tmp_path / folder, "train", shard_size=10)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"train-00000{i}.tar" for i in range(3)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


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


def test_splits_of_one_seed_differ() -> None:
    train, val = (next(shapes_samples(1, split=split)) for split in ("train", "val"))
    assert not np.array_equal(train.image, val.image)


@pytest.mark.parametrize("encode", ["png", "jpg", "webp"])
def test_encodings_are_what_they_say(tmp_path: Path, encode: str) -> None:
    (path,) = write_shards([Sample("a", Image.new("RGB", (8, 8), "red"), ["x"], {})], tmp_path, "train", encode=encode)
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


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_folder_with_table(tmp_path: Path, suffix: str, delimiter: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.b.png", "a_b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(png("blue", (12, 8)))
    rows = [
        ("file", "text"),
        ("a.b.png", "one"),
        ("a.b.png", "two"),
        ("a_b.png", "x"),
        ("sub/c.png", "y"),
        ("no.png", "z"),
    ]
    table = tmp_path / f"captions.{suffix}"
    table.write_text("\n".join(delimiter.join(row) for row in rows))
    skipped: Counter[str] = Counter()

    def samples(image_column: str = "file", size: int | None = None) -> list[Sample]:
        return list(
            table_samples(
                str(tmp_path), str(table), image_column=image_column, caption_column="text", size=size, skipped=skipped
            )
        )

    found = samples()
    assert [(sample.key, sample.captions) for sample in found] == [
        ("a_b", ["one", "two"]),
        ("a_b--2", ["x"]),
        ("sub_c", ["y"]),
    ]
    assert found[0].image == png("blue", (12, 8))
    assert skipped == {"missing file": 1}
    (squared, *_) = samples(size=4)
    assert isinstance(squared.image, Image.Image)
    assert squared.image.size == (4, 4)
    with pytest.raises(ValueError, match="--image_column"):
        samples(image_column="image")


def test_coco(tmp_path: Path) -> None:
    (tmp_path / "000000000009.png").write_bytes(png("green"))
    content = {
        "images": [{"id": 9, "file_name": "000000000009.png"}],
        "annotations": [{"image_id": 9, "caption": "first"}, {"image_id": 9, "caption": "second"}],
    }
    annotations = tmp_path / "captions.json"
    annotations.write_text(json.dumps(content))
    (sample,) = coco_samples(str(tmp_path), str(annotations), size=None, skipped=Counter())
    assert (sample.key, sample.captions) == ("000000000009", ["first", "second"])
    annotations.write_text("{}")
    with pytest.raises(ValueError, match="COCO captions"):
        list(coco_samples(str(tmp_path), str(annotations), size=None, skipped=Counter()))
