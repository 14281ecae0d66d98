"""A study's report, from cells whose truth is known."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip_pl.commands.report import report as draw_again
from unclip_pl.evaluation.study import of_share, read_study, study_report
from unclip_pl.evaluation.study_claims import FAILS, HOLDS, OPEN, study_claims, verdict
from unclip_pl.metrics.interval import Interval
from unclip_pl.report.plots import colors
from unclip_pl.report.report import Atlas
from unclip_pl.report.study_page import log_study, render_study
from unclip_pl.report.study_plots import _distinct
from unclip_pl.report.study_tables import choice_table

CAPTIONS, MANY, RESAMPLES = 40, 6, 20
#: Mean of each per-caption measure for the diffusion prior, and how much less good the AR prior is.
VALUES = {
    "stated_match": (0.95, -0.03), "captions_right": (0.85, -0.06), "clip_score": (65.0, -2.0),
    "residual": (0.05, 0.004), "retrieval_r1": (0.2, -0.02), "precision": (0.9, -0.02), "recall": (0.8, 0.02),
}  # fmt: skip
SPREAD = {"vendi": (4.0, 0.3), "diversity_gap": (0.1, -0.01), "intra_distance": (0.4, 0.05)}
EMBEDDED = {
    "embed_fd": (0.010, 0.003), "fd_judge": (0.04, 0.01), "cos_true": (0.70, -0.06), "cos_samples": (0.78, -0.09),
    "cos_mean": (0.80, -0.02), "calibration_gap": (-0.08, 0.03), "text_cos": (0.8, -0.04), "probe_match": (0.97, -0.02),
}  # fmt: skip
SIZES = {"diffusion": (1.92e6, 3.0e13, 1.3e9, 128), "ar": (1.9e6, 5.0e13, 1.6e8, 33)}


def arm(name: str, seed: int, worse: float = 0.0, *, drawn: bool = True) -> dict[str, Any]:
    """Measurements of one arm: ``worse`` 0 is the diffusion prior, 1 the AR prior. Captions share their difficulty."""
    shared = torch.Generator().manual_seed(99)
    hard, own = torch.randn(CAPTIONS, generator=shared), torch.Generator().manual_seed(1000 * seed + len(name))
    values, resamples = {}, {}
    for measure, (mean, apart) in {**VALUES, **SPREAD}.items():
        size = MANY if measure in SPREAD else CAPTIONS
        scale = 0.1 * abs(apart)
        noise = hard[:size] + torch.randn(size, generator=own) + torch.randn(1, generator=own)
        values[measure] = (mean + worse * apart + scale * noise).tolist()
    for measure, (mean, apart) in EMBEDDED.items():
        noise = torch.randn(1, generator=own) + torch.cat([torch.zeros(1), torch.randn(RESAMPLES, generator=shared)])
        resamples[measure] = (mean + worse * apart + 0.1 * abs(apart) * noise).tolist()
    parameters, training, sampling, evaluations = SIZES.get(name, (0, 0.0, 0, 0))
    return {
        "values": values if drawn else {}, "resamples": resamples, "class": "Prior", "reference": name == "ceiling",
        "parameters": parameters, "training_steps": 940 if parameters else 0,
        "training_samples": 60160 if parameters else 0,
        "training_seconds": 130.0 + seed, "training_flops": training, "lr": 1e-3 if parameters else None,
        "config_hash": "0123456789ab" if parameters else None, "evaluations": evaluations,
        "flops_per_embedding": sampling, "seconds_per_embedding": 0.01,
        "sampling": {"class": "Prior", "guidance": 1.5, "candidates": 2} if parameters else {"class": "Prior"},
    }  # fmt: skip


def write_cell(folder: Path, file: str, group: str, seed: int, arms: dict[str, Any], rank: float = 20.0) -> None:
    """One file, with a picture where something was drawn."""
    pictures = None
    drawn = any(found["values"] for found in arms.values())
    if drawn:
        columns = ["real", *arms]
        pictures = {"rows": ["a <b>red</b> star", "a ring", "a big & blue heart"], "columns": columns}
        images = torch.rand(3, len(columns), 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        Atlas(images, pictures["rows"], columns).save(folder / "cells" / f"{file}.png")
    cell = {
        "group": group, "seed": seed, "pictures": pictures, "arms": arms, "decoder": {"class": "Decoder"},
        "counts": {
            "rows": 64, "captions": CAPTIONS if drawn else 0, "many": MANY, "seeds": 2, "resamples": RESAMPLES,
            "many_samples": 4,
        },
        "space": {"embed_dim": 64, "axes_for_99": 20, "effective_rank": rank},
        "meta": {"commit": "0123456789ab", "hardware": "2 × Example CPU", "versions": {"python": "3.11"}},
    }  # fmt: skip
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "cells" / f"{file}.json").write_text(json.dumps(cell))


def write_study(folder: Path, seeds: int = 3) -> Path:
    """All kinds of cells."""
    for seed in range(seeds):
        for group in ("matched", "best"):
            for name, worse in (("diffusion", 0.0), ("ar", 1.0)):
                write_cell(folder, f"{group}-{name}-{seed}", group, seed, {name: arm(name, seed, worse)})
        references = {
            name: arm(name, seed, worse) for name, worse in (("linear", 0.3), ("text", 3.0), ("ceiling", -0.5))
        }
        write_cell(folder, f"reference-{seed}", "reference", seed, references)
        needs = {"caption only": 4.0, "z_t in place of z_i": 3.0, "decoder trained on z_t": 1.0, "generated z_i": 0.5}
        for name, worse in needs.items():
            write_cell(folder, f"need-{name}-{seed}", f"need/{name}", seed, {"text": arm("text", seed, worse)})
        for title, series, points in (
            ("prior guidance", "diffusion", {"1": 0.0, "2": 0.5, "4": 2.0}),
            ("prior guidance", "ar", {"1": 1.0, "2": 0.9}),
            ("sampling steps", "fixed", {"1": 5.0, "8": 1.0, "64": 0.0}), ("sampling steps", "analytic", {"8": 0.4}),
            ("candidates", "diffusion", {"1": 0.3, "2": 0.0}),
            ("dot quantile", "ar", {"0": 1.0, "0.5": 0.9, "0.95": 1.4}),
        ):  # fmt: skip
            arms = {x: arm(x, seed, worse, drawn=False) for x, worse in points.items()}
            write_cell(folder, f"curve-{title}-{series}-{seed}", f"curve/{title}/{series}", seed, arms)
        for title, ours, theirs in (("prediction", "x0", "eps"), ("SAM", "with SAM", "without SAM")):
            for name, worse in ((ours, 0.0), (theirs, 1.0)):
                group, rank = f"ablation/{title}/{name}", 12.0 if name == "with SAM" else 20.0
                write_cell(
                    folder,
                    f"{title}-{name}-{seed}",
                    group,
                    seed,
                    {"diffusion": arm(name, seed, worse, drawn=False)},
                    rank,
                )
    best = folder / "best"
    best.mkdir(exist_ok=True)
    trial = {"joint_fd": 0.02, "embed_fd": 0.01, "text_cos": 0.7, "retrieval_r10": 0.4}
    choice = {"prior": "diffusion", "learning_rates": {"0.001": trial}, "guidance": {"1": trial, "1.5": trial}}
    (best / "diffusion.json").write_text(json.dumps({**choice, "chosen": {"lr": 0.001, "guidance": 1.5}}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_study(tmp_path_factory.mktemp("study"))
    render_study(path)
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_rows_have_the_numbers_that_were_put_in(report: dict[str, Any]) -> None:
    assert report["meta"]["training_seeds"] == 3
    assert list(report["priors"])[:4] == ["diffusion", "ar", "diffusion (matched)", "ar (matched)"]
    for name, worse in (("diffusion", 0.0), ("ar", 1.0)):
        for measure, (mean, apart) in VALUES.items():
            value = report["priors"][name]["metrics"][measure]
            assert value["low"] < value["mean"] < value["high"]
            assert value["mean"] == pytest.approx(mean + worse * apart, abs=0.3 * abs(apart))


def test_a_run_that_had_to_wait_and_a_cell_of_few_captions_do_not_speak_for_all(tmp_path: Path) -> None:
    """Seconds are a median with its range; the counts in the heading are the tables'."""
    write_study(tmp_path)
    path = tmp_path / "cells" / "best-ar-1.json"
    cell = json.loads(path.read_text())
    cell["arms"]["ar"]["training_seconds"] = 9000.0
    path.write_text(json.dumps(cell))
    curve = json.loads((tmp_path / "cells" / "best-diffusion-0.json").read_text())
    curve |= {"group": "ablation/prediction/eps", "pictures": None}
    curve["counts"] |= {"captions": 2, "many": 0}
    (tmp_path / "cells" / "ablation-eps-9.json").write_text(json.dumps(curve))
    report = study_report(read_study(tmp_path))
    assert report["priors"]["ar"]["training_seconds"] == 132
    assert report["priors"]["ar"]["training_seconds_range"] == [130, 9000]
    assert report["meta"]["counts"]["captions"] == CAPTIONS
    assert report["meta"]["counts"]["many"] == MANY


