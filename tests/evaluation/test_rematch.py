"""The recipes of the rematch: what they hold, and one of them from end to end with nothing but sizes made small."""

import json
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from unclip_pl.cli import main
from unclip_pl.commands import reproduce as module
from unclip_pl.commands.plan import Recipe, Stage, write_out
from unclip_pl.commands.reproduce import reproduce
from unclip_pl.report.claims import UNMEASURED, claims_table

RECIPES = Path(__file__).parent.parent.parent / "configs" / "reproduce"
STUDIES = {"rematch-shapes": 5, "rematch-emoji": 3}
SMALL = {
    "pack": "--train 96 --heldout 12",
    "fit": "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 16",
    "test": (
        "--model.init_args.captions 4 --model.init_args.grid_rows 2 --model.init_args.resamples 3 "
        "--model.init_args.diversity_samples 2 --trainer.limit_test_batches 1"
    ),
    "prior": " ".join(f"--model.init_args.net.init_args.{size}" for size in ("width 16", "layers 1", "heads 2")),
    "decoder": "--model.init_args.net.init_args.channels 8 --model.init_args.net.init_args.head_channels 8",
    "many": "--model.init_args.diversity_captions 2",
    "drawn": "--model.init_args.decoder.init_args.sampler.init_args.steps 2",
}
#: Some stages with the values that it is done for, two training seeds of what is compared. The slow test has all.
KINDS: dict[str, dict[str, list[Any]]] = {
    "store": {}, "heldout": {}, "heldout-store": {}, "codec": {}, "try-diffusion": {"lr": ["0.01"], "seed": [0]},
    "try-ar": {"lr": ["0.01"], "seed": [0]}, "choice": {"prior": ["diffusion"]}, "choice-ar": {},
    "diffusion": {"seed": [1, 2]}, "ar": {"seed": [1, 2]}, "best": {"seed": [1, 2]},
    "reference": {"seed": [1]}, "posterior": {"seed": [1]}, "frontier": {"seed": [1]},
    "decoder-guidance": {"seed": [1], "prior": ["ar"], "scale": [3.0]},
    "decoder-text": {"seed": [1]}, "need-trained": {"seed": [1]},
}  # fmt: skip


def read(name: str) -> dict[str, Stage]:
    """A recipe's stages."""
    stages = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["stages"]
    return {key: Stage(**stage) for key, stage in stages.items()}


TO_MEASURE = pytest.mark.xfail(strict=True, reason="Emoji's second round is still to be measured.")


@pytest.mark.parametrize("name", ["rematch-shapes", pytest.param("rematch-emoji", marks=TO_MEASURE)])
def test_what_is_committed_was_measured_as_the_recipe_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a setting of the recipe, or of a config that it names, changed since: run it again, it does that alone.

    A clone has neither the study's run nor the one that it builds on: nothing of them is missed.
    """
    for folder in ("configs", "results"):
        (tmp_path / folder).symlink_to(RECIPES.parent.parent / folder)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--config", f"configs/reproduce/{name}.yaml", "--dry_run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "Nothing is to be done."
    assert len([line for line in said if line.endswith(": done")]) > 80
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_stage_needs_what_it_reads(path: Path) -> None:
    """A later one may run first where neither needs the other."""
    places = {"{run}": "run", "{source}": "data", "{base}": "", "{results}": "results", "{precision}": "32-true"}
    recipe, before = Recipe(read(path.stem), places), dict[str, set[str]]()
    for name, stage in recipe.stages.items():
        before[name] = set(stage.needs).union(*(before[need] for need in stage.needs))
        configs = recipe.configs(name)
        if "configs/base/heldout.yaml" in configs:
            configs.pop("configs/base/cell.yaml")  # whose source and store that one replaces
        said = f"{stage.run} {json.dumps(configs)}"
        for other, out in ((other, made.out.removesuffix(".json")) for other, made in recipe.stages.items()):
            if other != name and re.search(re.escape(out) + r"(?=[/\s\"'.]|-training|-sampling|$)", said):
                assert other in before[name], f"{name} reads what {other} makes"


def small(stage: Stage, matrix: dict[str, list[Any]]) -> Stage:
    """A stage's command on the miniature run."""
    words = [stage.run, SMALL.get(stage.run.split()[0], "")]
    words += [SMALL["prior"]] if "prior/matched.yaml" in stage.run else []
    words += [SMALL["decoder"]] if "decoder/tiny.yaml" in stage.run else []
    if words[1] == SMALL["test"]:
        words += [SMALL["many"]] if "diversity_captions" not in stage.run else []
        words += [SMALL["drawn"]] if "arms/embeddings.yaml" not in stage.run else []
    return replace(stage, run=" ".join(words), matrix=stage.matrix | matrix)


