"""The one rule of all claims (docs/comparison.md), and contenders compared where they are as concentrated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.metrics.frechet import frechet_distance
from unclip_pl.metrics.kernel import kernel_values
from unclip_pl.report import draw
from unclip_pl.report.claims import (
    DISAGREE,
    EQUAL,
    FAILS,
    HOLDS,
    OPEN,
    UNMEASURED,
    UNTOLD,
    WIN_DELTA,
    claims_table,
    cost_of,
    delta_of,
    judge,
    together,
    verdict,
)
from unclip_pl.report.frontier import at_equal, frontier, never_equal
from unclip_pl.report.study import ablations, read_study, rows_of, study_report
from unclip_pl.report.tables import ablation_table

Write, Arm = Callable[..., None], Callable[..., dict[str, Any]]
CLAIM = {"claim": "x", "source": "me", "paper": "", "why": "", "first": "diffusion", "second": "ar"}


def judged(report: dict[str, Any], **claim: Any) -> dict[str, str]:
    return judge(report, [CLAIM | claim])[0]


def read(folder: Path) -> dict[str, Any]:
    study = read_study(folder, ["diffusion", "ar"])
    return study_report(study, claims_table(folder)) | {"frontier": frontier(study.arms, rows_of(study.arms))}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.9, 0.9, EQUAL), (0.1, 0.9, EQUAL), (0.1, 1.1, HOLDS), (-1.1, -0.1, FAILS), (-0.9, 1.1, OPEN), (-5, 5, OPEN)],
)
def test_no_difference_is_a_whole_interval_within_delta(low: float, high: float, expected: str) -> None:
    assert verdict({"mean": 0.0, "low": low, "high": high}, above=True, delta=1.0) == expected
    assert verdict({"mean": 7.0, "low": 7 + low, "high": 7 + high}, above=True, balance=7, delta=1.0) == expected


def test_the_first_measure_decides_and_another_may_object() -> None:
    assert together([HOLDS, OPEN, EQUAL]) == HOLDS
    assert together([HOLDS, FAILS]) == together([FAILS, EQUAL, HOLDS]) == DISAGREE
    assert together([OPEN, HOLDS, FAILS]) == OPEN
    assert together([EQUAL, FAILS]) == EQUAL
    assert together([]) == UNMEASURED


@pytest.mark.parametrize(
    ("points", "expected", "why"),
    [
        ([0.8, 0.93], HOLDS, ""),
        ([0.8, 0.86], UNTOLD, "stated attributes of GLIDE: 86.0 % at best, 90.0 % needed; it is trained too little"),
        ([None], UNTOLD, "not measured"),
    ],
)
def test_no_claim_is_decided_where_the_gates_line_reaches_too_little(
    points: list[float | None], expected: str, why: str
) -> None:
    pair = {"mean": 0.5, "low": 0.4, "high": 0.6, "diffusion": 0.9, "ar": 0.4, "first": 0.9, "second": 0.4}
    report = {
        "curves": {"guidance": {"GLIDE": {"stated_match": [{"x": x, "mean": y} for x, y in enumerate(points)]}}},
        "differences": {"stated_match": {"diffusion - ar": pair}},
        "priors": {},
        "tables": {},
    }
    gate = {"curve": "guidance", "line": "GLIDE", "measure": "stated_match", "at_least": 0.9}
    rows = [CLAIM | {"test": "difference", "measures": [name]} for name in ("stated_match", "clip_score")]
    decided, unmeasured = judge(report, rows, gate | {"else": "it is trained too little"})
    assert decided["verdict"] == expected
    assert why in decided["ours"]
    assert unmeasured["verdict"] == UNMEASURED


@pytest.mark.parametrize(("share", "expected"), [(0.2, HOLDS), (0.5, UNTOLD), (None, UNTOLD)])
def test_a_gate_may_ask_a_row_of_a_table_for_little_of_a_measure(share: float | None, expected: str) -> None:
    pair = {"mean": 0.5, "low": 0.4, "high": 0.6, "first": 0.9, "second": 0.4}
    report = {
        "differences": {"stated_match": {"diffusion - ar": pair}},
        "priors": {},
        "curves": {},
        "tables": {"Binding": {"GLIDE": {"metrics": {"colors_swapped": {"mean": share}}}}},
    }
    gate = {
        "table": "Binding",
        "line": "GLIDE",
        "measure": "colors_swapped",
        "at_most": 0.25,
        "else": "train it longer",
    }
    (claim,) = judge(report, [CLAIM | {"test": "difference", "measures": ["stated_match"]}], gate)
    assert claim["verdict"] == expected
    assert ("25.0 % or less needed; train it longer" in claim["ours"]) == (expected == UNTOLD)


def test_better_than_all_others_needs_every_one(report: dict[str, Any]) -> None:
    """A setting that was not measured, or not in this measure, leaves the claim without a verdict."""
    known = {"mean": 0.05, "low": 0.04, "high": 0.06}
    unknown = dict.fromkeys(known)
    sides = {"paper": {"mean": 0.9}, "other": {"mean": 0.85}}
    lines = [
        {
            "title": title,
            "paper": "a",
            "other": "b",
            "seeds": [1],
            "measures": {"stated_match": sides | {"difference": d}},
        }
        for title, d in (("first", known), ("second", unknown))
    ]
    claim = {"test": "ablation", "titles": ["first", "second"], "measures": ["stated_match"]}
    assert judged({**report, "ablations": lines}, **claim)["verdict"] == UNMEASURED
    assert judged({**report, "ablations": lines[:1]}, **claim | {"titles": ["first"]})["verdict"] == HOLDS


def test_deltas_are_those_of_the_rule() -> None:
    rows = {name: {"metrics": {"embed_fd": {"mean": x}}} for name, x in (("ceiling", 0.0), ("text", 0.2))}
    assert delta_of({"priors": rows}, "embed_fd") == pytest.approx(0.02)
    rows["true posterior"] = {"metrics": {"embed_fd": {"mean": 0.1}}}
    assert delta_of({"priors": rows}, "embed_fd") == pytest.approx(0.01)
    assert delta_of({"priors": {}}, "embed_fd") is None
    assert delta_of({"priors": rows}, "kid_judge") is None  # not measured
    shares = {name for name, measure in MEASURES.items() if measure.percent}
    assert {MEASURES[name].delta for name in shares} == {0.01}
    assert {MEASURES[name].delta for name in ("cos_true", "cos_samples", "text_cos")} == {0.01}
    assert (MEASURES["clip_score"].delta, WIN_DELTA) == (1.0, 0.03)  # 100 times a cosine; 3 points


def test_what_is_open_says_what_would_close_it() -> None:
    wide = {"mean": 0.0, "low": -0.03, "high": 0.03}
    assert cost_of(wide, 0.01) == "open: the half-width is 3.0 δ, so it takes at least 9 times the seeds and captions"
    assert "is 1.1 δ, so it takes at least 1.2 times the" in cost_of({"mean": 0.0, "low": -0.011, "high": 0.011}, 0.01)
    assert "within δ" in cost_of({"mean": 0.01, "low": -0.001, "high": 0.015}, 0.01)
    assert cost_of(wide, None) == ""


def test_a_difference_within_delta_may_be_one_all_the_same(report: dict[str, Any]) -> None:
    row = {"test": "difference", "measures": ["clip_score"]}
    for low, high, clear in ((0.2, 0.4, True), (-0.2, 0.4, False)):
        moved = {"clip_score": {"diffusion - ar": {"mean": 0.3, "low": low, "high": high, "first": 1.3, "second": 1.0}}}
        told = judged({**report, "differences": moved}, **row)
        assert told["verdict"] == EQUAL
        assert ("clear of 0, and within δ" in told["ours"]) is clear


def test_a_token_that_is_ignored_decides_nothing(report: dict[str, Any]) -> None:
    row = {"test": "ablation", "titles": ["dot token"], "measures": ["embed_kid"], "obeyed": "ar"}
    asked = report["priors"]["ar"]["metrics"]["dot_obedience"]
    for low, untold in ((-0.1, True), (0.1, False)):
        asked |= {"mean": 0.3, "low": low, "high": 0.5}
        assert (judged(report, **row)["verdict"] == UNTOLD) is untold


@pytest.fixture
def report(study_folder: Path) -> dict[str, Any]:
    return read(study_folder)


def test_measures_that_answer_in_opposite_directions_disagree(report: dict[str, Any]) -> None:
    """The AR prior of this study recalls more, and is worse at all else."""
    row = {"test": "difference", "measures": ["clip_score", "fd_judge"]}
    assert judged(report, **row)["verdict"] == HOLDS
    report["priors"]["linear"]["metrics"]["recall"]["mean"] = 0.1  # else recall rewards the mean, and decides nothing
    against = judged(report, **row | {"measures": ["clip_score", "recall"]})
    assert against["verdict"] == DISAGREE
    assert "recall: diffusion" in against["ours"]
    assert judged(report, **row | {"measures": ["kid_judge", "clip_score"]})["verdict"] in (HOLDS, EQUAL)


def test_a_claim_whose_measure_is_not_there_is_not_measured(report: dict[str, Any]) -> None:
    for name in ("clip_score", "kid_judge"):
        report["differences"][name] = {}
    row = {"test": "difference", "measures": ["kid_judge", "fd_judge"]}
    assert judged(report, **row)["verdict"] == UNMEASURED


def test_verdicts_name_what_varied(report: dict[str, Any]) -> None:
    told = judged(report, test="difference", measures=["clip_score"])["ours"]
    assert told.endswith("varied: 3 seeds and 40 captions")
    turned = judged(report, test="difference", first="ar", second="diffusion", measures=["embed_fd"])["ours"]
    assert turned.endswith("varied: 3 seeds and 64 captions")
    assert judged(report, test="duel", measures=["residual"])["ours"].endswith("varied: 3 seeds and 40 captions")


def test_a_measure_that_ranks_the_mean_above_the_truth_decides_nothing(report: dict[str, Any]) -> None:
    row = {"test": "duel", "measures": ["clip_score", "retrieval_r1"]}
    assert judged(report, **row)["verdict"] == HOLDS
    report["priors"]["linear"]["metrics"]["clip_score"]["mean"] = 99.0
    report["duels"][0]["win_rates"]["retrieval_r1"] |= {"mean": 0.4, "low": 0.3, "high": 0.45}
    turned = judged(report, **row)
    assert turned["verdict"] == FAILS  # the other measure decides
    assert "ranks linear, which answers with the mean, above the truth" in turned["ours"]
    assert judged(report, **row | {"measures": ["clip_score"]})["verdict"] == UNTOLD
    for test in ("difference", "compute"):
        assert judged(report, test=test, measures=["clip_score"])["verdict"] == UNTOLD
    # The rule is the judge's alone: an oracle cannot be fooled by the mean.
    report["priors"]["linear"]["metrics"]["stated_match"]["mean"] = 1.0
    assert judged(report, test="duel", measures=["stated_match"])["verdict"] == HOLDS


def test_without_an_oracle_the_first_measure_that_asks_none_decides(report: dict[str, Any]) -> None:
    row = {"test": "difference", "measures": ["stated_match", "clip_score"]}
    report["differences"]["stated_match"] = {}
    assert judged(report, **row)["verdict"] == UNMEASURED  # the data can have it
    blind(report)
    assert judged(report, **row)["verdict"] == HOLDS


def blind(report: dict[str, Any]) -> None:
    """Take from a report what an oracle measures."""
    rows = [row["metrics"] for table in (report["priors"], *report["tables"].values()) for row in table.values()]
    rows += [points for lines in report["curves"].values() for points in lines.values()]
    for row in [*rows, *(duel["win_rates"] for duel in report["duels"])]:
        for name in [name for name in row if MEASURES[name].oracle]:
            del row[name]


def test_a_claim_finds_its_pair_in_either_order(report: dict[str, Any]) -> None:
    ours = {name: judged(report, test="duel", measures=[name]) for name in ("residual", "clip_score")}
    theirs = {name: judged(report, test="duel", first="ar", second="diffusion", measures=[name]) for name in ours}
    assert [found["verdict"] for found in (*ours.values(), *theirs.values())] == [HOLDS, HOLDS, FAILS, FAILS]
    assert "ar wins" in theirs["residual"]["ours"]


def test_better_than_every_other_asks_for_every_other(report: dict[str, Any]) -> None:
    others = [line["title"] for line in report["ablations"] if line["title"].startswith("dot token above")]
    assert len(others) == 3
    row = {"test": "ablation", "titles": others, "measures": ["embed_kid"]}
    assert judged(report, **row)["verdict"] != UNMEASURED
    assert judged(report, **row | {"titles": [*others, "dot token above 50 or 99 %"]})["verdict"] == UNMEASURED


def test_where_captions_determine_their_picture_diversity_cannot_be_told(report: dict[str, Any]) -> None:
    """Emoji are such data: each held-out caption has one picture, and no oracle knows a distribution."""
    (row,) = [row for row in claims_table(Path())["claims"] if row["claim"].startswith("Diversity")]
    assert judged(report, **row)["verdict"] in (HOLDS, FAILS, OPEN, EQUAL)
    blind(report)
    assert judged(report, **row) == {**judged(report, **row), "verdict": UNTOLD, "ours": row["untold"]}


def test_scores_that_float32_cannot_tell_apart_are_ties(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    ours, theirs = arm("diffusion", 0), arm("diffusion", 0)
    theirs["values"]["clip_score"] = [x * (1 + 3e-7) for x in ours["values"]["clip_score"]]
    theirs["values"]["residual"] = [x * (1 + 3e-5) for x in ours["values"]["residual"]]
    write_cell(tmp_path, "a", 0, {"diffusion": ours, "ar": theirs})
    rates = read(tmp_path)["duels"][0]["win_rates"]
    assert (rates["clip_score"]["mean"], rates["clip_score"]["ties"]) == (0.5, 40)
    assert rates["residual"]["ties"] == 0


def test_one_clip_a_side_is_never_bold(report: dict[str, Any]) -> None:
    table = ablation_table(report)
    assert table is not None
    rows = {row[0].text: row for row in table.rows}
    assert not any(cell.best for cell in rows["SAM"])
    assert any(cell.best for cell in rows["prediction"])


def line(gaps: dict[float, float], seed: int) -> dict[str, Any]:
    """Settings by their gap, with a KID of these; resamples move both alike."""
    noise = [0.0, *(0.001 * torch.randn(20, generator=torch.Generator().manual_seed(seed))).tolist()]
    return {
        f"setting {i}": {"calibration_gap": [gap + x for x in noise], "embed_kid": [kid + x for x in noise]}
        for i, (gap, kid) in enumerate(gaps.items())
    }


def write_lines(folder: Path, arm: Arm, write_cell: Write, lines: dict[str, dict[float, float]]) -> None:
    for name, gaps in lines.items():
        for seed in (0, 1):
            arms = {key: arm("ar", seed, drawn=False) | {"resamples": r} for key, r in line(gaps, 5).items()}
            write_cell(folder, f"{name}-{seed}", seed, arms, kind="frontier", series=name)


def test_lines_are_read_off_at_the_gap_that_both_reach_nearest_to_calibrated(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    """KID 0.01 + 0.1 · gap against 0.02 + 0.3 · gap, on settings that lie elsewhere: at −0.05 both are 0.005."""
    ours = {gap: 0.01 + 0.1 * gap for gap in (-0.2, -0.1, -0.05)}
    theirs = {gap: 0.02 + 0.3 * gap for gap in (-0.15, -0.08, 0.01)}
    write_lines(tmp_path, arm, write_cell, {"diffusion": ours, "ar": theirs})
    found = read(tmp_path)
    (pair,) = found["frontier"]["differences"]
    assert (pair["first"], pair["second"]) == ("ar", "diffusion")
    assert pair["at"] == pytest.approx(-0.05)
    kid = pair["measures"]["embed_kid"]
    assert (kid["first"], kid["second"]) == pytest.approx((0.005, 0.005), abs=1e-9)
    assert kid["mean"] == pytest.approx(0, abs=1e-9)
    assert [p["calibration_gap"]["mean"] for p in found["frontier"]["points"]["ar"]] == pytest.approx(
        [-0.15, -0.08, 0.01]
    )
    row = {"test": "frontier", "measures": ["probe_match", "embed_kid"], "first": "ar", "second": "diffusion"}
    assert judged(found, **row)["verdict"] in (OPEN, EQUAL)
    assert judged(found, **row)["ours"].startswith("At a gap of the cosines of -0.050\nKID, embeddings: ar 0.00500")
    assert judged(found, **row | {"first": "linear"})["verdict"] == UNMEASURED


def test_a_setting_that_a_mixture_of_two_others_beats_is_not_on_the_frontier(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    """KID 0.9 at −0.1 lies above the line from 0.3 at −0.2 to 0.5 at 0; at −0.05 that line has 0.45."""
    lines = {"diffusion": {-0.2: 0.3, -0.1: 0.9, 0.0: 0.5}, "ar": {-0.3: 0.1, -0.05: 0.2}}
    write_lines(tmp_path, arm, write_cell, lines)
    found = read(tmp_path)["frontier"]
    (pair,) = found["differences"]
    assert pair["at"] == pytest.approx(-0.05)
    kid = pair["measures"]["embed_kid"]
    assert (kid["first"], kid["second"]) == pytest.approx((0.2, 0.45))
    assert found["hulls"]["diffusion"]["embed_kid"] == [0, 2]


def test_at_the_end_of_a_frontier_the_noise_of_the_gap_counts(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Resamples move gap and KID alike, by x; on a line of slope 3 a KID at a fixed gap moves by x − 3 x."""
    write_lines(tmp_path, arm, write_cell, {"diffusion": {-0.2: 0.3, -0.1: 0.6}, "ar": {-0.15: 0.0, 0.0: 0.0}})
    (pair,) = read(tmp_path)["frontier"]["differences"]
    assert pair["at"] == pytest.approx(-0.1)
    noise = torch.tensor(line({0.0: 0.0}, 5)["setting 0"]["embed_kid"])
    expected = crossed_resamples((3 * noise - 0.6).expand(2, -1))  # the other line is flat: it moves by x alone
    kid = pair["measures"]["embed_kid"]
    assert [kid["mean"], kid["low"], kid["high"]] == pytest.approx([expected.mean, expected.low, expected.high])