def test_head_to_head_sees_who_is_better_and_the_paper_s_interval_is_the_narrower(report: dict[str, Any]) -> None:
    rates = report["head_to_head"]["win_rates"]
    for measure, higher in (("stated_match", True), ("residual", True), ("clip_score", True), ("recall", False)):
        assert (rates[measure]["mean"] > 0.9) == higher, measure
        assert rates[measure]["p"] < 0.01, measure
        assert rates[measure]["wins"] + rates[measure]["losses"] + rates[measure]["ties"] == 40
    assert {"mean", "low", "high", "normal", "wins", "losses", "ties", "p"} <= set(rates["vendi"])


def test_a_difference_is_that_of_the_means_beside_it_at_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed in range(4):
        write_cell(tmp_path, f"d-{seed}", "matched", seed, {"diffusion": arm("diffusion", seed)})
    for seed in range(2):
        write_cell(tmp_path, f"r-{seed}", "reference", seed, {"linear": arm("linear", seed, 0.3)})
    report = study_report(read_study(tmp_path))
    for measure in ("stated_match", "fd_judge", "cos_true"):
        pair = report["differences"][measure]["linear - diffusion"]
        assert pair["mean"] == pytest.approx(pair["first"] - pair["second"])
        whole = report["priors"]["diffusion"]["metrics"][measure]["mean"]
        assert pair["second"] != pytest.approx(whole, rel=1e-9)  # of four seeds: not what is compared


