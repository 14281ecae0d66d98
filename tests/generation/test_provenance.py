"""Which commit a number is said to come from, and how long it took."""

import subprocess
from pathlib import Path

import pytest

from unclip_pl import origin
from unclip_pl.files import write_json
from unclip_pl.generation import provenance


def test_the_commit_is_this_codes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment often lies in somebody else's repository."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    module = tmp_path / "origin.py"
    module.write_text("")
    (tmp_path / "theirs.py").write_text("")
    monkeypatch.setattr(origin, "__file__", str(module))
    assert origin.commit() == "unknown"
    git("init")
    git("add", "theirs.py")
    git("commit", "-m", "theirs")
    assert origin.commit() == "unknown"
    git("add", "origin.py")
    git("commit", "-m", "ours")
    assert origin.commit() == git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cell.json").write_text("1")
    git("add", "results")
    git("commit", "-m", "a cell")
    (tmp_path / "results" / "cell.json").write_text("2")
    assert origin.commit() == git("rev-parse", "--short=12", "HEAD").strip()
    module.write_text("changed")
    assert origin.commit().endswith("with local changes")


def test_time_with_two_stages_side_by_side_counts_once(tmp_path: Path) -> None:
    assert provenance.wall_seconds(tmp_path) == 0
    for name, seconds, ended in (("c", 60, "02:00"), ("b", 50, "01:30"), ("a", 30, "00:30"), ("d", 10, "04:00")):
        record = {"seconds": seconds, "ended": f"2026-11-27T10:{ended}.000+00:00"}
        write_json(tmp_path / "stages" / f"{name}.json", record)
    (tmp_path / "stages" / "._a.json").write_bytes(b"\0\5\x16\7")  # a Mac's, on a disk that is not its own
    assert list(provenance.stage_seconds(tmp_path)) == ["a", "b", "c", "d"]
    assert provenance.wall_seconds(tmp_path) == 30 + 80 + 10
    write_json(tmp_path / "stages" / "old.json", {"seconds": 5})  # noted before times were
    assert provenance.wall_seconds(tmp_path) == 125
