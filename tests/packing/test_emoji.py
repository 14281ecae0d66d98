"""The emoji of the studies: truths of the table, and sets that are made here in the layouts of the public ones."""

import io
import json
import os
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from unclip_pl.cli import main
from unclip_pl.packing.emoji import SETS, EmojiSamples, EmojiSets, Pair, label_of, read_pairs

RED = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="4" fill="red"/></svg>'
WORDS = [
    {"hexcode": "1F916", "label": "robot", "tags": ["face", "monster"], "group": 0},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": [*"abcdefgh"], "group": 8},
    {"hexcode": "1F9DF", "label": "zombie", "tags": [], "group": 1},
    {"hexcode": "1F471", "label": "person: blond hair", "group": 1},
]


def png(color: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A node_modules and a folder of checkouts, with a few files each."""
    packages, checkouts = tmp_path / "node_modules", tmp_path / "checkouts"
    files = {
        packages / "emojibase-data/en/data.json": json.dumps(WORDS).encode(),
        packages / "openmoji/color/svg/2764.svg": RED.encode(),
        packages / "openmoji/black/svg/1F916.svg": RED.encode(),
        packages / "emoji-datasource-twitter/img/twitter/64/2764-fe0f.png": png("blue", 64),
        packages / "fluentui-emoji/icons/flat/person-zombie.svg": RED.encode(),
        packages / "fluentui-emoji/icons/flat/robot.svg": RED.encode(),
        packages / "fluentui-emoji/icons/high-contrast/person-blonde-hair-default.svg": RED.encode(),
        packages / "fluentui-emoji/icons/high-contrast/person-blonde-hair-dark.svg": b"not this one",
        checkouts / "noto2018/png/128/emoji_u2764.png": png("green", 128),
        checkouts / "fluent3d/assets/Robot/3D/robot_3d.png": png("yellow", 256),
        checkouts / "fluent3d/assets/Person blonde hair/Default/3D/person_blonde_hair_3d_default.png": png("pink", 256),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [packages, checkouts]


def samples(folder: Path) -> dict[str, tuple[str, str, dict[str, object], Image.Image]]:
    """Split, caption, JSON and picture of every sample of some shards, by key."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                members[key][suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for key, one in members.items():
            picture = Image.open(io.BytesIO(one["png"])).convert("RGB")
            caption = one["txt"].decode().strip()
            found[key] = (shard.name.partition("-")[0], caption, json.loads(one["json"]), picture)
    return found


def test_the_table_keeps_its_splits_apart() -> None:
    pairs = read_pairs()
    by_split = {split: [pair for pair in pairs if pair.split == split] for split in ("train", "val", "heldout")}
    assert {split: len(found) for split, found in by_split.items()} == {"train": 12110, "val": 430, "heldout": 1088}
    emoji, styles = ({getattr(pair, name) for pair in by_split["train"]} for name in ("hexcode", "style"))
    assert not emoji & {pair.hexcode for pair in by_split["val"]}
    assert styles == set(SETS["styles"])
    assert {pair.hexcode for pair in by_split["heldout"]} <= emoji
    assert len({(pair.hexcode, pair.style) for pair in pairs}) == len(pairs)
    assert {pair.form for pair in pairs} == {"style", "label", "tags"}


def test_layouts_captions_and_pictures(folders: list[Path]) -> None:
    sets = EmojiSets(folders)
    asked = {
        Pair("2764", "openmoji", "train", "style"): ("red heart, flat emoji with black outlines", None),
        Pair("2764", "twemoji", "train", "tags"): ("red heart, a, b", "blue"),
        Pair("2764", "noto2018", "train", "label"): ("red heart", "green"),
        Pair("1F916", "openmoji-line", "train", "style"): ("robot, black line drawing", None),
        Pair("1F916", "fluentflat", "train", "tags"): ("robot, face, monster", None),
        Pair("1F916", "fluent3d", "train", "style"): ("robot, glossy 3d render", "yellow"),
        Pair("1F9DF", "fluentflat", "train", "tags"): ("zombie", None),
        Pair("1F471", "fluenthc", "train", "label"): ("person with blond hair", None),
        Pair("1F471", "fluent3d", "train", "label"): ("person with blond hair", "pink"),
    }
    absent = [Pair("1F916", "blobmoji", "train", "style"), Pair("1F600", "openmoji", "train", "style")]
    found = EmojiSamples(sets, [*asked, *absent], "train", 16)
    assert len(found) == len(asked)
    for sample, (pair, (caption, color)) in zip(found, asked.items(), strict=True):
        assert sample.key == f"{pair.hexcode.lower()}_{pair.style}"
        assert sample.captions == [caption]
        assert len(sample.extra["tags"]) <= 6
        assert sample.extra["license"] == SETS["styles"][pair.style]["license"]
        data = sample.image if isinstance(sample.image, bytes) else Path(str(sample.image)).read_bytes()
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        if color:
            assert picture.convert("RGB").getpixel((3, 3)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
        else:
            assert picture.size == (16, 16)
            assert picture.getpixel((8, 2)) == (255, 0, 0, 255)
            assert picture.getpixel((8, 13))[3] == 0  # type: ignore[index]


def test_labels_are_words_of_a_caption() -> None:
    said = {
        "woman: red hair": "woman with red hair",
        "family: man, woman, girl": "family man, woman, girl",
        "person kneeling: facing right": "person kneeling facing right",
        "ON! arrow": "on! arrow",
    }
    assert {name: label_of(name) for name in said} == said


def test_the_command_writes_shards_and_their_card(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert main(["pack", "emoji", "--from", *map(str, folders), "--out", str(out), "--size", "32"]) == 0
    packed = samples(out)
    table = {f"{pair.hexcode.lower()}_{pair.style}": pair for pair in read_pairs()}
    assert packed.keys() <= table.keys()
    assert len(packed) > 5
    assert all(split == table[key].split for key, (split, *_) in packed.items())
    assert {picture.size for *_, picture in packed.values()} == {(32, 32)}
    *_, heart = packed["2764_openmoji"]
    assert [heart.getpixel(place) for place in ((5, 5), (5, 28))] == [(255, 0, 0), (255, 255, 255)]  # on white
    card = (out / "README.md").read_text()
    assert f"left out {len(table) - len(packed):,}" not in card
    assert "CC BY-SA 4.0, OpenMoji" in card
    assert "{styles}" not in card


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([], "Expected folders of emoji sets. Got none"),
        (["none"], "run `npm install emojibase-data@17`"),
        (["words"], "No pictures below"),
        (["broken"], "install it again"),
    ],
)
def test_bad_input_is_one_line(kept: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("words", json.dumps(WORDS)), ("broken", "[{}]")):
        path = tmp_path / name / SETS["words"]
        path.parent.mkdir(parents=True)
        path.write_text(content)
    assert main(["pack", "emoji", *(str(tmp_path / name) for name in kept), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("UNCLIP_EMOJI" not in os.environ, reason="UNCLIP_EMOJI names the shards of the emoji studies")
def test_the_table_is_that_of_the_studies() -> None:
    """With the shards, and with npm's packages (UNCLIP_EMOJI_SETS), captions and JSON are the same."""
    theirs = samples(Path(os.environ["UNCLIP_EMOJI"]))
    pairs = read_pairs()
    assert [f"{pair.hexcode.lower()}_{pair.style}" for pair in pairs] == list(theirs)
    assert [pair.split for pair in pairs] == [split for split, *_ in theirs.values()]
    if "UNCLIP_EMOJI_SETS" in os.environ:
        sets = EmojiSets([Path(os.environ["UNCLIP_EMOJI_SETS"])])
        for sample in EmojiSamples(sets, pairs, "heldout", 64):
            _, caption, about, _ = theirs[sample.key]
            assert sample.captions == [caption]
            assert sample.extra == about