def places(stages: Iterable[Stage]) -> set[tuple[str, str, str]]:
    """Kind, title and series of every cell."""
    found = set()
    for stage in stages:
        words = shlex.split(stage.run)
        given = {
            word.rpartition(".")[2]: value for word, value in pairwise(words) if word.startswith("--model.init_args.")
        }
        if "configs/compare" in stage.run and words[0] == "test":
            found.add((given.get("kind", "prior"), given.get("title", ""), given.get("series", "")))
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_a_recipe_holds_every_arm_that_the_claims_name(name: str) -> None:
    written = write_out(read(name))
    found = places(written.values())
    assert ("prior", "", "") in found
    assert (name == "rematch-emoji") == (("matched", "", "") in found)
    table = claims_table(Path())
    curves = {(line["ablation"], line["side"]): ("curve", line["curve"], line["series"]) for line in table["baselines"]}
    assert set(curves.values()) <= found
    found |= {("ablation", *side) for side in curves}
    shapes_only = ("SAM", "prediction", "prediction, v", "optimizer, diffusion", "optimizer, ar")
    for line in table["ablations"]:
        for side in (line["paper"], line["other"]):
            if name == "rematch-shapes" or line["title"] not in shapes_only:
                trained = ("ablation", line.get("ablation", line["title"]), side)
                assert (("curve", line["curve"], side[0]) if "curve" in line else trained) in found
    rows = {row[side] for row in table["claims"] for side in ("first", "second") if ": " in row.get(side, "")}
    assert {("table", *row.split(": ")) for row in rows} <= found
    for curve in (("temperature", "ar"), ("axes", "true z_i"), ("decoder guidance", "ar")):
        assert ("curve", *curve) in found
    for prior in ("diffusion", "ar"):
        for seed in range(1, STUDIES[name] + 1):
            assert f"{prior}-{seed}" in written[f"best-{seed}-{prior}"].needs


@pytest.mark.parametrize("name", [*STUDIES, "rematch-contenders", "rematch-compute"])
def test_no_name_is_left_unfilled_and_no_two_stages_keep_one_file(name: str) -> None:
    recipe = Recipe(read(name), {"{run}": "run", "{source}": "data", "{base}": "base", "{results}": f"results/{name}"})
    texts = [f"{stage.run} {json.dumps(recipe.configs(key))}" for key, stage in recipe.stages.items()]
    known = {"run", "base", "source", "results", "precision", "out"}
    assert not {word for text in texts for word in re.findall(r"\{(\w+)\}", text)} - known
    files = [stage.out for stage in recipe.stages.values()]
    assert len(files) == len(set(files)) > 50
    configs = {path for stage in recipe.stages.values() for path in re.findall(r"--config (configs/\S+)", stage.run)}
    assert all(Path(path).is_file() for path in configs), configs


@pytest.mark.parametrize("name", [*STUDIES, "rematch-contenders", "rematch-compute"])
def test_a_choice_is_between_the_networks_that_its_recipe_trains_with_its_rate(name: str) -> None:
    recipe = Recipe(read(name), {"{run}": "{run}", "{source}": "data", "{base}": "base", "{results}": "results"})
    choices = [key for key in recipe.stages if key.startswith("choice")]
    assert choices
    for key in choices:
        stage = recipe.stages[key]
        (path,) = [path for path in recipe.configs(key) if "base/choice" in path]
        asked = recipe.configs(key)[path]["model"]["init_args"]
        tried = {stage.out: stage.run for stage in map(recipe.stages.get, stage.needs) if stage and "try" in stage.out}
        assert {folder for folders in asked["weights"].values() for folder in folders} == set(tried)
        for rate, folders in asked["weights"].items():
            assert all(f"--model.init_args.optimization.{asked['rate']} {rate}" in tried[folder] for folder in folders)


