import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from unclip_pl.commands import reproduce as module
from unclip_pl.commands.plan import Stage, spell_out, write_out
from unclip_pl.commands.reproduce import precision, reproduce


class Journal:
    """Stands in for the command line: notes what was asked and leaves what a stage leaves."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.asked: list[str] = []
        self.fails = ""

    def __call__(self, words: list[str]) -> None:
        name = words[words.index("--out") + 1]
        self.asked.append(name)
        if name == self.fails:
            raise KeyboardInterrupt
        (self.run / name).mkdir(parents=True, exist_ok=True)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal = Journal(tmp_path / "run")
    monkeypatch.setattr(module, "dispatch", journal)
    return journal


def chain(**options: str) -> dict[str, Stage]:
    """a → b → c, and d beside them."""
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": []}
    return {name: Stage(f"make --out {name} {options.get(name, '')}", needs[name]) for name in needs}


def test_a_finished_stage_is_skipped(journal: Journal) -> None:
    for _ in range(2):
        reproduce(chain(), str(journal.run))
    assert journal.asked == ["a", "b", "c", "d"]


def test_an_interrupted_stage_goes_on(journal: Journal) -> None:
    journal.fails = "c"
    with pytest.raises(KeyboardInterrupt):
        reproduce(chain(), str(journal.run))
    journal.fails = ""
    reproduce(chain(), str(journal.run))
    assert journal.asked == ["a", "b", "c", "c", "d"]
    records = json.loads((journal.run / "stages.json").read_text()).values()
    assert all(record["done"] for record in records)
    assert all(re.match("[0-9a-f]{12}|unknown", commit) for record in records for commit in record["commits"])
    assert all(len(record["commits"]) == 1 for record in records)


def test_a_changed_stage_takes_what_depends_on_it_along_and_nothing_else(journal: Journal) -> None:
    reproduce(chain(), str(journal.run))
    (journal.run / "b" / "precious").touch()
    journal.asked.clear()
    reproduce(chain(b="--lr 2"), str(journal.run))
    assert journal.asked == ["b", "c"]
    assert list((journal.run / "replaced").glob("b-*/precious"))  # nothing that was whole is lost


def test_what_was_deleted_is_made_again_with_what_was_made_of_it(journal: Journal) -> None:
    for deleted, asked in (("d", ["d"]), ("b", ["b", "c"])):
        reproduce(chain(), str(journal.run))
        journal.asked.clear()
        (journal.run / deleted).rmdir()
        reproduce(chain(), str(journal.run))
        assert journal.asked == asked


def test_how_a_folder_is_written_changes_nothing_nor_where_it_lies(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = chain() | {"e": Stage("make --out e --source {source} --run {run}", ["a"])}
    monkeypatch.chdir(tmp_path)
    for run in (journal.run, f"{journal.run}/", "run", "./run"):
        reproduce(stages, str(run), "{run}/data/")
    journal.run.rename(tmp_path / "elsewhere")
    reproduce(stages, "elsewhere", "{run}/data")
    assert journal.asked == ["a", "b", "c", "d", "e"]
    assert not list(tmp_path.glob("*/replaced"))


def test_precision_is_the_machines_and_another_machine_does_nothing_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stages = {"a": Stage("make --out a --precision {precision}")}
    for able, expected in (({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({}, "32-true")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert precision() == expected
        reproduce(stages, str(journal.run))
    assert journal.asked == ["a"]
    assert json.loads((journal.run / "stages.json").read_text())["a"]["command"][-1] == "bf16-mixed"


def test_shards_that_changed_and_names_with_braces_and_spaces(journal: Journal, tmp_path: Path) -> None:
    folder = tmp_path / "my shards"
    folder.mkdir()
    for i in range(2):
        (folder / f"train-{i}.tar").write_bytes(bytes(10240))
    stages = {
        "a": Stage("make --out a --source {source}"),
        "b": Stage("make --out b", ["a"]),
        "c": Stage("make --out c"),
    }
    source = str(folder / "train-{0..1}.tar")
    for _ in range(2):
        reproduce(stages, str(journal.run), source)
    assert journal.asked == ["a", "b", "c"]
    journal.asked.clear()
    for _ in range(2):
        os.utime(folder / "train-0.tar")  # a copy, the same bytes
        reproduce(stages, str(journal.run), source)
    assert not journal.asked
    (folder / "train-1.tar").write_bytes(bytes([0] * 10239 + [1]))
    reproduce(stages, str(journal.run), source)
    assert journal.asked == ["a", "b"]


def test_comments_do_not_count_but_included_files_do(journal: Journal, tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer.yaml", tmp_path / "inner.yaml"
    stages = {"a": Stage(f"make --out a --config {outer}")}
    inner.write_text("batch_size: 2")
    for layout in ("data: inner.yaml\nlr: 1", "# a comment\nlr:   1\ndata: inner.yaml"):
        outer.write_text(layout)
        reproduce(stages, str(journal.run))
    assert journal.asked == ["a"]
    inner.write_text("batch_size: 3")
    reproduce(stages, str(journal.run))
    assert journal.asked == ["a", "a"]


def test_unknown_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stand before it"):
        reproduce({"a": Stage("make", ["z"])}, str(tmp_path))


def test_the_whole_recipe_leaves_a_run_and_a_report(mini_run: Path) -> None:
    report = json.loads((mini_run / "report.json").read_text())
    assert set(report["priors"]) == {"diffusion", "ar", "linear", "text", "ceiling"}
    assert set(report["oracle"]["real"]) == {"shape", "color", "size", "position", "background"}
    assert min(report["oracle"]["real"].values()) == 1.0  # 8 renders, read exactly
    for prior in report["priors"].values():
        for name in ("stated_match", "embed_fd", "fd_judge", "cos_true"):
            interval = prior["metrics"][name]
            assert interval["low"] <= interval["mean"] <= interval["high"], name
    assert (mini_run / "report.html").stat().st_size > 10_000
    assert (mini_run / "report.md").is_file()
    assert set(report["meta"]["stages"]) >= {"data", "clip", "judge", "store", "prior", "ar_prior", "decoder"}
    assert json.loads((mini_run / "run.json").read_text())["store"] == "store"


def rematch(journal: Journal, results: Path, **options: str) -> None:
    """Two trainings of two seeds each, a choice between them, a cell for every one."""
    stages = {
        "fit": Stage("make --out fit-{kind}-{seed}", matrix={"kind": ["a", "b"], "seed": [0, 1]}),
        "choice": Stage(f"make {options.get('choice', '')} --out {{results}}/best/a.json", ["fit"]),
        "again": Stage("make --out again-{seed} --config {results}/best/a.yaml", ["choice"], {"seed": [0, 1]}),
        "cell": Stage("make --out {results}/cells/{kind}-{seed}.json", ["fit"], {"kind": ["a", "b"], "seed": [0, 1]}),
        "best": Stage("make --out {results}/cells/best-{seed}.json", ["again"], {"seed": [0, 1]}),
    }
    reproduce(stages, str(journal.run), results=str(results))


@pytest.fixture
def study(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the results; stages that keep a file leave it there."""
    monkeypatch.setattr(module, "render_study", lambda folder: {})
    monkeypatch.setattr(module, "log_study", lambda report, folder: None)
    monkeypatch.setattr(module, "print_study", lambda folder, report: None)

    def make(words: list[str]) -> None:
        out = Path(words[words.index("--out") + 1])
        journal.asked.append(out.stem)
        if out.suffix == ".json":
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("{}")
            out.with_suffix(".yaml").write_text("lr: 1")
        else:
            (journal.run / out).mkdir(parents=True)

    monkeypatch.setattr(module, "dispatch", make)
    return tmp_path / "results"


