"""Check that the README and docs/ are true: commands parse, links lead to files, the README stays short."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from unclip_pl.cli import main
from unclip_pl.generation.run import read_run
from unclip_pl.moved import MOVED

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
    ROOT / "data/README.md",
]
DOCUMENTS += sorted(ROOT.glob("results/*/README.md"))


def commands(document: Path) -> list[str]:
    """Return every line of a code block that calls ``unclip``, without the settings of its environment."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    lines = (re.sub(r"^(\w+=\S+ )+", "", line) for block in blocks for line in block.splitlines())
    return [line for line in lines if re.match(r"unclip [a-z]", line)]


LINES = list(dict.fromkeys(line for document in DOCUMENTS for line in commands(document)))


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_parses(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    assert main([*shlex.split(line, comments=True)[1:], "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    text = document.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [to for to in targets if not to.startswith("http") and not (document.parent / to).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:configs|examples|benchmarks|data/prompts|tests)/[\w./-]+\.\w+)`", document.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_run_that_is_written_by_hand_is_one(tmp_path: Path) -> None:
    [run] = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/your-data.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "run.json").write_text(run)
    assert read_run(tmp_path).decoder.image_size == 64


def test_there_are_commands_and_no_gaps() -> None:
    assert len(commands(ROOT / "README.md")) >= 3
    assert len(LINES) > 40
    assert not [document for document in DOCUMENTS if "@@" in document.read_text()]


def test_the_table_of_results_is_the_reports() -> None:
    report = json.loads((ROOT / "results/rematch-shapes/report.json").read_text())
    table = re.findall(r"^\| .* \| (\d.*) \| (\d.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    expected = []
    for name in ("true posterior", "diffusion", "ar", "linear", "text"):
        metrics = report["priors"][name]["metrics"]
        match = [f"{100 * metrics['stated_match'][key]:.1f}" for key in ("mean", "low", "high")]
        distance = [f"{metrics['fd_judge_corrected'][key]:.4f}" for key in ("mean", "low", "high")]
        expected.append(tuple("{} [{}, {}]".format(*values) for values in (match, distance)))
    assert table == expected


def test_the_changelog_names_every_class_path_that_moved() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert not [old for old in MOVED if f"| `{old}` |" not in changelog]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert citation["version"] == version[1]
