"""Settings in the form that people write them: YAML without keys that occur twice, ``~`` for the home folder, and the
configs that the package brings.

Nothing here imports torch, so that a command line is read at once.
"""

import io
import os
import re
from argparse import Namespace
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from unclip_pl.errors import InputError, MissingFileError

_INSIDE = Path(__file__).parent / "shipped"
#: Folder of the ``configs`` and ``data/prompts`` of the package: inside it where it is installed, else the clone's top.
SHIPPED = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2]
#: Folders of what is found by its name.
CONFIGS, PROMPTS = "configs", "data/prompts"

#: Environment variable that names a stage's lock file to the process that `unclip reproduce` starts for the stage.
STAGE_LOCK = "UNCLIP_STAGE"

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


def find(name: str | Path, folder: str = CONFIGS) -> Path:
    """Return where a config lies: as written, else under ``./configs``, else in the package.

    Args:
        name: path of the config; without a leading ``configs/`` it is found, too.
        folder: :data:`CONFIGS`, or :data:`PROMPTS` for files of captions, which are found in the same way.

    Returns:
        The file's path; ``name`` itself where there is none.
    """
    inside = Path(name)
    with suppress(ValueError):
        inside = inside.relative_to(folder)
    return next(filter(Path.is_file, (Path(name), folder / inside, SHIPPED / folder / inside)), Path(name))


def shipped_configs() -> dict[str, Path]:
    """Return the configs of the package, by name and in order: ``prior/tiny.yaml``."""
    root = SHIPPED / CONFIGS
    return {path.relative_to(root).as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def no_config(name: str | Path) -> MissingFileError:
    """Return the error for a config that :func:`find` has not found. It has the nearest names."""
    names = list(shipped_configs())
    near = get_close_matches(Path(name).as_posix().removeprefix(f"{CONFIGS}/"), names, 3, 0.5)
    named = f"name another file, perhaps {' or '.join(near)}" if near else "name another file"
    return MissingFileError(f"No config at {name}, under ./{CONFIGS} or in the package: {named}. Run `unclip configs`.")


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
        InputError: a key occurs twice in a file, or a file names itself, directly or through others.
        yaml.YAMLError: a file is no YAML.
    """
    return _with_files(path, ())


def _with_files(path: Path, outer: tuple[Path, ...]) -> Any:
    """Return the content of a YAML file with those that it names; ``outer`` are the files that name it."""
    own = path.resolve()
    if own in outer:
        ring = " → ".join(map(str, [*outer[outer.index(own) :], own]))
        raise InputError(f"{path} names itself ({ring}): name another file in one of them.")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: inline(value) for key, value in node.items()}
        if isinstance(node, list):
            return [inline(value) for value in node]
        if isinstance(node, str) and node.endswith((".yaml", ".yml")):
            named = path.parent / expanded(node)
            return _with_files(named, (*outer, own)) if named.is_file() else node
        return node

    return inline(_content(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> Any:
    """Read a file once: a recipe of many stages asks for the same few again and again."""
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))
