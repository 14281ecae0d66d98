"""The layers of the package point downwards: each may import what stands below it, and nothing else of ours."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "unclip_pl"

#: From the ground up. Packages in one row do not know each other.
LAYERS = [
    {"errors", "moved"},
    {"files", "imports", "origin", "settings", "streams", "types"},
    {"diffusion", "nn", "clip", "shapes"},
    {"metrics"},
    {"parts"},
    {"data"},
    {"generation"},
    {"packing", "tasks"},
    {"training"},
    {"evaluation"},
    {"report"},
    {"interop", "play"},  # a page that `unclip play` serves: like other people's formats, nothing below needs it
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
#: torch, numpy and open_clip are enough here: who takes the mathematics does not wait for a trainer.
PURE = {"errors", "imports", "moved", "files", "origin", "streams", "types", "diffusion", "nn", "clip", "shapes"}
#: Who draws does not wait for Lightning, which takes a second or two to import.
LIGHT = PURE | {"parts", "generation"}
#: The only file that uses private names of Lightning.
PRIVATE = "training/private.py"
#: Private names of Python and torch that files which import Lightning may use.
THEIRS = re.compile(r"_(replace|asdict|fields|foreach_\w+|load_from_state_dict|dynamo|BatchNorm)$")
#: Screens are 60 lines high.
SCREEN = 60


def modules(source: Path = SOURCE) -> list[Path]:
    return [path for path in sorted(source.rglob("*.py")) if path != source / "__init__.py"]


def part(path: Path, source: Path = SOURCE) -> str:
    return path.relative_to(source).parts[0].removesuffix(".py")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, inside its functions too."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "unclip_pl"}
    return names


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that a file takes from elsewhere."""
    used: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            used.add(node.attr)
    return {name for name in used if name.startswith("_") and not name.startswith("__")}


@cache
def defined_names(path: Path) -> set[str]:
    """Names that a file defines: functions, classes and attributes that it sets."""
    defined: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                defined |= {part.attr for part in ast.walk(target) if isinstance(part, ast.Attribute)}
    return defined


def faults(path: Path, source: Path = SOURCE) -> list[str]:
    """What a file does that its layer may not."""
    here, found = part(path, source), []
    for name in imported(path):
        if name.startswith("."):
            found.append(f"relative import {name}")
        slow = {"lightning", "torchmetrics"} if here in LIGHT else set()
        if name.split(".")[0] in slow | ({"jsonargparse"} if here in PURE else set()):
            found.append(f"{here} imports {name}")
        if name.startswith("unclip_pl."):
            there = name.split(".")[1]
            if there != here and RANK[there] >= RANK[here]:
                found.append(f"{here} (layer {RANK[here]}) imports {there} (layer {RANK[there]})")
    if path != source / PRIVATE and any(name.split(".")[0] == "lightning" for name in imported(path)):
        ours = set().union(*(defined_names(file) for file in modules(source) if file != source / PRIVATE))
        found += [f"private name {name}" for name in private_names(path) - ours if not THEIRS.match(name)]
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > SCREEN:
                found.append(f"{node.name} has {lines} lines: a function fits a screen of {SCREEN}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_keeps_to_its_layer(path: Path) -> None:
    assert not faults(path)


def test_the_rule_finds_a_bad_file(tmp_path: Path) -> None:
    bad = tmp_path / "nn" / "bad.py"
    bad.parent.mkdir()
    long = "\n".join(["def long():", *["    pass"] * SCREEN])
    lines = ["def f(trainer):", "    from unclip_pl.evaluation import cell", "    return trainer._loop"]
    bad.write_text("\n".join([*lines, "import lightning", "from . import x", long]))
    said = " ".join(faults(bad, tmp_path))
    for word in ("imports evaluation", "imports lightning", "relative import", "has 61 lines", "private name _loop"):
        assert word in said
