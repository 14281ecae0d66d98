"""The layers of the package point downwards: each may import what stands below it, and nothing else of ours."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "unclip_pl"

#: From the ground up. Packages in one row do not know each other.
LAYERS = [
    {"errors", "moved"},
    {"files", "streams", "types"},
    {"diffusion", "nn", "clip", "shapes"},
    {"metrics"},
    {"data"},
    {"packing", "tasks"},
    {"training"},
    {"generation"},
    {"evaluation"},
    {"report"},
    {"interop"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
#: torch, numpy and open_clip are enough here: who takes the mathematics does not wait for a trainer.
PURE = {"errors", "moved", "files", "streams", "types", "diffusion", "nn", "clip", "shapes"}
#: Screens are 60 lines high.
SCREEN = 60


def modules(source: Path = SOURCE) -> list[Path]:
    return [path for path in sorted(source.rglob("*.py")) if path != source / "__init__.py"]


def part(path: Path, source: Path = SOURCE) -> str:
    return path.relative_to(source).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "unclip_pl"}
    return names


def faults(path: Path, source: Path = SOURCE) -> list[str]:
    """What a file does that its layer may not."""
    here, found = part(path, source), []
    for name in imported(path):
        if name.startswith("."):
            found.append(f"relative import {name}")
        if here in PURE and name.split(".")[0] in {"lightning", "torchmetrics", "jsonargparse"}:
            found.append(f"{here} imports {name}")
        if name.startswith("unclip_pl."):
            there = name.split(".")[1]
            if there != here and RANK[there] >= RANK[here]:
                found.append(f"{here} (layer {RANK[here]}) imports {there} (layer {RANK[there]})")
    for node in ast.walk(ast.parse(path.read_text())):
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
    bad.write_text(f"def f():\n    from unclip_pl.evaluation import cell\nimport lightning\nfrom . import x\n{long}\n")
    said = " ".join(faults(bad, tmp_path))
    assert all(word in said for word in ("imports evaluation", "imports lightning", "relative import", "has 61 lines"))
