"""The layers of the package point one way: each may import what stands below it, and nothing else of ours."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "unclip_pl"

#: From the ground up; packages in one row do not know each other, but for the exceptions named.
LAYERS = [
    {"types", "bundle", "checkpoint", "streams"},
    {"diffusion", "nn", "clip", "shapes"},
    {"metrics"},
    {"tasks", "callbacks", "data"},
    {"priors", "decoding", "manipulation", "pipeline", "pictures", "resume", "sharding"},
    {"evaluation", "interop"},
    {"commands"},
    {"cli", "trainer_cli", "__main__"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
#: A checkpoint may be a member of a bundle; the pipeline is made of priors and a decoder; a command line knows its own
#: parser; `reproduce` types other commands.
SIDEWAYS = {
    ("checkpoint", "bundle"),
    ("pipeline", "priors"),
    ("pipeline", "decoding"),
    ("pipeline", "manipulation"),
    ("manipulation", "decoding"),
    ("trainer_cli", "cli"),
    ("trainer_cli", "callbacks"),
    ("cli", "trainer_cli"),
    ("cli", "__main__"),
    ("__main__", "cli"),
    ("commands", "cli"),
}
#: torch, numpy and open_clip are enough here: who takes the mathematics does not wait for a trainer.
PURE = {"types", "bundle", "checkpoint", "streams", "diffusion", "nn", "clip", "shapes"}


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "unclip_pl"}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    for name in imported(path):
        if not name.startswith("unclip_pl."):
            continue
        there = name.split(".")[1]
        allowed = there == here or RANK[there] < RANK[here] or (here, there) in SIDEWAYS
        assert allowed, f"{here} (layer {RANK[here]}) imports {there} (layer {RANK[there]})"


@pytest.mark.parametrize("path", [p for p in modules() if part(p) in PURE], ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_ground_knows_no_trainer(path: Path) -> None:
    heavy = {name for name in imported(path) if name.split(".")[0] in {"lightning", "torchmetrics", "jsonargparse"}}
    assert not heavy


def test_the_test_can_fail(tmp_path: Path) -> None:
    upward = tmp_path / "bad.py"
    upward.write_text("from unclip_pl.report import report\nimport lightning")
    assert {"unclip_pl.evaluation", "lightning"} <= imported(upward)
    assert RANK["evaluation"] > RANK["nn"]


def test_files_are_short() -> None:
    long = {path.name: n for path in modules() if (n := len(path.read_text().splitlines())) > 350}
    assert not long, f"what are they hiding? {long}"