def test_every_contender_is_tried_chosen_trained_and_measured() -> None:
    """What the rematch on shapes has tried is not tried again, and its diffusion prior is measured there."""
    stages = {stage.out: stage for stage in write_out(read("rematch-contenders")).values()}
    there = "--config results/rematch-shapes/best/{}-training.yaml"
    rates = {"ar": "", "diffusion": there, "eps": there, "v": there}
    likeliest = yaml.safe_load((RECIPES.parent / "ar_prior" / "matched.yaml").read_text())
    assert likeliest["model"]["init_args"]["optimization"]["muon_lr"] == 0.02
    for path in (RECIPES.parent / "contenders").glob("*.yaml"):
        name = path.stem
        for seed in (1, 2, 3):
            fit = stages[f"{{run}}/{name}-{seed}"]
            assert str(path.relative_to(RECIPES.parent.parent)) in fit.run
            rate = rates.get(name, "--config {{results}}/best/{}-training.yaml").format(name)
            assert rate in fit.run
            assert rate or "best/" not in fit.run
            cell = stages.get(f"{{results}}/cells/best-{name}-{seed}.json")
            assert (cell is None) == (name == "diffusion")
            assert cell is None or f"--model.init_args.weights {{run}}/{name}-{seed}" in cell.run
        tried = [out for out in stages if out.startswith(f"{{run}}/try-{name}-")]
        weights = yaml.safe_load((RECIPES.parent / "base" / "choice-contenders.yaml").read_text())["model"]["init_args"]
        listed = [folder.replace("{prior}", name) for (folder,) in weights["weights"].values()]
        assert tried == ([] if name in rates else listed)


def test_every_budget_has_a_whole_schedule_and_is_measured_before_a_longer_one_is_trained() -> None:
    stages = write_out(read("rematch-compute"))
    places, last = {stage.out: i for i, stage in enumerate(stages.values())}, 0
    for budget in ("0.5", "1", "2", "4", "8"):
        config = yaml.safe_load((RECIPES.parent / "base" / f"budget-{budget}.yaml").read_text())
        assert config["model"]["init_args"]["optimization"]["warmup_steps"] == 200 * float(budget)
        assert set(config["trainer"].values()) == {940 * float(budget)}
        cells = {f"{prior}-{seed}" for prior in ("diffusion", "ar", "flow") for seed in (1, 2, 3)}
        assert {out for out in places if f"/budget-{budget}-" in out} == {
            f"{{results}}/cells/budget-{budget}-{cell}.json" for cell in cells
        }
        for cell in cells:
            prior, _, seed = cell.partition("-")
            name = list(stages)[places[f"{{results}}/cells/budget-{budget}-{cell}.json"]]
            (fit,) = [stages[need] for need in stages[name].needs if need != "heldout-store"]
            assert fit.out == f"{{run}}/{prior}-{budget}-{seed}"
            assert f"budget-{budget}.yaml" in fit.run
            assert f"contenders/{prior}.yaml" in fit.run
            assert last < places[fit.out] < places[stages[name].out]
        last = max(places[f"{{results}}/cells/budget-{budget}-{cell}.json"] for cell in cells)
    assert all(
        f"{{results}}/cells/{arm}-{seed}.json" in places
        for arm in ("posterior", "posterior-seen", "reference")
        for seed in (1, 2, 3)
    )


def make(stages: dict[str, Stage], base: Path, folder: Path) -> dict[str, Any]:
    """A study of the miniature run; what its report says."""
    reproduce(stages, str(folder / "run"), "{base}/data", base=str(base), results=str(folder / "results"))
    return json.loads((folder / "results" / "report.json").read_text())


def one_trial(stages: dict[str, Stage], folder: Path) -> None:
    """Leave one learning rate and one seed to every choice; shards are those of the miniature run."""
    for path in RECIPES.parent.glob("base/choice-*.yaml"):
        config = yaml.safe_load(path.read_text())
        rate, networks = next(iter(config["model"]["init_args"]["weights"].items()))
        config["model"]["init_args"]["weights"] = {rate: networks[:1]}
        (folder / path.name).write_text(yaml.safe_dump(config))
    for stage in stages.values():
        stage.run = stage.run.replace("configs/base/choice-", f"{folder}/choice-")
        stage.needs = [need for need in stage.needs if need != "data"]


