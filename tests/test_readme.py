"""What the README says to type is what the parsers take."""

import re
import shlex
from pathlib import Path

import pytest

from unclip_pl.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```[a-z]*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines() if re.match(r"unclip [a-z]", line)]


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_parses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(line, comments=True)[1:], "--print_config"]) == 0, capsys.readouterr().err


def test_there_are_commands_and_no_gaps() -> None:
    assert len(LINES) > 5
    assert "@@" not in README