@pytest.mark.parametrize("distance", ["embed_kid", "embed_fd"])
def test_a_setting_drawn_by_lot_is_no_further_from_the_truth_than_the_mean(distance: str) -> None:
    """Two clouds left and right of the truth, whose mixture lies between: the distances are convex."""
    torch.manual_seed(0)
    true, noise = (normalize(torch.randn(4_000, 4) + 3, dim=1) for _ in range(2))
    shift = torch.tensor([1.0, -1.0, 0.0, 0.0])
    first, second = normalize(noise + shift, dim=1), normalize(noise - shift, dim=1)
    mixed = torch.where(torch.arange(4_000)[:, None] % 2 == 0, first, second)
    ends, middle = [far(distance, true, cloud) for cloud in (first, second)], far(distance, true, mixed)
    assert middle < sum(ends) / 2


def far(distance: str, true: Tensor, cloud: Tensor) -> float:
    if distance == "embed_fd":
        moments = [(x.mean(0), x.T.cov()) for x in (true.double(), cloud.double())]
        return frechet_distance(*moments[0], *moments[1]).item()
    return kernel_values(true, {"cloud": cloud})["cloud"].mean().item()


def test_lines_that_share_no_gap_are_not_compared(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    lines = {"diffusion": {-0.2: 1.0, -0.1: 2.0}, "ar": {0.0: 1.0, 0.1: 2.0}}
    write_lines(tmp_path, arm, write_cell, lines)
    assert read(tmp_path)["frontier"]["differences"] == []


def test_cells_of_the_first_round_have_distances_without_bias(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    one = arm("diffusion", 0)
    write_cell(tmp_path, "a", 0, {"diffusion": one})
    stored = json.loads((tmp_path / "cells" / "a.json").read_text())["arms"]["diffusion"]["resamples"]["fd_judge"]
    metrics = read(tmp_path)["priors"]["diffusion"]["metrics"]
    assert metrics["fd_judge"]["mean"] == pytest.approx(stored[0])
    expected = 2 * stored[0] - sum(stored[1:]) / len(stored[1:])
    assert metrics["fd_judge_corrected"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert "kid_judge" in metrics


def guided(arm: Arm, gap: float, match: float) -> dict[str, Any]:
    """A point of a curve: how diverse it is, and how often right."""
    values = {"diversity_gap": [gap + 0.01 * i for i in range(6)], "stated_match": [match] * 40}
    return arm("ar", 0) | {"values": values, "resamples": {"kid_judge": [gap + 0.001 * i for i in range(21)]}}


GUIDED = {"unCLIP": {1: (0.1, 0.8), 4: (0.2, 1.0)}, "GLIDE": {1: (0.05, 0.7), 4: (0.45, 0.9)}}
NAMED = {"curve": "decoder guidance", "measures": ["diversity_gap", "kid_judge"]}


def guidance_study(folder: Path, arm: Arm, write_cell: Write) -> None:
    for series, points in GUIDED.items():
        for x, (gap, match) in points.items():
            fields = {"kind": "curve", "title": "decoder guidance", "series": series, "x": float(x)}
            write_cell(folder, f"{series}-{x}", 0, {"any": guided(arm, gap, match)}, **fields)


def test_what_a_curve_costs_is_compared_from_where_each_side_starts(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    """From .1 to .2 against from .05 to .45: +.1 and +.4, though the first side started higher."""
    guidance_study(tmp_path, arm, write_cell)
    study = read_study(tmp_path, [])
    named = [NAMED | {"title": "cost", "paper": ["unCLIP", 4], "other": ["GLIDE", 4], "from": 1}]
    (found,) = ablations(study.arms, named)
    assert (found["paper"], found["other"], set(found["measures"])) == ("unCLIP", "GLIDE", set(NAMED["measures"]))
    for values in found["measures"].values():
        means = [values[side]["mean"] for side in ("paper", "other", "difference")]
        assert means == pytest.approx([0.1, 0.4, -0.3])
    assert ablations(study.arms, [named[0] | {"from": 3}]) == []


def test_two_curves_are_compared_where_they_match_captions_equally(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Both reach a match of .9, the first half way from .1 to .2, the second at its end, .45."""
    guidance_study(tmp_path, arm, write_cell)
    named = NAMED | {"title": "equal", "paper": "unCLIP", "other": "GLIDE", "at": "stated_match"}
    arms = read_study(tmp_path, []).arms
    (found,) = at_equal(arms, [named, {"title": "another", "paper": "a", "other": "b"}])
    gap = found["measures"]["kid_judge"]
    assert [gap[side]["mean"] for side in ("paper", "other")] == pytest.approx([0.15, 0.45])
    assert gap["difference"]["mean"] == pytest.approx(-0.3)
    assert found["measures"]["diversity_gap"]["difference"]["mean"] == pytest.approx(-0.3)
    assert ablations(arms, [named]) == []
    assert at_equal(arms, [named | {"other": "nobody"}]) == []
    assert never_equal(arms, [named, named | {"other": "nobody"}]) == {}


def test_curves_that_are_nowhere_equal_cannot_be_told_apart_there(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """One matches captions worse at every setting. Its claim says so, and not that nothing was measured."""
    guidance_study(tmp_path, arm, write_cell)
    fields = {"kind": "curve", "title": "decoder guidance", "series": "weak"}
    for x, match in ((1.0, 0.5), (4.0, 0.6)):
        write_cell(tmp_path, f"weak-{x}", 0, {"any": guided(arm, 0.1, match)}, **fields, x=x)
    named = NAMED | {"title": "equal", "paper": "unCLIP", "other": "weak", "at": "stated_match"}
    arms = read_study(tmp_path, []).arms
    assert at_equal(arms, [named]) == []
    told = "stated attributes %: unCLIP from 80.0 to 100.0, weak from 50.0 to 60.0; at no setting are the two equal"
    found = never_equal(arms, [named])
    assert found == {"equal": told}
    claim = {"test": "ablation", "titles": ["equal"], "measures": ["diversity_gap"]}
    judgement = judged({"ablations": [], "never_equal": found}, **claim)
    assert (judgement["verdict"], judgement["ours"]) == (UNTOLD, told)


def test_a_study_without_priors_has_a_report_in_its_own_words(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    guidance_study(tmp_path, arm, write_cell)
    words = {"title": "Of guidance", "introduction": "Two decoders."}
    (tmp_path / "claims.yaml").write_text(json.dumps({"words": words}))
    report = draw(tmp_path)
    assert report["meta"]["training_seeds"] == 1
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(f"# Of guidance: {tmp_path.name}\n\nTwo decoders.")
    assert "plots/curve-decoder-guidance.png" in page
    assert "## Cost" not in page
