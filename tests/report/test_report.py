"""A report's tables, plots and pages: nothing here needs a network."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip_pl import report as module
from unclip_pl.commands.report import report as draw_again
from unclip_pl.evaluation.measures import GROUPS, MEASURES
from unclip_pl.evaluation.sheet import Sheet
from unclip_pl.files import write_json
from unclip_pl.report.page import DIVERSITY, EMBEDDINGS
from unclip_pl.report.plots import apart, colors, draw_duels
from unclip_pl.report.study import distinct
from unclip_pl.report.tables import choice_table, foundation_table, metric_tables

Write, Arm = Callable[..., None], Callable[..., dict[str, Any]]
NAMES = ("report.json", "report.md", "report.html")
ATTRIBUTES = {"shape": 0.81, "color": 1.0, "size": 0.96, "position": 0.998, "background": 1.0}


@pytest.fixture(scope="module")
def folder(study_folder: Path) -> Path:
    module.draw(study_folder)
    return study_folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, arm: Arm, write_cell: Write) -> Path:
    """A run whose comparison has every prior in one cell, its foundations and its stages' times."""
    folder = tmp_path_factory.mktemp("run")
    worse = {"diffusion": 0.0, "ar": 1.0, "linear": 0.3, "text": 3.0, "ceiling": -0.5, "mine": 0.1}
    arms = {name: arm(name, 0, by) | {"attributes": ATTRIBUTES} for name, by in worse.items()}
    numbers = [0.05 + 0.001 * i for i in range(40)]
    foundations = {
        "oracle": dict.fromkeys(ATTRIBUTES, 1.0), "reconstruction": ATTRIBUTES,
        "arms": {
            "real": {"values": {"residual": numbers}, "resamples": {}},
            "reconstruction": {
                "values": {"residual": numbers, "retrieval_r10": [1.0] * 40},
                "resamples": {"fd_judge": [0.02 + 0.001 * i for i in range(21)]},
            },
        },
        "clip": {"zero_shot": ATTRIBUTES, "retrieval_r1": 0.041, "retrieval_r10": 0.312},
        "judge": {"retrieval_r1": 0.036, "retrieval_r10": 0.288},
        "codec": {
            "roundtrip_cosine": 0.9981, "pca_error": 0.0041, "quantisation_error": 0.0006, "code_length": 32,
            "axes_for_99": 22, "embed_dim": 64, "buckets": 256,
        },
    }  # fmt: skip
    labels = {"rows": [f"{name}: a <pink> ring" for name in ("diffusion", "ar")], "columns": ["1", "2"]}
    Sheet(torch.zeros(2, 2, 3, 8, 8), **labels).save(folder / "cells" / "comparison-many.png")
    pictures = {
        "grid": {"rows": ["a <b>red</b> star", "a ring", "a heart"], "columns": ["real", *arms, "embedding alone"]}
    }
    Sheet(torch.zeros(3, 8, 3, 8, 8), **pictures["grid"]).save(folder / "cells" / "grid.png")
    write_cell(folder, "comparison", 0, arms, foundations=foundations, pictures=pictures | {"many": labels})
    (folder / "cells" / "grid.png").rename(folder / "cells" / "comparison.png")
    module.draw(folder)
    return folder


def test_every_number_and_interval_is_on_the_page(folder: Path, report: dict[str, Any]) -> None:
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for row in report["priors"].values():
        for name, value in row["metrics"].items():
            for page in (html, markdown):
                assert MEASURES[name].show(value["mean"]) in page
                assert MEASURES[name].interval(value) in page


def test_a_runs_report_keeps_its_keys(compared: Path) -> None:
    """Other tools read these."""
    report = json.loads((compared / "report.json").read_text())
    assert {"mean", "low", "high"} <= set(report["priors"]["diffusion"]["metrics"]["stated_match"])
    assert report["oracle"]["real"] == dict.fromkeys(ATTRIBUTES, 1.0)
    assert report["decoder"]["reconstruction"] == ATTRIBUTES
    assert report["codec"]["roundtrip_cosine"] == 0.9981
    assert all({"claim", "verdict"} <= set(claim) for claim in report["claims"])
    assert set(report["meta"]) >= {"stages", "wall_seconds", "commits", "hardware", "versions", "config", "counts"}
    assert report["decoder"]["retrieval_r10"]["mean"] == 1
    assert report["oracle"]["residual"]["low"] < report["oracle"]["residual"]["high"]