FITS = ["fit-a-0", "fit-a-1", "fit-b-0", "fit-b-1"]
CELLS = ["a-0", "a-1", "b-0", "b-1"]


def test_a_matrix_is_one_stage_for_each_combination(journal: Journal, study: Path) -> None:
    rematch(journal, study)
    assert journal.asked == [*FITS, "a", "again-0", "again-1", *CELLS, "best-0", "best-1"]
    assert str(study.parent) not in (study / "stages.json").read_text()  # to be committed
    journal.asked.clear()
    rematch(journal, study)
    assert not journal.asked


def test_a_stage_needs_one_combination_by_its_name_or_those_that_agree() -> None:
    stages = {
        "try": Stage("a {lr} {seed}", matrix={"lr": ["0.1", "0.2"], "seed": [0]}),
        "x": Stage("b {seed}", ["try-0.2-0"], {"seed": [1, 2]}),
        "y": Stage("c {seed}", ["try"], {"seed": [1, 2]}),
        "cell": Stage("d {prior} {seed}", ["{prior}-{seed}", "try"], {"prior": ["x", "y"], "seed": [1, 2]}),
    }
    written = write_out(stages)
    assert [written[name].needs for name in ("x-1", "y-2")] == [["try-0.2-0"], []]  # of another seed
    assert [written[f"cell-{name}"].needs for name in ("x-1", "y-2")] == [["x-1"], ["y-2"]]
    assert written["cell-y-1"].run == "d y 1"
    with pytest.raises(ValueError, match="x-3"):
        write_out(stages | {"late": Stage("e", ["x-3"])})
    with pytest.raises(ValueError, match="itself"):
        write_out({"itself": Stage("e", ["itself"])})


