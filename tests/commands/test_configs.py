"""Configs by their names: where they are looked for, what is near a wrong one, and copies to be edited."""

from pathlib import Path

import pytest
import yaml

from unclip_pl import settings
from unclip_pl.cli import main
from unclip_pl.commands.configs import copy, listing
from unclip_pl.commands.plan import Recipe, Stage
from unclip_pl.commands.reproduce import reproduce
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.settings import PROMPTS, find, shipped_configs


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_is_tried_as_written_then_in_configs_then_in_the_package(tmp_path: Path) -> None:
    names = ("prior/tiny.yaml", "configs/prior/tiny.yaml", "./configs/prior/tiny.yaml")
    for name in names:
        assert find(name) == settings.SHIPPED / "configs/prior/tiny.yaml"
    own = tmp_path / "configs" / "prior" / "tiny.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    for name in names:
        assert find(name).resolve() == own
    nearest = tmp_path / "prior" / "tiny.yaml"
    nearest.parent.mkdir()
    nearest.touch()
    assert find("prior/tiny.yaml").resolve() == nearest
    assert find("nowhere.yaml") == Path("nowhere.yaml")
    assert find("shapes.txt", PROMPTS) == find("data/prompts/shapes.txt", PROMPTS)
    assert find("shapes.txt", PROMPTS).is_file()


@pytest.mark.parametrize("words", [["--config", "prior/tiny.yaml"], ["--config=configs/prior/tiny.yaml"]])
def test_the_command_line_takes_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *words, "--config", "trainer/ddp.yaml", "--data", "data/shapes.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"].endswith("UnclipDataModule")  # named relative to the config
    assert printed["trainer"]["strategy"] == "ddp"


def test_a_file_that_is_written_is_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--config", "compare/tiny.yaml", "--model.init_args.out", "prior/tiny.yaml", "--print_config"]
    assert main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["out"] == "prior/tiny.yaml"


@pytest.mark.parametrize("words", [["fit", "--config", "priors/tiny.yaml"], ["fit", "--model=configs/prior/tyni.yaml"]])
def test_an_unknown_name_gets_the_nearest(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No config at" in said
    assert "perhaps prior/tiny.yaml or" in said


def test_recipes_take_names(tmp_path: Path) -> None:
    stages = {"fit": Stage("fit --config base/few.yaml --config configs/base/fit.yaml", "{run}/fit")}
    recipe = Recipe(stages, {"{run}": str(tmp_path), "{source}": "", "{precision}": "32-true"})
    assert recipe.reason("fit") == "it has not run yet"
    written_out = {"fit": Stage(f"fit --config {find('base/few.yaml')} --config {find('base/fit.yaml')}", "{run}/fit")}
    full = Recipe(written_out, recipe.places)
    assert list(recipe.configs("fit").values()) == list(full.configs("fit").values())
    with pytest.raises(MissingFileError, match=r"perhaps compare/tiny\.yaml"):
        reproduce(stages, str(tmp_path / "run"), "{run}/data", compare="compare/tinny.yaml")
    assert not (tmp_path / "run").exists()


def test_every_config_is_listed_with_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    listing()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert all(len(line.split()) > 3 for line in lines)


def test_copies_bring_their_sections_along(tmp_path: Path) -> None:
    copy(["configs", "prior/tiny.yaml"])
    copied = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.yaml")}
    assert copied == {"configs/prior/tiny.yaml", "configs/data/shapes.yaml"}
    assert settings.read_yaml(Path("configs/prior/tiny.yaml")) == settings.read_yaml(
        shipped_configs()["prior/tiny.yaml"]
    )
    copy(["all"])
    names = {path.relative_to("all").as_posix(): path.read_text() for path in Path("all").rglob("*.yaml")}
    assert names == {name: path.read_text() for name, path in shipped_configs().items()}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "Expected a folder. Got none"),
        (["new", "prior/tiny.yaml", "prior/tiniest.yaml"], r"perhaps prior/tiny\.yaml"),
        (["old", "compare/tiny.yaml"], "data/quickstart.yaml exists already: remove it"),
    ],
)
def test_bad_copies_write_nothing(names: list[str], said: str, tmp_path: Path) -> None:
    copy(["old", "data/quickstart.yaml"])
    with pytest.raises(InputError, match=said):
        copy(names)
    assert list(tmp_path.rglob("*.yaml")) == [tmp_path / "old/data/quickstart.yaml"]
