import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from unclip_pl.__main__ import main
from unclip_pl.commands import launch
from unclip_pl.commands import reproduce as module
from unclip_pl.commands.plan import Stage, write_out
from unclip_pl.commands.reproduce import precision, reproduce
from unclip_pl.errors import InputError
from unclip_pl.files import alone, write_json
from unclip_pl.generation.provenance import PROFILE, stage_profiles, stage_records

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals")


def test_specs_of_upsamplers_reach_the_runs_description_as_plain_data() -> None:
    """The parser would build a solver that stands under ``class_path``, which no JSON holds."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(reproduce)
    recipe = yaml.safe_load(Path("configs/reproduce/emoji-64px.yaml").read_text())
    parsed = parser.instantiate_classes(parser.parse_object(recipe))
    described = module.describe_run(parsed.compare, parsed.upsamplers)
    assert described["decoder"]["init_args"]["upsamplers"] == recipe["upsamplers"]


class Journal:
    """Stands in for a stage's process: notes what was asked, and leaves what a stage leaves."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.asked: list[str] = []
        self.fails = ""
        self.status = 0

    def __call__(self, words: list[str], *_: object) -> "Journal":
        out = Path(words[words.index("--out") + 1])
        self.asked.append(out.stem)
        self.status = 130 if out.stem == self.fails else 0
        if self.status:
            return self
        if out.suffix == ".json":
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("{}")
            out.with_suffix(".yaml").write_text("lr: 1")
        else:
            out.mkdir(parents=True, exist_ok=True)
        return self

    def poll(self) -> int:
        return self.status


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal = Journal(tmp_path / "run")
    monkeypatch.setattr(module, "Process", journal)
    monkeypatch.setattr(module, "PAUSE", 0)
    return journal


def make(name: str, options: str = "", needs: list[str] | None = None, **matrix: list[object]) -> Stage:
    """A stage that makes a folder of the run."""
    return Stage(f"make --out {{out}} {options}", f"{{run}}/{name}", needs or [], matrix)


def chain(**options: str) -> dict[str, Stage]:
    """a → b → c, and d beside them."""
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": []}
    return {name: make(name, options.get(name, ""), needs[name]) for name in needs}


def test_a_finished_stage_is_skipped(journal: Journal) -> None:
    for _ in range(2):
        reproduce(chain(), str(journal.run))
    assert journal.asked == ["a", "b", "c", "d"]


def test_an_interrupted_stage_goes_on(journal: Journal) -> None:
    journal.fails = "c"
    with pytest.raises(SystemExit) as stop:
        reproduce(chain(), str(journal.run))
    assert stop.value.code == 130
    journal.fails = ""
    reproduce(chain(), str(journal.run))
    assert journal.asked == ["a", "b", "c", "c", "d"]
    records = stage_records(journal.run)
    assert set(records) == set("abcd")
    for record in records.values():
        assert record["done"]
        assert record["threads"] == torch.get_num_threads()
        assert [re.fullmatch("[0-9a-f]{12}( with local changes)?|unknown", commit) for commit in record["commits"]]
        assert len(record["commits"]) == 1


def test_the_profile_of_a_fit_is_noted(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "poll", lambda self: write_json(self.run / "a" / PROFILE, {"mfu": 0.3}) or 0)
    reproduce(chain(), str(journal.run))
    assert stage_profiles(journal.run) == {"a": {"mfu": 0.3}}