@pytest.mark.parametrize(
    ("mean", "low", "high", "captions", "expected"),
    [(0.99, 0.97, 1.01, 40, (0.97, 1.0)), (0.0, -0.1, 0.1, 40, (0.0, 0.1)), (0.5, 0.5, 0.5, 40, (0.5, 0.5)),
     (1.0, 1.0, 1.0, 36, (36 / (36 + 1.959964**2), 1.0)), (0.0, 0.0, 0.0, 36, (0.0, 1.959964**2 / (36 + 1.959964**2)))],
)  # fmt: skip
def test_an_interval_of_shares_ends_where_shares_do_and_no_spread_is_no_certainty(
    mean: float, low: float, high: float, captions: int, expected: tuple[float, float]
) -> None:
    found = of_share(Interval(mean, low, high), captions)
    assert found == pytest.approx((mean, *expected))


def test_spaces_of_different_clips_are_compared_by_attributes_alone(report: dict[str, Any]) -> None:
    line = next(line for line in report["ablations"] if line["title"] == "SAM")
    assert list(line["measures"]) == ["probe_match"]


def _decided(report: dict[str, Any], **moved: tuple[float, float]) -> str:
    """The verdict on compute, with some differences moved."""
    changed = copy.deepcopy(report)
    for measure, (low, high) in moved.items():
        pair = changed["differences"][measure]["diffusion (matched) - ar (matched)"]
        pair |= {"low": low, "high": high}
    claims = {claim["claim"]: claim for claim in study_claims(changed)}
    return claims["The diffusion prior needs less training compute"]["verdict"]


