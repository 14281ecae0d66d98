"""Shards that img2dataset 1.47.0 made, in the folder beside this file: they load unchanged.

Made from twelve local pictures, a file that is none and a URL that leads nowhere, by ``img2dataset.download`` with
``input_format="csv", output_format="webdataset", caption_col="caption", save_additional_columns=["artist"],
number_sample_per_shard=7, image_size=32``; the first shard with ``resize_mode="no"`` (original bytes, all called .jpg,
PNG and WebP too), the second with ``resize_mode="border", encode_format="webp"``.
"""

import json
from pathlib import Path

import torch

from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.data.precompute import precompute
from unclip_pl.data.shards import decode_entries, index_shard, parse_json, read_span
from unclip_pl.data.store import read_manifest

FOLDER = Path(__file__).parent / "img2dataset"


def test_every_download_is_a_sample_with_its_caption_picture_and_json() -> None:
    captions = {}
    for shard in sorted(FOLDER.glob("*.tar")):
        index = index_shard(shard)
        statistics = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text())
        assert len(index.entries) + sum(map(len, index.skipped.values())) == statistics["successes"]
        assert set(index.skipped) <= {"no caption"}
        (decoded,) = decode_entries(shard, index.entries, 32, 7)
        for entry, image in decoded:
            assert isinstance(image, torch.Tensor)
            assert image.float().std() > 1 or entry.key == "000003"  # noise, but for the one CMYK picture
            captions[entry.key] = entry.captions
            with shard.open("rb") as file:
                meta = parse_json(read_span(file, *entry.json))
            assert (meta["key"], meta["artist"], meta["status"]) == (entry.key, "me", "success")
    assert captions == {
        "000000": ["a red cat"],
        "000001": ["an emoji 🦊 caption"],
        "000002": ["two\nlines"],
        "000004": [("très long " * 300).strip()],
        "000006": ['plain, with "quotes"'],
        "000010": ["seven"],
        "000011": ["eight"],
        "000012": ["nine"],
        "000013": ["ten"],
        "000014": ["eleven"],
    }


def test_they_are_embedded_as_they_are(tmp_path: Path, clip: ClipSpec) -> None:
    precompute(str(FOLDER), str(tmp_path), clip, max_bad_fraction=0.2, device="cpu")
    records = read_manifest(tmp_path)
    assert {name: (record.images, record.skipped) for name, record in records.items()} == {
        "00000.tar": (5, {"no caption": 2}),
        "00001.tar": (5, {}),
    }
