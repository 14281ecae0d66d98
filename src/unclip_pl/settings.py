"""Settings in the form that people write them: YAML without keys that occur twice, and ``~`` for the home folder.

Nothing here imports torch, so that a command line is read at once.
"""

import io
import os
import re
from argparse import Namespace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from unclip_pl.errors import InputError

#: A home folder at the beginning of a path, after the name of an option or the words that mark a local CLIP.
_HOME = re.compile(r"^((?:--[\w.+-]+=)?(?:local-dir:)?)(~[^/\\]*)(?=[/\\]|$)")


def expanded(node: Any) -> Any:
    """Return a text, or a tree of plain data and parsed options, with ``~`` at the beginning of paths replaced.

    Args:
        node: words of a command line, parsed options (changed in place) or the content of a config.
    """
    if isinstance(node, str):
        return _HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), node)
    if isinstance(node, Namespace):
        vars(node).update(expanded(vars(node)))
        return node
    if isinstance(node, dict):
        return {key: expanded(value) for key, value in node.items()}
    return [expanded(value) for value in node] if isinstance(node, list) else node


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # the fast one, where it is built
    """YAML's loader of plain data, which refuses a key that occurs twice. YAML itself keeps the last one."""

    def construct_document(self, node: yaml.Node) -> Any:
        """Look through the document first, since merging changes it."""
        _refuse_twins(node, set())
        return super().construct_document(node)


def _refuse_twins(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))  # an anchor may be used again, even inside itself
    lines: dict[tuple[str, Any], int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else [(None, child) for child in node.value]:
        if isinstance(key, yaml.ScalarNode):
            mark, name = key.start_mark, (key.tag, key.value)
            if name in lines:
                raise InputError(
                    f"Expected every key of {mark.name} once. Got {key.value!r} in line {lines[name]} and again in "
                    f"line {mark.line + 1}: remove one of them."
                )
            lines[name] = mark.line + 1
        _refuse_twins(value, seen)


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML or JSON text.

    Args:
        text: document to parse.
        name: path or option that the text comes from, for errors.

    Raises:
        InputError: a key occurs twice.
        yaml.YAMLError: the text is no YAML.
    """
    loader = _Loader(_Named(text, name))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Named(io.StringIO):
    """A text with the name that errors give it."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, with the files that it names by relative path put in their place.

    Raises:
        MissingFileError: there is no such file.
        InputError: a key occurs twice in a file.
        yaml.YAMLError: a file is no YAML.
    """

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: inline(value) for key, value in node.items()}
        if isinstance(node, list):
            return [inline(value) for value in node]
        if isinstance(node, str) and node.endswith((".yaml", ".yml")):
            named = path.parent / expanded(node)
            return read_yaml(named) if named.is_file() else node
        return node

    return inline(_content(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> Any:
    """Read a file once: a recipe of many stages asks for the same few again and again."""
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))