def test_less_compute_needs_nothing_worse_and_something_better(report: dict[str, Any]) -> None:
    level = {"stated_match": (-1, 1), "clip_score": (-1, 1), "fd_judge": (-1, 1), "embed_fd": (-1, 1)}
    assert _decided(report) == HOLDS
    assert _decided(report, **level) == OPEN
    assert _decided(report, **{**level, "fd_judge": (-2, -1)}) == HOLDS
    assert _decided(report, **{**level, "clip_score": (-2, -1)}) == OPEN  # cheaper and worse: two things pull two ways
    assert _decided(report, **{**level, "fd_judge": (-2, -1), "clip_score": (-2, -1)}) == OPEN


def test_the_top_half_is_best_where_it_beats_every_other_share(report: dict[str, Any]) -> None:
    def decided(*differences: tuple[float, float]) -> str:
        lines = [
            {"title": f"dot token above 50 or {x} %", "other": f"0.{x}", "seeds": [1, 2],
             "measures": {"embed_fd": {"difference": {"mean": 0.0, "low": low, "high": high}}}}
            for x, (low, high) in zip((70, 85, 95), differences, strict=True)
        ]  # fmt: skip
        claims = {claim["claim"]: claim for claim in study_claims({**report, "ablations": lines})}
        return claims["The dot-product token is best drawn from its top half"]["verdict"]

    better, level, worse = (-2.0, -1.0), (-1.0, 1.0), (1.0, 2.0)
    assert decided(better, better, better) == HOLDS
    assert decided(level, better, better) == OPEN
    assert decided(better, better, worse) == FAILS


@pytest.mark.parametrize(("chosen", "end"), [(0.001, "smallest"), (0.002, None), (0.004, "largest")])
def test_a_learning_rate_at_the_end_of_those_tried_is_named(chosen: float, end: str | None) -> None:
    trial = {"joint_fd": 0.02, "embed_fd": 0.01, "text_cos": 0.7, "retrieval_r10": 0.4}
    choice = {"prior": "ar", "learning_rates": dict.fromkeys(("0.004", "0.001", "0.002"), trial), "guidance": {}}
    table = choice_table({"choices": [choice | {"chosen": {"lr": chosen, "guidance": 1.0}}]})
    assert table is not None
    told = [text for term, text in table.notes if term == "ar's learning rate"]
    assert [text.split()[1] for text in told] == ([end] if end else [])


def test_a_matched_row_that_says_the_same_is_drawn_once_and_colours_stay(report: dict[str, Any]) -> None:
    one = copy.deepcopy(report)
    one["priors"]["diffusion (matched)"]["metrics"]["embed_fd"]["mean"] += 0.001
    rows = _distinct(one)
    assert set(one["priors"]) - set(rows["priors"]) == {"ar (matched)"}
    assert colors(rows) == {name: color for name, color in colors(one).items() if name != "ar (matched)"}


def test_curves_are_sorted_and_hold_an_interval_at_every_point(report: dict[str, Any]) -> None:
    points = report["curves"]["prior guidance"]["diffusion"]["embed_fd"]
    assert [point["x"] for point in points] == [1, 2, 4]
    assert all(point["low"] <= point["mean"] <= point["high"] for point in points)


def test_a_curve_of_what_is_not_a_prior_s_own_takes_x_from_the_group(tmp_path: Path) -> None:
    """Decoder guidance: one arm of one name in every cell."""
    for x, worse in (("1", 1.0), ("2", 0.0), ("4", 0.5)):
        write_cell(tmp_path, x, f"curve/decoder guidance/ar/{x}", 0, {"ar": arm("ar", 0, worse)})
    points = study_report(read_study(tmp_path))["curves"]["decoder guidance"]["ar"]["stated_match"]
    assert [point["x"] for point in points] == [1, 2, 4]


def test_ablations_are_paired(report: dict[str, Any]) -> None:
    lines = {line["title"]: line for line in report["ablations"]}
    assert {"prediction", "SAM", "best of 2", "dot token", "prior guidance, ar", "analytic variance, 8 steps"} <= set(
        lines
    )
    gap = lines["prediction"]["measures"]["embed_fd"]
    assert gap["difference"]["mean"] == pytest.approx(gap["paper"]["mean"] - gap["other"]["mean"])
    assert gap["difference"]["high"] < 0


