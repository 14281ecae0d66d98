"""Emoji in ten styles, from public sets in their own layouts: the pairs of one table of facts, with captions."""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unclip_pl.data.transforms import BadSample
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import write_text
from unclip_pl.packing.samples import Picture, Sample
from unclip_pl.shapes.render import SPLITS

HERE = Path(__file__).parent
#: The sets, see the file's header.
SETS: dict[str, Any] = yaml.safe_load((HERE / "emoji.yaml").read_text(encoding="utf-8"))
#: Tags that a sample's JSON keeps, and tags that stand in captions of the form ``tags``.
KEPT, SAID = 6, 2


class Pair(NamedTuple):
    """A line of the table: an emoji in a style, its split, and the form of its caption."""

    hexcode: str  # without variation selectors
    style: str
    split: str
    form: str  # style: label and style; label: label alone; tags: label and two tags


def read_pairs() -> list[Pair]:
    """Return the table of pairs, in the order of their shards."""
    with (HERE / "emoji.csv").open(encoding="utf-8", newline="") as file:
        return [Pair(*line) for line in list(csv.reader(file))[1:]]


class EmojiSets:
    """The words and pictures that lie below some folders.

    Args:
        folders: folders that hold the sets' own ones, such as ``node_modules`` of npm.

    Raises:
        MissingFileError: there are no words, or no pictures.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        words = [folder / SETS["words"] for folder in folders if (folder / SETS["words"]).is_file()]
        where = ", ".join(map(str, folders))
        if not words:
            raise MissingFileError(f"No {SETS['words']} below {where}: run `npm install emojibase-data@17` there.")
        self.words = _words(words[0])
        self.pictures = {name: _pictures(folders, style) for name, style in SETS["styles"].items()}
        if not any(self.pictures.values()):
            raise MissingFileError(
                f"No pictures below {where}: run `npm install openmoji fluentui-emoji emoji-datasource-google "
                "emoji-datasource-twitter` there."
            )

    def picture(self, pair: Pair) -> Path | None:
        """Return the file of a pair's picture; None where its set or its emoji is not at hand."""
        there = self.pictures[pair.style]
        if pair.hexcode not in self.words:
            return None
        if SETS["styles"][pair.style]["named"] == "code":
            return there.get(pair.hexcode)
        name = SETS["names"].get(pair.hexcode) or _plain(self.words[pair.hexcode]["label"])
        return there.get(name)


class EmojiSamples:
    """The samples of a split that are at hand.

    Args:
        sets: words and pictures.
        pairs: the table.
        split: train, val or heldout.
        size: side in pixels at which vector pictures are drawn.
    """

    def __init__(self, sets: EmojiSets, pairs: Iterable[Pair], split: str, size: int) -> None:
        self.sets, self.size = sets, size
        asked = [pair for pair in pairs if pair.split == split]
        self.found = [(pair, path) for pair in asked if (path := sets.picture(pair)) is not None]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Sample]:
        for pair, path in self.found:
            style, word = SETS["styles"][pair.style], self.sets.words[pair.hexcode]
            label, tags = label_of(word["label"]), word.get("tags") or []
            caption = {
                "style": f"{label}, {style['phrase']}",
                "label": label,
                "tags": ", ".join([label, *tags[:SAID]]),
            }[pair.form]
            about = {"label": label, "style": pair.style, "style_phrase": style["phrase"], "tags": tags[:KEPT]}
            about |= {"group": word.get("group"), "hexcode": pair.hexcode, "license": style["license"]}
            image: Picture = path if path.suffix != ".svg" else _drawn(path, self.size)
            yield Sample(f"{pair.hexcode.lower()}_{pair.style}", image, [caption], about)


def write_card(folder: Path, sets: EmojiSets, pairs: Sequence[Pair]) -> None:
    """Write ``README.md``: sources, licences, how many pairs there are of each style, and what is left out."""
    found = Counter((pair.style, pair.split) for pair in pairs if sets.picture(pair) is not None)
    asked = Counter(pair.style for pair in pairs)
    lines = []
    for name, style in SETS["styles"].items():
        counts = [found[name, split] for split in SPLITS]
        left = asked[name] - sum(counts)
        cells = [name, style["phrase"], style["license"], *(f"{count:,}" for count in counts), f"{left:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = (HERE / "emoji.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", text.replace("{styles}", "\n".join(lines)))


def label_of(name: str) -> str:
    """Return how captions call an emoji: in small letters, without colons."""
    return re.sub(r": (?!facing)(?=[^,]*$)", " with ", name.lower()).replace(": ", " ")


def _words(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {
            _code(entry["hexcode"]): entry for entry in json.loads(path.read_text(encoding="utf-8")) if entry["label"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected emojibase's data in {path}. Got {error!r:.200}: install it again.") from error


def _pictures(folders: Sequence[Path], style: dict[str, Any]) -> dict[str, Path]:
    """Return the files of a style by code points or by name; an earlier pattern, and an earlier folder, go first."""
    found: dict[str, Path] = {}
    for pattern in style["files"]:
        for folder in folders:
            for path in sorted(folder.glob(pattern)):
                found.setdefault(_code(path.stem) if style["named"] == "code" else _plain(path.stem), path)
    return found


def _code(text: str) -> str:
    """Return code points in one form, from 1F441-FE0F, 1f441-fe0f and emoji_u1f441."""
    parts = text.removeprefix("emoji_u").replace("_", "-").upper().split("-")
    return "-".join(part for part in parts if part != "FE0F")


def _plain(name: str) -> str:
    """Return a name in one form, from "Boy", boy-default and boy_3d_default: letters, digits and hyphens."""
    letters = unicodedata.normalize("NFKD", name.lower().replace("&", "and")).encode("ascii", "ignore").decode()
    words = re.sub("[^a-z0-9]+", "-", letters.replace("'", "")).strip("-")
    return re.sub("-(3d|default)(?=-|$)", "", words)


def _drawn(path: Path, size: int) -> Picture:
    """Draw a vector picture."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError("Expected resvg-py, which draws vector pictures. Install unclip_pl[emoji].") from error
    try:
        return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True))
    except ValueError:
        return BadSample("damaged image")
