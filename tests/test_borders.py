"""What other people's settings do: `~` in paths, keys that occur twice, options of Lightning's."""

import json
from pathlib import Path

import pytest

from unclip_pl.cli import main
from unclip_pl.errors import InputError
from unclip_pl.generation.run import name_run
from unclip_pl.settings import expanded, parse_yaml, read_yaml


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and, beside it, the current one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_home_is_found_at_the_beginning_of_paths(home: Path) -> None:
    assert expanded(["--out=~/a", "~/b-{000..3}.tar", "~"]) == [
        f"--out={home}/a",
        f"{home}/b-{{000..3}}.tar",
        f"{home}",
    ]
    assert expanded(["local-dir:~/c", "--x.y=local-dir:~/c"]) == [f"local-dir:{home}/c", f"--x.y=local-dir:{home}/c"]
    same = ["a ~ b", "x/~/y", "~~", "~5 apples", "--num=3", "a~/b"]
    assert expanded(same) == same
    assert expanded({"a": [{"b": "~/c"}], "d": 1}) == {"a": [{"b": f"{home}/c"}], "d": 1}
    assert name_run("~/run") == home / "run"


@pytest.mark.parametrize("way", ["option", "config", "recipe"])
def test_home_is_found_in_options_configs_and_recipes(way: str, home: Path) -> None:
    words = ["--train", "4", "--val", "2", "--heldout", "2"]
    if way == "option":
        assert main(["pack", "shapes", "--out=~/data", *words]) == 0
    elif way == "config":
        Path("own.yaml").write_text("out: ~/data\n")
        (home / "own.yaml").write_text("out: ~/data\n")
        assert main(["pack", "shapes", "--config=~/own.yaml", *words]) == 0
    else:
        command = f"pack shapes --config ~/c.yaml {' '.join(words)}"
        (home / "c.yaml").write_text("out: ~/data\n")
        Path("r.yaml").write_text(json.dumps({"run": "~/run", "stages": {"data": {"run": command, "out": "~/data"}}}))
        for _ in range(2):
            assert main(["reproduce", "--config", "r.yaml"]) == 0
        assert (home / "run" / "stages" / "data.json").is_file()
        assert not (home / "run" / "replaced").exists()
    assert list((home / "data").glob("train*.tar"))
    assert not Path("~").exists()


def test_a_key_that_occurs_twice_is_named_with_file_and_lines(tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text("a:\n  b: 1\n  c: [{d: 1}, {d: 2}]\n  b: 2\n")
    outer = tmp_path / "outer.yaml"
    outer.write_text("data: twice.yaml\n")
    for path in (twice, outer):
        with pytest.raises(InputError, match=r"twice.yaml once. Got 'b' in line 2 and again in line 4: remove"):
            read_yaml(path)
    merged = "x: &x {a: 1, b: 2}\ny: &y {<<: *x, a: 3}\nz: {<<: [*x, *y], b: 4}\n"
    assert parse_yaml(merged, "text")["z"] == {"a": 1, "b": 4}


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "configs/prior/tiny.yaml", "--config", "{twice}", "--print_config"],
        ["fit", "--config=configs/prior/tiny.yaml", "--trainer={twice}", "--print_config"],
        ["fit", "--config", "configs/prior/tiny.yaml", "--data={outer}", "--print_config"],
        ["fit", "--config", "configs/prior/tiny.yaml", "--trainer.logger", "{a: 1, a: 2}", "--print_config"],
        ["reproduce", "--config={outer}"],
        ["pack", "shapes", "--config", "{json}"],
    ],
)
def test_a_command_refuses_a_key_that_occurs_twice(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("twice.yaml", "max_steps: 7\nmax_steps: 5\n"), ("outer.yaml", "stages: twice.yaml\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "json").write_text('{"out": "a",\n "out": "b"}')
    paths = {"twice": tmp_path / "twice.yaml", "outer": tmp_path / "outer.yaml", "json": tmp_path / "json"}
    for name, path in paths.items():
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "once. Got" in said
    assert len(said.splitlines()) == 1


def test_a_config_that_names_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: b.yaml")
    (tmp_path / "b.yaml").write_text("net: a.yaml")
    with pytest.raises(InputError, match=r"a.yaml names itself \(.*a.yaml → .*b.yaml → .*a.yaml\): name another file"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("{net: c.yaml, other: c.yaml}")  # twice is fine
    (tmp_path / "c.yaml").write_text("width: 3")
    assert read_yaml(tmp_path / "a.yaml") == {"model": {"net": {"width": 3}, "other": {"width": 3}}}