def test_every_claim_has_a_verdict_and_a_reason(report: dict[str, Any]) -> None:
    claims = {claim["claim"]: claim for claim in report["claims"]}
    assert len(claims) >= 8
    for claim in claims.values():
        assert claim["verdict"] in (HOLDS, FAILS, OPEN)
        assert all(claim[key] for key in ("claim", "paper", "ours", "why"))
    assert claims["Predicting z_i itself is better than predicting the noise"]["verdict"] == HOLDS
    assert claims["A prior is better than feeding the decoder the text embedding"]["verdict"] == HOLDS
    assert claims["A linear map is the prior with the lower FID"]["verdict"] == FAILS
    assert claims["CLIP trained with SAM spans a space of drastically lower rank"]["verdict"] == OPEN  # one CLIP a side
    assert "12.0 with, 20.0 without" in claims["CLIP trained with SAM spans a space of drastically lower rank"]["ours"]
    assert claims["The diffusion prior needs less training compute"]["verdict"] == HOLDS


def test_what_was_not_measured_cannot_be_told(tmp_path: Path) -> None:
    write_cell(tmp_path, "a", "matched", 0, {"diffusion": arm("diffusion", 0)})
    report = render_study(tmp_path)
    assert {claim["verdict"] for claim in report["claims"] if "not measured" in claim["ours"]} == {OPEN}
    assert report["head_to_head"] is None
    assert report["meta"]["training_seeds"] == 0  # one side alone is no rematch
    assert (tmp_path / "report.html").is_file()


def test_prior_against_itself_is_even(tmp_path: Path) -> None:
    for seed in range(2):
        for name in ("diffusion", "ar"):
            write_cell(tmp_path, f"{name}-{seed}", "matched", seed, {name: arm("same", seed)})
    report = study_report(read_study(tmp_path))
    assert {rate["mean"] for rate in report["head_to_head"]["win_rates"].values()} == {0.5}
    assert {rate["p"] for rate in report["head_to_head"]["win_rates"].values()} == {1.0}
    pair = report["differences"]["embed_fd"]["diffusion - ar"]
    assert (pair["mean"], pair["low"], pair["high"]) == (0, 0, 0)
    assert pair["first"] == pair["second"]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.2, HOLDS), (-0.2, -0.1, FAILS), (-0.1, 0.1, OPEN), (None, None, OPEN)]
)
def test_verdict_needs_the_whole_interval(low: float | None, high: float | None, expected: str) -> None:
    assert verdict({"mean": 0.0, "low": low, "high": high}, above=True) == expected


def test_page_needs_no_other_file_and_captions_cannot_break_it(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", html)
    assert "<b>red</b>" not in html
    assert "a &lt;b&gt;red&lt;/b&gt; star" in html
    for text in (html, (folder / "report.md").read_text()):
        for word in ("random-effects", "rewards collapse", "Chosen on validation data", "guidance 1.5, best of 2"):
            assert word in text


def test_drawing_again_asks_the_cells_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("report.json", "report.md", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    draw_again(str(folder))
    assert before == {name: (folder / name).read_bytes() for name in names}
    assert "Head to head" in capsys.readouterr().out


def test_tensorboard_gets_settings_and_scores(report: dict[str, Any], tmp_path: Path) -> None:
    log_study(report, tmp_path)
    assert (tmp_path / "diffusion-(matched)").is_dir()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_broken_and_uneven_cells_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No cells"):
        read_study(tmp_path)
    write_cell(tmp_path, "a", "matched", 0, {"ar": arm("ar", 0)})
    short = arm("ar", 1)
    short["values"]["recall"] = short["values"]["recall"][:-1]
    write_cell(tmp_path, "b", "matched", 1, {"ar": short})
    with pytest.raises(ValueError, match="recall of as many captions"):
        render_study(tmp_path)
    (tmp_path / "cells" / "b.json").write_text('{"group": ')
    with pytest.raises(ValueError, match=r"b\.json is broken"):
        read_study(tmp_path)