def test_a_study_that_was_cut_has_its_claims(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("claims: []")
    journal.fails = "a"
    with pytest.raises(SystemExit):
        reproduce(chain(), str(journal.run), results=str(tmp_path / "kept"), claims=str(tmp_path / "mine.yaml"))
    assert (tmp_path / "kept" / "claims.yaml").read_text() == "claims: []"


def test_a_changed_stage_takes_what_depends_on_it_along_and_nothing_else(journal: Journal) -> None:
    reproduce(chain(), str(journal.run))
    (journal.run / "b" / "precious").touch()
    journal.asked.clear()
    reproduce(chain(b="--lr 2"), str(journal.run))
    assert journal.asked == ["b", "c"]
    assert list((journal.run / "replaced").glob("b-*/precious"))  # nothing that was whole is lost


def test_what_is_set_aside_in_one_second_is_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders of one name."""
    monkeypatch.setattr(time, "strftime", lambda *_: "20261128-110000")
    for number in range(2):
        (tmp_path / f"a/{number}/cell").mkdir(parents=True)
        (tmp_path / f"a/{number}/cell/made").write_text(str(number))
        (tmp_path / f"a/{number}/cell.json").write_text(str(number))
        for name in ("cell", "cell.json"):
            module._set_aside(tmp_path, tmp_path / "a" / str(number) / name)
    for found in ("cell-*/made", "cell.json-*"):
        assert sorted(path.read_text() for path in (tmp_path / "replaced").glob(found)) == ["0", "1"]


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
    stages = chain() | {"e": make("e", "--source {source} --run {run}", ["a"])}
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
    stages = {"a": make("a", "--precision {precision}")}
    for able, expected in (({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({}, "32-true")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert precision() == expected
        reproduce(stages, str(journal.run))
    assert journal.asked == ["a"]
    assert stage_records(journal.run)["a"]["precision"] == "bf16-mixed"


def test_shards_that_changed_and_names_with_braces_and_spaces(journal: Journal, tmp_path: Path) -> None:
    folder = tmp_path / "my shards"
    folder.mkdir()
    for i in range(2):
        (folder / f"train-{i}.tar").write_bytes(bytes(10240))
    stages = {"a": make("a", "--source {source}"), "b": make("b", needs=["a"]), "c": make("c")}
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
    stages = {"a": make("a", f"--config {outer}")}
    inner.write_text("batch_size: 2")
    for layout in ("data: inner.yaml\nlr: 1", "# a comment\nlr:   1\ndata: inner.yaml"):
        outer.write_text(layout)
        reproduce(stages, str(journal.run))
    assert journal.asked == ["a"]
    inner.write_text("batch_size: 3")
    reproduce(stages, str(journal.run))
    assert journal.asked == ["a", "a"]


def test_words_in_braces_stand_in_configs_too(journal: Journal, tmp_path: Path) -> None:
    shared = tmp_path / "shared.yaml"
    shared.write_text("out: '{out}'\nseed: '{seed}'\nstore: '{run}/store'")
    stages = {"fit": make("fit-{seed}", f"--config {shared}", seed=[3])}
    reproduce(stages, str(journal.run))
    copy = journal.run / "stages" / "fit-3.shared.yaml"
    filled = {"out": f"{journal.run}/fit-3", "seed": "3", "store": f"{journal.run}/store"}
    assert yaml.safe_load(copy.read_text()) == filled
    journal.run.rename(tmp_path / "elsewhere")
    reproduce(stages, str(tmp_path / "elsewhere"))
    assert journal.asked == ["fit-3"]
    shared.write_text("out: '{out}'\nseed: '1{seed}'")
    reproduce(stages, str(tmp_path / "elsewhere"))
    assert journal.asked == ["fit-3", "fit-3"]


def test_words_of_a_matrix_alone_are_filled_in_as_well(journal: Journal, tmp_path: Path) -> None:
    shared = tmp_path / "shared.yaml"
    shared.write_text("guidance: '{scale}'")
    reproduce({"fit": make("fit-{scale}", f"--config {shared}", scale=[1.5])}, str(journal.run))
    copy = journal.run / "stages" / "fit-1.5.shared.yaml"
    assert yaml.safe_load(copy.read_text()) == {"guidance": "1.5"}


def test_unknown_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="before it"):
        reproduce({"a": make("a", needs=["z"])}, str(tmp_path))


def test_a_stage_writes_what_it_declares(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        reproduce({"a": Stage("make --out {run}/b", "{run}/a")}, str(journal.run))
    assert stop.value.code == 1
    assert "correct its `out:`" in capsys.readouterr().err
    assert not stage_records(journal.run)["a"]["done"]


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


# What would run, and what may run.


def test_a_source_at_an_address_stays_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_read_through", lambda *_: "")
    stages = {"a": make("a", "--source {source}")}
    reproduce(stages, str(journal.run), "s3://bucket/emoji", dry_run=True)
    assert "--source s3://bucket/emoji" in capsys.readouterr().out


def test_a_dry_run_says_what_would_run_and_why_and_writes_nothing(
    journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce(chain(), str(journal.run), dry_run=True)
    assert "[1/4] a: would run, since it has not run yet: unclip make --out" in capsys.readouterr().out
    assert not journal.run.exists()
    reproduce(chain(), str(journal.run))
    capsys.readouterr()
    reproduce(chain(), str(journal.run), dry_run=True)
    assert capsys.readouterr().out.splitlines()[-1] == "Nothing is to be done."
    before = {path: path.stat().st_mtime_ns for path in journal.run.rglob("*")}
    shutil.rmtree(journal.run / "d")
    reproduce(chain(b="--lr 2"), str(journal.run), dry_run=True)
    said = capsys.readouterr().out
    assert "b: would run, since its command has changed" in said
    assert "c: would run, since a config, or a stage before it, has changed" in said
    assert "d: would run, since" in said
    assert "d is not there" in said
    assert "3 of 4 stages would run." in said
    assert {path: path.stat().st_mtime_ns for path in journal.run.rglob("*")} == before.__class__(
        (path, stamp) for path, stamp in before.items() if path.name != "d"
    )
    assert journal.asked == ["a", "b", "c", "d"]


def test_one_stage_alone(journal: Journal) -> None:
    stages = chain() | {"e": make("e-{seed}", seed=[1, 2])}
    with pytest.raises(InputError, match=r"needs a, not done yet"):
        reproduce(stages, str(journal.run), only="b")
    with pytest.raises(InputError, match=r"one of the stages a, b, c, d, e\. Got 'z'"):
        reproduce(stages, str(journal.run), only="z")
    for only in ("a", "b", "b", "e-2", "e"):
        reproduce(stages, str(journal.run), only=only)
    assert journal.asked == ["a", "b", "e-2", "e-1"]


def test_a_second_process_on_one_run_or_study_is_refused(journal: Journal, tmp_path: Path) -> None:
    for folder in (journal.run, tmp_path / "results"):
        (folder / "stages").mkdir(parents=True)
        with alone(folder / "stages" / ".lock"), pytest.raises(InputError, match=f"works on {folder}"):
            reproduce(chain(), str(journal.run), results=str(tmp_path / "results"))
    assert not journal.asked
    reproduce(chain(), str(journal.run))


# Studies.


def rematch(journal: Journal, results: Path, **options: str) -> None:
    """Two trainings of two seeds each, a choice between them, a cell for every one."""
    both = {"kind": ["a", "b"], "seed": [0, 1]}
    stages = {
        "fit": make("fit-{kind}-{seed}", **both),
        "choice": Stage(f"make {options.get('choice', '')} --out {{out}}", "{results}/best/a.json", ["fit"]),
        "again": make("again-{seed}", "--config {results}/best/a.yaml", ["choice"], seed=[0, 1]),
        "cell": Stage("make --out {out}", "{results}/cells/{kind}-{seed}.json", ["fit"], both),
        "best": Stage("make --out {out}", "{results}/cells/best-{seed}.json", ["again"], {"seed": [0, 1]}),
    }
    reproduce(stages, str(journal.run), results=str(results))


@pytest.fixture
def study(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the results; nothing is drawn of them."""
    monkeypatch.setattr(module, "report", lambda *_: None)
    return tmp_path / "results"


def test_a_matrix_is_one_stage_for_each_combination(journal: Journal, study: Path) -> None:
    rematch(journal, study)
    # A training is measured at once, since a study may be cut.
    trained = ["fit-a-0", "a-0", "fit-a-1", "a-1", "fit-b-0", "b-0", "fit-b-1"]
    assert journal.asked == [*trained, "a", "b-1", "again-0", "best-0", "again-1", "best-1"]
    records = [path.read_text() for path in (study / "stages").glob("*.json")]
    assert len(records) == 7
    assert not [record for record in records if str(study.parent) in record]  # to be committed
    journal.asked.clear()
    rematch(journal, study)
    assert not journal.asked


def test_a_stage_needs_one_combination_by_its_name_or_those_that_agree() -> None:
    stages = {
        "try": Stage("a {lr} {seed}", "", matrix={"lr": ["0.1", "0.2"], "seed": [0]}),
        "x": Stage("b {seed}", "", ["try-0.2-0"], {"seed": [1, 2]}),
        "y": Stage("c {seed}", "", ["try"], {"seed": [1, 2]}),
        "cell": Stage("d {prior} {seed}", "{prior}", ["{prior}-{seed}", "try"], {"prior": ["x", "y"], "seed": [1, 2]}),
    }
    written = write_out(stages)
    assert [written[name].needs for name in ("x-1", "y-2")] == [["try-0.2-0"], []]  # of another seed
    assert [written[f"cell-{name}"].needs for name in ("x-1", "y-2")] == [["x-1"], ["y-2"]]
    assert (written["cell-y-1"].run, written["cell-y-1"].out) == ("d y 1", "y")
    with pytest.raises(InputError, match="x-3"):
        write_out(stages | {"late": Stage("e", "", ["x-3"])})
    with pytest.raises(InputError, match="itself"):
        write_out({"itself": Stage("e", "", ["itself"])})


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
    assert journal.asked == ["a", "again-0", "best-0", "again-1", "best-1"]


def test_of_a_base_counts_what_is_named(journal: Journal, tmp_path: Path) -> None:
    """So that a study can begin while the base's last stages run."""
    base, config = tmp_path / "base", tmp_path / "data.yaml"
    write_json(base / "run.json", {})
    config.write_text("store: '{base}/codec.safetensors'")
    stages = {
        "file": make("file", "{base}/codec.safetensors"),
        "config": make("config", f"--config {config}"),
        "folder": make("folder", "{base}/clip/checkpoints/last.ckpt"),
        "all": make("all", "--run {base}"),
    }
    for made, asked in (
        ({"clip": 1, "codec": 1}, ["file", "config", "folder", "all"]),
        ({"clip": 1, "codec": 1, "decoder": 1}, ["all"]),
        ({"codec": 2}, ["file", "config", "all"]),
    ):
        for name, stamp in made.items():
            out = "{run}/codec.safetensors" if name == "codec" else f"{{run}}/{name}"
            write_json(base / "stages" / f"{name}.json", {"stamp": stamp, "out": out})
        journal.asked.clear()
        reproduce(stages, str(journal.run), base=str(base))
        assert journal.asked == asked


def test_a_run_to_build_on_is_made_where_there_is_none_and_it_is_needed(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, results = tmp_path / "base", tmp_path / "results"
    stages = {"cell": Stage("make --out {out} --run {base}", "{results}/cells/a.json"), "own": make("own")}
    with pytest.raises(FileNotFoundError, match="base_recipe"):
        reproduce(stages, str(journal.run), base=str(base), results=str(results), dry_run=True)
    options = {"base": str(base), "base_recipe": "long.yaml", "results": str(results)}
    reproduce(stages, str(journal.run), dry_run=True, **options)
    assert f"unclip reproduce --config long.yaml --run {base}" in capsys.readouterr().out
    write_json(base / "run.json", {})
    reproduce(stages, str(journal.run), only="cell", dry_run=True, **options)
    assert "1 of 3 stages would run" in capsys.readouterr().out
    with pytest.raises(InputError, match="rename it"):
        reproduce({"base": make("base")}, str(journal.run), base=str(base))


def test_a_base_may_be_a_file(journal: Journal, study: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "base.zip"
    bundle.write_text("1")
    stages = {"cell": Stage("make --out {out} --run {base}", "{results}/cells/c.json"), "fit": make("fit", "{base}/x")}
    options = {"base": str(bundle), "results": str(study)}

    def unpacked(words: list[str], *rest: object) -> Journal:
        return journal(["make", "--out", words[2]] if words[0] == "unbundle" else words, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Process", unpacked)
        for content, asked in (("1", ["base", "c", "fit"]), ("1", []), ("2", ["base", "fit"])):
            bundle.write_text(content)
            journal.asked.clear()
            reproduce(stages, str(journal.run), **options)
            assert journal.asked == asked
        shutil.rmtree(journal.run)
        (study / "cells" / "c.json").unlink()
        journal.asked.clear()
        reproduce(stages, str(journal.run), only="base", **options)
        reproduce(stages, str(journal.run), only="cell", **options)
    assert journal.asked == ["base", "c"]


# Processes.

#: A stage's program, quick to start: it says and does what its options ask for.
STUB = """
import os, sys, time
from pathlib import Path
words = sys.argv[1:]
options = dict(zip(words[1::2], words[2::2]))
out = Path(options["--out"])
print("reading\\rread all", file=sys.stderr, flush=True)
print("an umlaut: \\u00fc", flush=True)
with open(out.parent / "started", "a") as file:
    print(out.name, os.environ.get("OMP_NUM_THREADS"), file=file)
if "--fails" in options:
    print("error: Expected sense. Got none: think.", file=sys.stderr)
    sys.exit(int(options["--fails"]))
try:
    end = time.monotonic() + 60
    while "--beside" in options and not (out.parent / "started").read_text().count(options["--beside"]):
        assert time.monotonic() < end
        time.sleep(0.02)
    if "--sleeps" in options and not (out.parent / "told").exists():
        (out.parent / "told").touch()
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted.", file=sys.stderr)
    sys.exit(130)
out.mkdir()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes the command line of a recipe whose stages are done by the stub."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, str(tmp_path / "stub.py")))
    for name in ("UNCLIP_STAGE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def recipe(stages: dict[str, Stage], *words: str) -> list[str]:
        content = {name: vars(stage) for name, stage in stages.items()}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": content}))
        return ["reproduce", "--config", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run"), *words]

    return recipe


def test_a_stage_looks_as_when_typed_and_leaves_a_log(
    stub: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(stub({"a": make("a"), "b": make("b", "--fails 7"), "c": make("c", needs=["b"])})) == 7
    said = capsys.readouterr()
    assert "an umlaut: ü\n" in said.out
    assert "reading\rread all\n" in said.err
    assert "error: Expected sense. Got none: think.\n" in said.err
    assert "Stage 'b' ended with status 7; its output:" in said.err
    assert said.err.splitlines()[-1].startswith("Run the same command again")
    log = (tmp_path / "run/stages/a.log").read_text(encoding="utf-8")
    assert sorted(log.splitlines()) == ["an umlaut: ü", "read all"]  # the bar as it was in the end
    records = stage_records(tmp_path / "run")
    assert [records[name]["done"] for name in ("a", "b")] == [True, False]
    assert "c" not in records


def test_stages_run_side_by_side_with_their_share_of_the_threads(
    stub: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = {"a": make("a", "--beside b"), "b": make("b", "--beside a"), "c": make("c", needs=["a"])}
    stages |= {"d": make("d", needs=["b", "c"])}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert main(stub(stages, "--jobs", "2")) == 0
    said = capsys.readouterr()
    assert {line for line in said.err.splitlines() if line} == {f"[{name}] read all" for name in "abcd"}
    assert sorted((tmp_path / "run/started").read_text().split()) == ["2", "2", "2", "4", "a", "b", "c", "d"]
    threads = {name: record["threads"] for name, record in stage_records(tmp_path / "run").items()}
    assert threads == {"a": 2, "b": 2, "c": 2, "d": 4}  # c could run beside b; nothing could beside d


def test_a_failure_beside_others_lets_them_end_and_starts_no_more(
    stub: Callable[..., list[str]], tmp_path: Path
) -> None:
    stages = {"a": make("a", "--beside b --fails 3"), "b": make("b", "--beside a"), "c": make("c")}
    assert main(stub(stages, "--jobs", "2")) == 3
    assert {name: record["done"] for name, record in stage_records(tmp_path / "run").items()} == {"a": False, "b": True}


def once(path: Path, then: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_and_the_same_command_goes_on(
    stub: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    words = stub({"a": make("a"), "b": make("b", "--sleeps 1"), "c": make("c", needs=["b"])})
    once(tmp_path / "run/told", lambda: os.kill(os.getpid(), number))
    assert main(words) == 128 + number
    assert ("interrupted." in capsys.readouterr().err) == (number == signal.SIGINT)
    assert not stage_records(tmp_path / "run")["b"]["done"]
    assert main(words) == 0
    assert (tmp_path / "run/started").read_text().split()[::2] == ["a", "b", "b", "c"]


@POSIX
def test_a_killed_reproduce_takes_its_stage_along_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    content = {"run": str(run), "stages": {"data": vars(Stage("pack shapes --out {out} --train 40000", "{run}/data"))}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    line = [sys.executable, "-m", "unclip_pl", "reproduce", "--config", str(tmp_path / "recipe.yaml")]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    once(run / "data", first.kill).join(120)
    assert first.wait() == -signal.SIGKILL
    with alone(run / "stages" / ".data.lock"):  # the stage has ended too
        assert not stage_records(run)["data"]["done"]
        assert not list((run / "data").glob(".*"))
        assert len(list((run / "data").glob("train-*.tar"))) < 4
    content["stages"]["data"]["run"] = "pack shapes --out {out} --train 40"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert stage_records(run)["data"]["done"]


def test_a_fit_on_two_processes_leaves_the_other_stages_to_one(
    small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNCLIP_STAGE", raising=False)
    words = ["fit", *small("prior", tmp_path / "run/fit"), "--trainer.logger.init_args.name", "''"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    words += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    stages = {
        "fit": Stage(" ".join(words), "{run}/fit"),
        "data": Stage("pack shapes --out {out} --train 8 --val 0 --heldout 0", "{run}/data", ["fit"]),
    }
    reproduce(stages, str(tmp_path / "run"))
    logs = {name: (tmp_path / f"run/stages/{name}.log").read_text() for name in stages}
    assert "MEMBER: 2/2" in logs["fit"]
    assert logs["data"].count("image(s) in") == 1
    assert not (tmp_path / "run/replaced").exists()
    assert all(record["done"] for record in stage_records(tmp_path / "run").values())


def test_a_recipe_that_makes_shards_leaves_those_of_the_user_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train-000000.tar").write_bytes(b"")
    stages = {"data": Stage("pack shapes --out {out}", "{source}")}
    with pytest.raises(InputError, match=r"makes its own shards.*leave --source out"):
        reproduce(stages, str(tmp_path / "run"), str(mine))
    assert (mine / "train-000000.tar").is_file()