def test_a_users_prior_has_its_row_duels_colour_and_picture(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    assert list(report["priors"])[-1] == "mine"
    assert len([duel for duel in report["duels"] if "mine" in (duel["first"], duel["second"])]) == 4
    assert len(set(colors(report).values())) == 6
    assert report["pictures"]["grid"]["columns"][-2:] == ["mine", "embedding alone"]


def test_pages_need_no_other_file_and_captions_cannot_break_them(folder: Path, compared: Path) -> None:
    for place in (folder, compared):
        html = (place / "report.html").read_text()
        assert not re.findall(r"(?:src|href)=['\"](?!data:)", html)
        assert "<b>red</b>" not in html
        assert "a &lt;b&gt;red&lt;/b&gt; star" in html
    assert "a &lt;pink&gt; ring" in html


def test_what_a_reader_must_know_is_told(folder: Path, compared: Path) -> None:
    for text in ((folder / name).read_text() for name in ("report.md", "report.html")):
        for word in ("random-effects", "rewards collapse", "Chosen on validation data", "guidance 1.5, best of 2"):
            assert word in text
    markdown = (compared / "report.md").read_text()
    assert "One training seed" in markdown
    assert "Not measured here: " in markdown


def test_drawing_again_asks_the_cells_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (folder / name).read_bytes() for name in NAMES}
    for name in NAMES:
        (folder / name).unlink()
    draw_again(str(folder))
    assert before == {name: (folder / name).read_bytes() for name in NAMES}
    assert "head to head" in capsys.readouterr().out


def test_profiles_of_trainings_are_on_the_page(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"mine": arm("mine", 0)})
    profile = {
        "device": "Card", "steps_per_second": 62.5, "flops_per_second": 89e12, "mfu": 0.09, "gpu_busy": 0.874,
        "peak_memory_bytes": 3 * 2**30,
    }  # fmt: skip
    for name, more in (("decoder", {"profile": profile}), ("codec", {})):
        write_json(tmp_path / "stages" / f"{name}.json", {"command": "fit", "seconds": 1.0, "commits": [], **more})
    module.draw(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| decoder | Card | 62.5 | 89.0 | 9.0 | 87.4 | 3.0 |" in " ".join(markdown.split())
    assert "| codec |" not in markdown


def test_groups_with_figures_of_their_own_are_groups_of_measures() -> None:
    assert {DIVERSITY, EMBEDDINGS} <= set(GROUPS)


def test_a_study_that_measured_little_is_drawn(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"mine": arm("mine", 0, drawn=False)})
    assert module.draw(tmp_path)["duels"] == []
    assert (tmp_path / "report.html").is_file()


def test_every_kind_of_duel_is_named_once_in_the_legend(report: dict[str, Any]) -> None:
    """Also where the first measure has no interval, or one kind has not the first measure."""
    changed = copy.deepcopy(report)
    for duel in changed["duels"]:
        if duel["matched"]:
            del duel["win_rates"]["stated_match"]
        else:
            duel["win_rates"]["stated_match"] |= {"low": None, "high": None}
    (legend,) = draw_duels(changed).legends
    assert [text.get_text() for text in legend.get_texts()] == ["own settings", "matched settings"]


def test_a_row_that_says_the_same_is_drawn_once_and_colours_stay(report: dict[str, Any]) -> None:
    assert colors(distinct(report)) == {
        name: color for name, color in colors(report).items() if name in distinct(report)["priors"]
    }


def test_labels_keep_their_distance() -> None:
    assert apart({"a": 0.5, "b": 0.5, "c": 0.9, "d": 0.52}, 0.1) == pytest.approx(
        {"a": 0.5, "b": 0.6, "d": 0.7, "c": 0.9}
    )


def test_best_is_whoever_reaches_the_best_mean_without_the_ceiling(report: dict[str, Any]) -> None:
    match = metric_tables(report)[0]
    column = next(i for i, head in enumerate(match.head) if head.startswith("CLIP score"))
    assert [row[0].text for row in match.rows if row[column].best] == ["diffusion", "diffusion (matched)"]


@pytest.mark.parametrize(("chosen", "end"), [(0.001, "smallest"), (0.002, None), (0.004, "largest")])
def test_a_learning_rate_at_the_end_of_those_tried_is_named(chosen: float, end: str | None) -> None:
    trial = {"joint_fd": 0.02, "embed_fd": 0.01, "text_cos": 0.7, "retrieval_r10": 0.4}
    choice = {
        "file": "ar",
        "prior": "ar",
        "learning_rates": dict.fromkeys(("0.004", "0.001", "0.002"), trial),
        "guidance": {},
    }
    table = choice_table({"choices": [choice | {"chosen": {"lr": chosen, "guidance": 1.0}}]})
    assert table is not None
    told = [text for term, text in table.notes if term == "ar's learning rate"]
    assert [text.split()[1] for text in told] == ([end] if end else [])


def test_without_foundations_there_is_no_table_of_them(report: dict[str, Any]) -> None:
    assert foundation_table(report) is None


def test_tensorboard_gets_settings_scores_and_pictures(folder: Path, report: dict[str, Any], tmp_path: Path) -> None:
    module.log(folder, report, tmp_path)
    assert (tmp_path / "diffusion-(matched)").is_dir()
    assert list((tmp_path / "pictures").iterdir())
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_sheet_survives_its_file(tmp_path: Path) -> None:
    images = torch.rand(3, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = Sheet(images, list("abc"), list("12345"))
    sheet.save(tmp_path / "sheet.png")
    again = Sheet.load(tmp_path / "sheet.png", sheet.rows, sheet.columns)
    assert torch.allclose(again.images, images, atol=1 / 127)
    assert torch.equal(sheet.joined()[:, 8:16, 16:24], images[1, 2])
