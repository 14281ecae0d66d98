"""The documentation site: its reference has every key that our configs use, and it is built without a warning."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from unclip_pl.settings import shipped_configs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/reference.py"))


def classes_in(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Yield every class of ours in a config, with the keys that are given to it."""
    if isinstance(node, dict):
        path = str(node.get("class_path", ""))
        if path.startswith("unclip_pl."):
            yield path.rpartition(".")[2], set(node.get("init_args") or {})
        for inner in node.values():
            yield from classes_in(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from classes_in(inner)


def test_every_key_of_every_config_is_explained(reference: dict[str, Any]) -> None:
    page = reference["configs"]()
    sections = {part.split("\n")[0]: part for part in re.split(r"^#{2,3} ", page, flags=re.MULTILINE)}
    explained = {name: set(re.findall(r"^\| `(\w+)` \| .* \| \S.* \|$", part, re.M)) for name, part in sections.items()}
    used = [found for path in shipped_configs().values() for found in classes_in(yaml.safe_load(path.read_text()))]
    assert len(used) > 100
    assert not [
        (name, keys - explained.get(name, set())) for name, keys in used if not keys <= explained.get(name, set())
    ]


def test_defaults_are_those_of_signatures(reference: dict[str, Any]) -> None:
    page = reference["configs"]()
    assert (
        "| `text_drop` | `float` | `0.1` | share of captions replaced by the empty one; z\\_i^(t) is never hidden. |"
        in page
    )
    assert "| `net` | [`PriorNetwork`](#key-priornetwork) | required | causal transformer, or an MLP. |" in page
    assert re.search(r"^\| `statistics` \| `str` \| from the data \|", page, re.MULTILINE)


def test_every_command_and_option_is_there(reference: dict[str, Any]) -> None:
    page = reference["commands"]()
    assert re.findall(r"^### unclip (\w+)$", page, re.MULTILINE) == [
        word for words in reference["cli"].GROUPS.values() for word in words
    ]
    for option in ("`captions`", "`--run`", "`--num`", "`--prior_guidance`", "`--etas`", "`--part`"):
        assert f"| {option} |" in page
    assert not re.search(r"^\| `.*` \| .* \|  \|$", page, re.MULTILINE), "an option without a meaning"


@pytest.mark.slow  # a minute of a core
def test_it_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="the extra [docs] is not installed")
    words = ["-b", "html", "-q", "-W", "-n", "--keep-going", "-c", "docs", "-d", f"{tmp_path}/read"]
    line = [sys.executable, "-m", "sphinx", *words, ".", f"{tmp_path}/html"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "html").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "search.html", "docs/index.html", "docs/concepts.html", "docs/_reference/configs.html"} <= {
        *pages
    }
    loaded = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="https?:|<link[^>]*\shref="https?:[^>]*stylesheet')
    assert not [name for name, text in pages.items() if loaded.search(text)]
    assert "<math" in pages["docs/concepts.html"]
    assert not [
        path for path in tmp_path.glob("html/_static/**/*.css") if re.search(r"url\([\"']?https?:", path.read_text())
    ]