def test_words_that_commands_share_are_put_in_their_place() -> None:
    stages = {"a": Stage("{fit} a-{seed} {run}", ["b"], {"seed": [1]})}
    spelt = spell_out(stages, {"data": "--data {base}", "fit": "fit {data} --seed {seed}"})
    assert spelt == {"a": Stage("fit --data {base} --seed {seed} a-{seed} {run}", ["b"], {"seed": [1]})}


def test_measurements_survive_the_loss_of_the_run(journal: Journal, study: Path) -> None:
    rematch(journal, study)
    journal.asked.clear()
    shutil.rmtree(journal.run)
    rematch(journal, study)
    assert not journal.asked
    (study / "cells" / "b-1.json").unlink()  # a lost cell asks for its own training and no other
    rematch(journal, study)
    assert journal.asked == ["fit-b-1", "b-1"]


def test_a_choice_that_changes_takes_along_what_was_trained_by_it(journal: Journal, study: Path) -> None:
    rematch(journal, study)
    journal.asked.clear()
    rematch(journal, study, choice="--grid finer")
    assert journal.asked == ["a", "again-0", "again-1", "best-0", "best-1"]


def test_of_a_base_counts_what_is_named(journal: Journal, tmp_path: Path) -> None:
    """So that a study can begin while the base's last stages run."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "run.json").write_text("{}")
    stages = {
        "file": Stage("make --out file {base}/codec.safetensors"),
        "folder": Stage("make --out folder {base}/clip/checkpoints/last.ckpt"),
        "all": Stage("make --out all --run {base}"),
    }
    for made, asked in (
        (("clip", "codec"), ["file", "folder", "all"]),
        (("clip", "codec", "decoder"), ["all"]),
        (("clip", "decoder"), ["file", "all"]),
    ):
        (base / "stages.json").write_text(json.dumps({name: {"stamp": name} for name in made}))
        journal.asked.clear()
        reproduce(stages, str(journal.run), base=str(base))
        assert journal.asked == asked


def test_a_run_to_build_on_is_made_where_there_is_none(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = tmp_path / "base", []
    monkeypatch.setattr(module, "dispatch", asked.append)
    stages: dict[str, Stage] = {}
    with pytest.raises(FileNotFoundError, match="base_recipe"):
        reproduce(stages, str(journal.run), base=str(base))
    reproduce(stages, str(journal.run), base=str(base), base_recipe="long.yaml")
    assert asked == [["reproduce", "--config", "long.yaml", "--run", str(base)]]
    base.mkdir()
    (base / "run.json").write_text("{}")
    reproduce(stages, str(journal.run), base=str(base), base_recipe="long.yaml")
    assert len(asked) == 1
