"""A table of runs: what their logs end with, what was measured, and what may be asked of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from unclip_pl.cli import main
from unclip_pl.errors import InputError
from unclip_pl.metrics.interval import mean_interval
from unclip_pl.origin import commit

CELL = Path(__file__).parents[2] / "results" / "rematch-shapes" / "cells" / "best-ar-1.json"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two trainings, one of them with a checkpoint and a stage's record, and a measurement."""
    folder = tmp_path / "study"
    for name, kind in (("ar-10", "ARPriorTask"), ("diffusion-2", "DiffusionPriorTask")):
        (folder / name / "checkpoints").mkdir(parents=True)
        config = {"model": {"class_path": f"unclip_pl.tasks.{kind}"}}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(str(folder / "ar-10")) as log:
        for step, value in ((0, 5.5), (20, 5.0)):
            log.add_scalar("val/loss", value, step)
    torch.save({"global_step": 1940}, folder / "ar-10" / "checkpoints" / "last.ckpt")
    noted = {"command": "unclip fit --config x.yaml", "commit": "ba9876543210"}
    (folder / "diffusion-2" / "command.json").write_text(json.dumps(noted))
    lines = ["step,train/loss,val/loss", "19,0.5,", "39,0.25,", "39,,nan"]
    (folder / "diffusion-2" / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "cells").mkdir()
    (folder / "cells" / CELL.name).write_text(CELL.read_text())
    (folder / "stages").mkdir()
    for name, out in (("ar-10", "{run}/ar-10"), ("cell", f"{{results}}/cells/{CELL.name}")):
        record = {"command": f"make {name}", "out": out, "commits": ["0123456789ab"]}
        (folder / "stages" / f"{name}.json").write_text(json.dumps(record))
    return folder


def rows(capsys: pytest.CaptureFixture[str], study: Path, *words: str) -> list[dict[str, object]]:
    assert main(["runs", str(study), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_are_what_was_logged_and_measured(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ar, cell, diffusion = rows(capsys, study)
    told = {"commit": "0123456789ab", "command": "unclip make ar-10"}
    assert ar == {"run": "ar-10", "part": "ARPrior", "val/loss": 5.0, "steps": 1940, **told}
    assert diffusion == {
        **{"run": "diffusion-2", "part": "DiffusionPrior", "steps": 39},
        **{"train/loss": 0.25, "val/loss": "nan"},  # JSON has no NaN
        **{"command": "unclip fit --config x.yaml", "commit": "ba9876543210"},
    }
    arm = json.loads(CELL.read_text())["arms"]["ar"]
    assert cell["command"] == "unclip make cell"
    assert cell["stated_match"] == pytest.approx(mean_interval(torch.tensor(arm["values"]["stated_match"])).mean)
    assert cell["embed_fd"] == pytest.approx(arm["resamples"]["embed_fd"][0])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no archive", lambda data: data[:-9]])
def test_a_damaged_checkpoint_leaves_the_step_of_the_log(
    damage: Callable[[bytes], bytes], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = study / "ar-10" / "checkpoints" / "last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    assert [row["steps"] for row in rows(capsys, study, "--where", "part=ARPrior")] == [20]


def test_rows_are_sorted_and_filtered_by_column(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*words: str) -> list[object]:
        return [row["run"] for row in rows(capsys, study, *words)]

    cell = f"cells/{CELL.name}"
    assert names("--sort", "steps") == ["diffusion-2", cell, "ar-10"]
    assert names("--sort", "steps", "--descending") == ["ar-10", cell, "diffusion-2"]
    assert names("--sort", "train/loss") == ["diffusion-2", "ar-10", cell]  # those without one come last
    assert names("--where", "part=*Prior, steps>100") == ["ar-10"]
    assert names("--where", "val/loss<=5") == ["ar-10"]
    assert names("--where", "steps>1e6") == []


def test_the_table_has_a_line_for_each_row(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(study), "--columns", "part,val/loss"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [["part", "val/loss"], ["ARPrior", "5"], ["ar", "–"], ["DiffusionPrior", "nan"]]
    assert main(["runs", str(study)]) == 0
    assert "unclip make ar-10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "No folder at nowhere"),
        (["docs"], "Expected runs below docs. Got none"),
        (["{study}", "--sort", "val/los"], "Got 'val/los': name val/loss"),
        (["{study}", "--columns", "run,stepps"], "Got 'stepps': name steps"),
        (["{study}", "--where", "part"], "write COLUMN=PATTERN"),
        (["{study}", "--where", "steps<many"], "Expected a number after <. Got 'many'"),
    ],
)
def test_bad_questions_are_one_line(
    words: list[str], said: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", *(word.format(study=study) for word in words)]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_broken_cell_is_named(study: Path) -> None:
    from unclip_pl.commands.runs import find_rows

    (study / "cells" / CELL.name).write_text("{")
    with pytest.raises(InputError, match=CELL.name):
        list(find_rows(study))


def test_a_fit_notes_its_command(
    mini_run: Path, tmp_path: Path, small: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = small("prior", tmp_path, "--trainer.max_steps", "1")
    assert main(["fit", *words, "--trainer.logger.init_args.name", "a b"]) == 0
    capsys.readouterr()
    (row,) = rows(capsys, tmp_path)
    assert row["part"] == "DiffusionPrior"
    assert str(row["command"]).startswith("unclip fit --config configs/prior/tiny.yaml --data.init_args.source ")
    assert "name 'a b'" in str(row["command"])
    assert row["commit"] == commit()
    assert row["steps"] == 1
