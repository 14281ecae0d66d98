"""``unclip configs``: the configs that the package brings, to be read and to be edited."""

import re
from pathlib import Path

from unclip_pl.errors import InputError
from unclip_pl.settings import CONFIGS, SHIPPED, no_config, shipped_configs


def listing() -> None:
    """List the configs of the package, each with what its header says first."""
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:<{width}}  {header(path)}")


def copy(names: list[str]) -> None:
    """Write configs of the package to be edited. What is below ./configs is found before the package's.

    Args:
        names: folder to write to, then names of configs such as prior/tiny.yaml; without names, all configs. The
            sections that a config names are copied along.
    """
    if not names:
        raise InputError(
            "Expected a folder. Got none: write, for example, unclip configs copy configs prior/tiny.yaml."
        )
    known, folder = shipped_configs(), Path(names[0])
    if folder.suffix == ".yaml":
        raise InputError(
            f"Expected a folder, then configs. Got {folder}: write, for example, unclip configs copy configs {folder}."
        )
    asked = [Path(name).as_posix().removeprefix(f"{CONFIGS}/") for name in names[1:]]
    if unknown := [name for name in asked if name not in known]:
        raise no_config(unknown[0])
    files = {name: known[name].read_text(encoding="utf-8") for name in _with_sections(asked or list(known), known)}
    if taken := [name for name in files if (folder / name).exists()]:
        raise InputError(f"{folder / taken[0]} exists already: remove it, or name another folder.")
    from unclip_pl.files import write_text  # imports torch, for which nobody who lists configs waits

    for name, text in files.items():
        write_text(folder / name, text)
    print(f"{len(files)} configs: {folder}")


def header(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a config."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("# "))
    return re.split(r"(?<=\.)\s", " ".join(line[2:] for line in lines[:end]))[0]


def _with_sections(names: list[str], known: dict[str, Path]) -> list[str]:
    """Return names of configs, with those that they name by a path relative to their own."""
    root, found = (SHIPPED / CONFIGS).resolve(), list(names)
    for name in found:  # grows
        for other in re.findall(r"\.\./[\w./-]+\.yaml", known[name].read_text(encoding="utf-8")):
            section = (known[name].parent / other).resolve().relative_to(root).as_posix()
            found += [section] if section not in found else []
    return found


COMMANDS = {"": listing, "copy": copy}
