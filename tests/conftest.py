"""One miniature run of the whole recipe, made once and shared by every test that needs trained parts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from unclip_pl.commands.reproduce import Stage, reproduce

ROOT = Path(__file__).parent.parent
#: What makes the quickstart's recipe a matter of seconds: nothing but sizes.
SHRINK = {
    "data": "--train 96 --val 16 --heldout 24",
    "fit": (
        "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 16 "
        "--trainer.enable_model_summary false"
    ),
    "test": (
        "--model.init_args.captions 8 --model.init_args.diversity_captions 2 --model.init_args.diversity_samples 2 "
        "--model.init_args.grid_rows 2 --model.init_args.resamples 20"
    ),
}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name each other relative to the project's root."""
    monkeypatch.chdir(ROOT)


def mini_stages() -> dict[str, Stage]:
    """The stages of configs/reproduce/shapes.yaml, shrunk."""
    recipe = yaml.safe_load((ROOT / "configs/reproduce/shapes.yaml").read_text())
    stages = {}
    for name, stage in recipe["stages"].items():
        extra = SHRINK.get(name) or SHRINK.get(stage["run"].split()[0], "")
        stages[name] = Stage(f"{stage['run']} {extra}", stage.get("needs", []))
    return stages


@pytest.fixture(scope="session")
def mini_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a finished run: useless pictures, every file in its place."""
    here = os.getcwd()
    os.chdir(ROOT)
    run = tmp_path_factory.mktemp("runs") / "mini"
    try:
        reproduce(mini_stages(), str(run), compare="configs/compare/tiny.yaml")
        yield run
    finally:
        os.chdir(here)
