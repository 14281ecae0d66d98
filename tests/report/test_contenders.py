"""The contenders' claims, stated before anything is measured: every row finds what it names in the recipe's cells."""

import json
import shlex
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from unclip_pl.commands.plan import Recipe, Stage
from unclip_pl.report.claims import UNMEASURED, claims_table, delta_of, judge
from unclip_pl.report.frontier import frontier
from unclip_pl.report.study import PICTURED, read_study, rows_of, study_report, with_baselines

CONFIGS = Path(__file__).parent.parent.parent / "configs"
RECIPE = yaml.safe_load((CONFIGS / "reproduce" / "rematch-contenders.yaml").read_text())
CLAIMS = yaml.safe_load((CONFIGS / "claims" / "contenders.yaml").read_text())
FIXED = {"regression", "eclipse"}  # answer once, so that there is nothing to choose from


def cells(name: str) -> dict[str, dict[str, Any]]:
    """What every cell of a recipe is told, from its configs and its command, by the name of its file."""
    written = yaml.safe_load((CONFIGS / "reproduce" / f"{name}.yaml").read_text())["stages"]
    stages = {key: Stage(**stage) for key, stage in written.items()}
    recipe = Recipe(stages, {"{run}": "run", "{source}": "data", "{base}": "base", "{results}": "results"})
    found = {}
    for key, stage in recipe.stages.items():
        if stage.run.startswith("test "):
            own: dict[str, Any] = {"priors": {}, "decoder": None}
            for config in recipe.configs(key).values():
                told = (config or {}).get("model", {}).get("init_args", {})
                own |= told | {"priors": own["priors"] | told.get("priors", {})}
            words = pairwise(shlex.split(stage.run))
            own |= {key.rpartition(".")[2]: x for key, x in words if key.count(".") == 2 and "model.init_args" in key}
            found[Path(stage.out).stem] = own | {"seed": int(str(stage.matrix["seed"][0]))}
    return found


def shared() -> dict[str, dict[str, Any]]:
    """The cells of the rematch on shapes that the claims name."""
    patterns = [Path(pattern).stem for pattern in CLAIMS["beside"]]
    every = cells("rematch-shapes")
    assert all(any(fnmatch(name, pattern) for name in every) for pattern in patterns)
    return {name: told for name, told in every.items() if any(fnmatch(name, pattern) for pattern in patterns)}


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory, write_cell: Callable[..., None], arm: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """The report of cells that have the recipes' arms and made-up numbers."""
    root = tmp_path_factory.mktemp("contenders")
    folder = root / "rematch-contenders"
    folder.mkdir()
    (folder / "claims.yaml").write_text(json.dumps(CLAIMS))
    for study, every in ((folder.name, cells(folder.name)), ("rematch-shapes", shared())):
        for name, told in every.items():
            drawn, worse = told["decoder"] is not None, float(told.get("x") or 0)
            arms = {prior: arm(prior, told["seed"], worse, drawn=drawn) for prior in told["priors"]}
            for prior, made in arms.items():
                if not drawn:
                    made["resamples"] = {key: x for key, x in made["resamples"].items() if key not in PICTURED}
                if prior not in ("ar", "mixture"):
                    del made["resamples"]["nats"]
                made["training_flops"] = 1.0 if prior in FIXED else 2.0
            place = {key: told[key] for key in ("kind", "title", "series") if key in told}
            write_cell(root / study, name, told["seed"], arms, x=float(told["x"]) if "x" in told else None, **place)
    table = claims_table(folder)
    study = with_baselines(read_study(folder, table["order"], table["beside"]), table["baselines"])
    found = study_report(study, table) | {"frontier": frontier(study.arms, rows_of(study.arms))}
    return json.loads(json.dumps(found)) | {"claims": judge(found, table["claims"])}


def test_every_claim_finds_its_arms_in_the_recipes_cells(report: dict[str, Any]) -> None:
    assert len(report["claims"]) == len(CLAIMS["claims"])
    assert [claim["claim"] for claim in report["claims"] if claim["verdict"] == UNMEASURED] == []
    assert set(CLAIMS["order"]) == set(report["priors"])
    points = {name: len(points) for name, points in report["frontier"]["points"].items()}
    assert points == {"flow": 6, "diffusion": 16, "mlp": 6, "mixture": 4, "ar": 4}
    assert {tuple(row["seeds"]) for row in report["priors"].values()} == {(1, 2, 3)}


def test_all_that_is_shown_beside_a_claim_is_there(report: dict[str, Any]) -> None:
    for row, claim in zip(CLAIMS["claims"], report["claims"], strict=True):
        assert row["claim"] == claim["claim"]
        if row["test"] == "difference":
            assert claim["ours"].count("difference") == len(row["measures"]) + len(row.get("also", [])), row["claim"]
        if row["test"] == "ablation":
            shown = len(row["measures"]) * len([*row["titles"], *row.get("also", [])])
            assert claim["ours"].count("difference") == shown, row["claim"]


def test_every_measure_that_decides_has_its_delta(report: dict[str, Any]) -> None:
    """Without one an interval around 0 could never be no difference. For those of pictures, rows are drawn."""
    rows = CLAIMS["claims"]
    assert {row["measures"][0] for row in rows if delta_of(report, row["measures"][0]) is None} == set()


def test_a_gap_that_closes_is_told_from_one_that_grows(report: dict[str, Any]) -> None:
    """Made-up numbers move both lines alike, so neither: a line that moves less than the other has come nearer."""
    lines = {line["title"]: line["measures"]["kid_judge"]["difference"] for line in report["ablations"]}
    steps = {line["title"]: line["measures"]["kid_judge"] for line in report["ablations"]}
    moved = (
        steps["noise .2 or 0, generated z_i"]["difference"]["mean"]
        - steps["noise .2 or 0, true z_i"]["difference"]["mean"]
    )
    assert lines["gap at noise .2"]["mean"] == pytest.approx(moved)


def test_contenders_train_on_equal_terms_and_draw_equally_many_candidates() -> None:
    prior, codes = (yaml.safe_load((CONFIGS / name / "matched.yaml").read_text()) for name in ("prior", "ar_prior"))
    for same in ("max_steps", "gradient_clip_val", "callbacks"):
        assert prior["trainer"][same] == codes["trainer"][same]
    assert prior["data"] == codes["data"]
    assert (
        prior["model"]["init_args"]["optimization"]["muon_lr"] == codes["model"]["init_args"]["optimization"]["muon_lr"]
    )
    for path in (CONFIGS / "contenders").glob("*.yaml"):
        told = yaml.safe_load(path.read_text())
        assert list(told) == ["model"]
        assert not {"optimization", "draws_per_caption", "text_drop"} & told["model"].get("init_args", {}).keys()
        arms = yaml.safe_load((CONFIGS / "arms" / path.name).read_text())["model"]["init_args"]["priors"]
        assert list(arms) == [path.stem]
        settings = arms[path.stem]["init_args"]
        assert path.stem in FIXED or (settings["candidates"], settings["guidance"]) == (2, 1)
    for name, stage in RECIPE["stages"].items():
        if "fit" in name or name.startswith("try"):
            assert "trainer." not in stage["run"]
            assert "batch_size" not in stage["run"]