@pytest.mark.usefixtures("in_process")
def test_a_study_from_end_to_end_and_without_its_run(
    mini_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes some 50 s of one core, for 25 stages: nothing else sees that stages, cells and report agree."""
    monkeypatch.setattr("unclip_pl.report.plots.DPI", 30)  # nobody looks
    recipe = read("rematch-shapes")
    stages = {name: small(recipe[name], matrix) for name, matrix in KINDS.items()}
    one_trial(stages, tmp_path)
    # A prior of one's own is one more cell.
    mine = yaml.safe_load(Path("examples/noisy_linear.yaml").read_text())
    del mine["model"]["init_args"]["priors"]["linear"]  # another cell has measured it
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    own = recipe["reference"].run.replace("configs/arms/reference.yaml", str(tmp_path / "mine.yaml"))
    stages["own"] = small(Stage(own, "{results}/cells/own-{seed}.json", ["heldout-store"]), {"seed": [1]})
    monkeypatch.syspath_prepend("examples")
    report = make(stages, mini_run, tmp_path)
    assert report["meta"]["training_seeds"] == 2
    contenders = ["diffusion", "ar", "linear", "text", "noisy linear"]
    references = {"ceiling", "true posterior"}
    assert set(report["priors"]) == {*contenders, *references}
    assert {name: len(points) for name, points in report["frontier"]["points"].items()} == {"diffusion": 6, "ar": 5}
    assert report["frontier"]["reference"]["calibration_gap"]["mean"] is not None
    for name in ("diffusion", "ar"):
        row = report["priors"][name]
        assert (row["lr"], row["training_steps"], row["training_samples"], row["seeds"]) == (0.01, 2, 32, [1, 2])
        assert row["sampling"]["guidance"] == chosen(tmp_path, name)
    duels = {(duel["first"], duel["second"]): duel["seeds"] for duel in report["duels"] if not duel["matched"]}
    assert duels["diffusion", "ar"] == 2
    assert set(chain.from_iterable(duels)) == set(contenders)
    assert [point["x"] for point in report["curves"]["decoder guidance"]["ar"]["stated_match"]] == [3]
    assert set(report["tables"]["Is a prior needed?"]) == {"decoder trained on z_t"}
    answered = [claim for claim in report["claims"] if claim["verdict"] != UNMEASURED]
    assert len(answered) >= 8
    assert all(set(claim) >= {"claim", "paper", "ours", "verdict", "why"} for claim in answered)

    shutil.rmtree(tmp_path / "run")
    monkeypatch.delattr(module, "Process")
    assert make(stages, mini_run, tmp_path) == report


def chosen(folder: Path, prior: str) -> float:
    """The guidance that cells of a prior's best are laid over with."""
    content = yaml.safe_load((folder / "results/best" / f"{prior}-sampling.yaml").read_text())
    return content["model"]["init_args"]["priors"][prior]["init_args"]["guidance"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_every_stage_of_the_recipe_runs(mini_run: Path, tmp_path: Path) -> None:
    """All curves, arms and ablations, one training seed each."""
    stages = {
        name: small(stage, {"seed": stage.matrix["seed"][:1]} if "seed" in stage.matrix else {})
        for name, stage in read("rematch-shapes").items()
        if name != "data"
    }
    for name, stage in stages.items():
        if name.startswith("try-"):
            stage.matrix["lr"] = stage.matrix["lr"][:1]
    one_trial(stages, tmp_path)
    report = make(stages, mini_run, tmp_path)
    unmeasured = [claim["claim"] for claim in report["claims"] if claim["verdict"] == UNMEASURED]
    assert set(unmeasured) <= {  # untrained networks reach no common gap, and their guidance is chosen by chance
        "Of equally concentrated samples, the diffusion prior's are the better ones",
        "The diffusion prior needs less training compute",
    }
    optimizers = {(line["title"], line["paper"], line["other"]) for line in report["ablations"]}
    assert {(f"optimizer, {prior}", "AdamW", "Muon") for prior in ("diffusion", "ar")} <= optimizers
    assert set(report["spaces"]) == {"the study's CLIP", "with SAM", "without SAM"}
    assert [point["x"] for point in report["curves"]["axes"]["true z_i"]["stated_match"]] == [2, 4, 8, 12, 16, 24, 32]


@pytest.mark.slow  # 50 stages, minutes of a core
@pytest.mark.usefixtures("in_process")
def test_every_contender_runs_and_gets_its_row(mini_run: Path, tmp_path: Path) -> None:
    """One training seed and learning rate of each, and the decoder of noised embeddings at every level."""
    claims = yaml.safe_load((RECIPES.parent / "claims" / "contenders.yaml").read_text())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.yaml").write_text(json.dumps(claims | {"beside": []}))  # nobody measured them here
    stages = {}
    for name, stage in read("rematch-contenders").items():
        values = {key: stage.matrix[key][:1] for key in ("seed", "lr") if key in stage.matrix}
        words = [stage.run, SMALL.get(stage.run.split()[0], "")]
        words += [SMALL["decoder"]] if name == "decoder-noise" else []
        words += [SMALL["drawn"]] if name.startswith("noise-") else []
        stages[name] = replace(stage, run=" ".join(words), matrix=stage.matrix | values)
    del stages["data"]
    one_trial(stages, tmp_path)
    report = make(stages, mini_run, tmp_path)
    contenders = {path.stem for path in (RECIPES.parent / "contenders").glob("*.yaml")}
    assert set(report["priors"]) == contenders - {"diffusion"}
    for name in ("ar", "mixture"):
        assert report["priors"][name]["metrics"]["nats"]["mean"] > 0
    assert "mlp - eclipse" in report["differences"]["embed_kid"]  # win rates need pictures
    assert set(report["frontier"]["points"]) == {"flow", "mlp", "mixture", "ar"}
    unmeasured = {claim["claim"] for claim in report["claims"] if claim["verdict"] == UNMEASURED}
    named = {row["claim"] for row in claims["claims"] if "diffusion" in (row.get("first"), row.get("second"))}
    untrained = {"Of equally concentrated samples, those without a quantiser are the better ones"}
    assert unmeasured <= named | untrained | {
        "A decoder that was trained with noise on z_i draws generated embeddings better than a plain one"
    }
    curve = report["curves"]["noise level of z_i"]
    assert {name: [point["x"] for point in line["stated_match"]] for name, line in curve.items()} == {
        "generated z_i": [0.0, 0.1, 0.2, 0.4], "true z_i": [0.0, 0.1, 0.2, 0.4]
    }  # fmt: skip


@pytest.mark.slow  # 54 stages, minutes of a core
@pytest.mark.usefixtures("in_process")
def test_every_budget_runs_and_lies_on_a_curve(mini_run: Path, tmp_path: Path) -> None:
    """One training seed and learning rate, budgets of 2 to 10 steps."""
    steps = {"0.5": 2, "1": 4, "2": 6, "4": 8, "8": 10}
    stages = {}
    for name, stage in read("rematch-compute").items():
        values = {key: stage.matrix[key][:1] for key in ("seed", "lr") if key in stage.matrix}
        words = [stage.run, SMALL.get(stage.run.split()[0], "")]
        if budget := stage.matrix.get("budget", [""])[0] if words[0].startswith("fit") else "":
            number = steps[str(budget)]
            words += [f"--trainer.max_steps {number} --trainer.val_check_interval {number}"]
        stages[name] = replace(stage, run=" ".join(words), matrix=stage.matrix | values)
    del stages["data"]
    one_trial(stages, tmp_path)
    report = make(stages, mini_run, tmp_path)
    found = report["compute"]
    points = {title: {name: line["points"] for name, line in lines.items()} for title, lines in found.items()}
    for name in ("diffusion", "ar", "flow"):
        trained = points["training budget"][name]
        assert [point["x"] for point in trained] == [float(budget) for budget in steps]
        flops = [point["flops"] for point in trained]
        assert flops == pytest.approx([flops[0] * number / 2 for number in steps.values()])
        for slopes in ("slopes", "reducible"):
            assert found["training budget"][name][slopes]["embed_kid"]["seeds"] == [1]
    assert found["work for an embedding"]["ar"]["slopes"] == {}
    assert "codes" in report["priors"]
    work = {name: [point["x"] for point in line] for name, line in points["work for an embedding"].items()}
    assert work == {"diffusion": [1, 2, 4, 8, 16, 32], "ar": [1], "flow": [1, 2, 4, 8, 16, 32]}
    assert {choice["file"] for choice in report["choices"]} == {
        f"{name}-{length}" for name in ("diffusion", "ar", "flow") for length in ("short", "longer")
    }
    page = (tmp_path / "results" / "report.md").read_text()
    assert "## Quality for compute" in page
    assert "plots/compute.png" in page
