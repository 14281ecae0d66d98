"""A study's numbers and verdicts, from cells whose truth is known."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.evaluation.measures import within_shares
from unclip_pl.metrics.interval import Interval, mean_interval, share_interval
from unclip_pl.report import draw
from unclip_pl.report.claims import (
    DISAGREE,
    EQUAL,
    FAILS,
    HOLDS,
    OPEN,
    UNMEASURED,
    UNTOLD,
    claims_table,
    difference,
    judge,
    verdict,
)
from unclip_pl.report.frontier import frontier
from unclip_pl.report.study import distinct, metrics, read_study, rows_of, study_report, with_baselines
from unclip_pl.report.tables import sample_sizes, summary

Write, Arm = Callable[..., None], Callable[..., dict[str, Any]]
CAPTIONS, MANY = 40, 6
MEANS = {"stated_match": (0.95, -0.03), "clip_score": (65.0, -2.0), "residual": (0.05, 0.004), "recall": (0.8, 0.02)}


def reduce(folder: Path) -> dict[str, Any]:
    """The report of a folder, without drawing it."""
    paper = claims_table(folder)
    study = with_baselines(read_study(folder, paper["order"], paper["beside"]), paper["baselines"])
    report = study_report(study, paper) | {"frontier": frontier(study.arms, rows_of(study.arms))}
    return report | {"claims": judge(report, paper["claims"])}


@pytest.fixture(scope="module")
def report(study_folder: Path) -> dict[str, Any]:
    return reduce(study_folder)


def found(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {claim["claim"]: claim for claim in report["claims"]}


def test_the_first_lines_say_how_many_seeds_rows_have_and_leave_out_a_network_beside_itself(
    tmp_path: Path, write_cell: Write, arm: Arm
) -> None:
    """One prior has two seeds more. One network stands in two rows, with steps of sampling of its own in each."""
    unguided = {"sampling": {"class": "Prior", "guidance": 1}}
    for name, prior, seeds in (("diffusion", "diffusion", 5), ("ar", "ar", 3), ("diffusion, 8 steps", "diffusion", 3)):
        for seed in range(seeds):
            write_cell(tmp_path, f"{name}-{seed}", seed, {name: arm(prior, seed) | unguided})
    report = reduce(tmp_path)
    assert sample_sizes(report).startswith("3 to 5 training seeds, ")
    cost = next(sentence for sentence in summary(report) if "training FLOPs" in sentence)
    assert "0.60 times the training FLOPs of ar" in cost
    assert "8 steps" not in cost


def test_the_first_lines_rank_by_what_the_first_contender_has(tmp_path: Path, write_cell: Write, arm: Arm) -> None:
    """It is measured in embeddings alone, and its references in pictures too."""
    for seed in range(3):
        write_cell(tmp_path, f"prior-{seed}", seed, {"diffusion": arm("diffusion", seed, drawn=False)})
        references = {name: arm(name, seed, worse) for name, worse in (("linear", 0.3), ("text", 3.0))}
        write_cell(tmp_path, f"reference-{seed}", seed, references)
    ranks, *further = summary(reduce(tmp_path))
    assert ranks.startswith("FD without bias, embeddings, best first: ")
    assert ranks.index("diffusion") < ranks.index("linear") < ranks.index("text")
    assert not any("head to head" in sentence for sentence in further)


def test_rows_have_the_numbers_that_were_put_in(report: dict[str, Any]) -> None:
    assert report["meta"]["training_seeds"] == 3
    names = ["diffusion", "ar", "linear", "text", "ceiling", "diffusion (matched)", "ar (matched)"]
    assert list(report["priors"]) == names
    for name, worse in (("diffusion", 0.0), ("ar", 1.0)):
        for measure, (mean, apart) in MEANS.items():
            value = report["priors"][name]["metrics"][measure]
            assert value["low"] < value["mean"] < value["high"]
            assert value["mean"] == pytest.approx(mean + worse * apart, abs=0.3 * abs(apart))


def test_one_training_seed_gives_the_interval_over_captions(arm: Arm) -> None:
    values = arm("diffusion", 0)
    interval = metrics({0: values})["clip_score"]
    assert interval == pytest.approx(mean_interval(torch.tensor(values["values"]["clip_score"])))


def test_a_run_that_had_to_wait_and_a_cell_of_few_captions_do_not_speak_for_all(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    """Seconds are a median with its range; the counts in the heading are the tables'."""
    for seed in range(3):
        slow = arm("ar", seed) | ({"training_seconds": 9000.0} if seed == 1 else {})
        write_cell(tmp_path, f"ar-{seed}", seed, {"ar": slow})
    fields = {"kind": "ablation", "title": "prediction", "series": "eps"}
    counts = {"rows": 64, "captions": 2, "many": 0, "seeds": 2, "resamples": 20, "many_samples": 4}
    write_cell(tmp_path, "few", 9, {"ar": arm("ar", 9)}, counts=counts, **fields)
    report = reduce(tmp_path)
    assert report["priors"]["ar"]["training_seconds"] == 132
    assert report["priors"]["ar"]["training_seconds_range"] == [130, 9000]
    assert (report["meta"]["counts"]["captions"], report["meta"]["counts"]["many"]) == (CAPTIONS, MANY)


def test_every_pair_of_contenders_duels_and_the_ceiling_does_not(report: dict[str, Any]) -> None:
    pairs = [(duel["first"], duel["second"]) for duel in report["duels"] if not duel["matched"]]
    assert pairs == [
        ("diffusion", "ar"), ("diffusion", "linear"), ("diffusion", "text"), ("ar", "linear"), ("ar", "text"),
        ("linear", "text"),
    ]  # fmt: skip
    assert [(d["first"], d["second"], d["seeds"]) for d in report["duels"] if d["matched"]] == [("diffusion", "ar", 3)]


def test_a_users_prior_has_its_row_and_its_duels(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for seed in range(2):
        write_cell(tmp_path, f"a-{seed}", seed, {"mine": arm("mine", seed), "ar": arm("ar", seed, 1.0)})
    report = reduce(tmp_path)
    assert list(report["priors"]) == ["ar", "mine"]  # what the paper names comes first
    assert [(duel["first"], duel["second"]) for duel in report["duels"]] == [("ar", "mine")]
    assert report["duels"][0]["win_rates"]["clip_score"]["mean"] < 0.1


def test_head_to_head_sees_who_is_better_and_the_papers_interval_is_the_narrower(report: dict[str, Any]) -> None:
    rates = report["duels"][0]["win_rates"]
    for measure, higher in (("stated_match", True), ("residual", True), ("clip_score", True), ("recall", False)):
        assert (rates[measure]["mean"] > 0.9) == higher, measure
        assert rates[measure]["p"] < 0.01, measure
        assert rates[measure]["wins"] + rates[measure]["losses"] + rates[measure]["ties"] == 40
    for rate in rates.values():
        assert rate["high"] - rate["low"] >= rate["normal"]["high"] - rate["normal"]["low"] - 1e-12


def test_shares_stay_shares_in_every_interval(report: dict[str, Any]) -> None:
    from unclip_pl.evaluation.measures import MEASURES

    intervals = [v for duel in report["duels"] for rate in duel["win_rates"].values() for v in (rate, rate["normal"])]
    tables = [report["priors"], *report["tables"].values()]
    intervals += [
        value
        for rows in tables
        for row in rows.values()
        for name, value in row["metrics"].items()
        if MEASURES[name].percent
    ]
    assert all(
        0 <= value["low"] <= value["mean"] <= value["high"] <= 1 for value in intervals if value["low"] is not None
    )


def test_a_difference_is_that_of_the_means_beside_it_at_the_seeds_that_both_have(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    for seed in range(4):
        write_cell(tmp_path, f"d-{seed}", seed, {"diffusion": arm("diffusion", seed)})
    for seed in range(2):
        write_cell(tmp_path, f"r-{seed}", seed, {"linear": arm("linear", seed, 0.3)})
    report = reduce(tmp_path)
    for measure in ("stated_match", "fd_judge", "cos_true"):
        pair, turned = (
            difference(report, measure, *names) for names in (("linear", "diffusion"), ("diffusion", "linear"))
        )
        assert pair is not None
        assert turned is not None
        assert pair["mean"] == pytest.approx(pair["first"] - pair["second"])
        assert (pair["low"], pair["first"]) == (-turned["high"], turned["second"])
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
    assert within_shares(Interval(mean, low, high), captions) == pytest.approx((mean, *expected))


def test_spaces_of_different_clips_are_compared_by_attributes_alone(report: dict[str, Any]) -> None:
    lines = {line["title"]: line["measures"] for line in report["ablations"]}
    assert list(lines["SAM"]) == ["probe_match"]
    assert len(lines["prediction"]) > 5
    assert report["spaces"]["with SAM"]["effective_rank"] == 12


def test_two_bases_are_not_mixed(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"ar": arm("ar", 0)})
    write_cell(tmp_path, "b", 1, {"ar": arm("ar", 1)}, base="another")
    with pytest.raises(ValueError, match=r"one base.*base \(a\.json\), another \(b\.json\)"):
        read_study(tmp_path, [])


def test_two_judges_are_not_mixed(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for seed, name in enumerate(("one", "", "one")):  # embeddings alone have no judge
        write_cell(tmp_path, f"{seed}", seed, {"ar": arm("ar", seed)}, judge=name)
    read_study(tmp_path, [])
    write_cell(tmp_path, "2", 2, {"ar": arm("ar", 2)}, judge="another")
    with pytest.raises(ValueError, match=r"one judge\. Got one \(0\.json\), another \(2\.json\)"):
        read_study(tmp_path, [])


@pytest.mark.parametrize("name", ["counts", "sampling", "lr", "measures"])
def test_seeds_that_were_not_measured_alike_are_an_error(
    name: str, tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    write_cell(tmp_path, "a", 0, {"ar": arm("ar", 0)})
    other, counts = arm("ar", 1), json.loads((tmp_path / "cells" / "a.json").read_text())["counts"]
    other |= {"sampling": {"sampling": {"class": "Prior", "guidance": 3.0}}, "lr": {"lr": 0.5}}.get(name, {})
    if name == "measures":
        del other["values"]["recall"]
    write_cell(tmp_path, "b", 1, {"ar": other}, counts=counts | ({"rows": 63} if name == "counts" else {}))
    with pytest.raises(
        ValueError, match=rf"the same {name} at every training seed of 'ar' \(prior\).* in a\.json.* in b\.json"
    ):
        read_study(tmp_path, [])


def test_accuracy_by_attribute_is_that_of_all_seeds(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for seed, share in enumerate((0.9, 0.8, 1.0)):
        write_cell(tmp_path, f"{seed}", seed, {"ar": arm("ar", seed) | {"attributes": {"color": share}}})
    assert reduce(tmp_path)["priors"]["ar"]["attributes"]["color"] == pytest.approx(0.9)


def test_a_prior_that_diverged_has_a_row_without_a_distance(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    lost = arm("ar", 0)
    lost["resamples"] |= {name: [None] * len(lost["resamples"][name]) for name in ("embed_fd", "fd_judge", "embed_kid")}
    write_cell(tmp_path, "a", 0, {"ar": lost, "diffusion": arm("diffusion", 0)})
    report = reduce(tmp_path)
    assert report["priors"]["ar"]["metrics"]["embed_fd_corrected"]["mean"] is None
    assert report["priors"]["diffusion"]["metrics"]["embed_fd_corrected"]["mean"] is not None


def test_a_setting_that_diverged_leaves_the_report_whole(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """None of its numbers is one. It is on no frontier, and its ablation says nothing."""
    lost = arm("ar", 0, drawn=False)
    lost["resamples"] = {name: [None] * len(numbers) for name, numbers in lost["resamples"].items()}
    points = {"1": arm("ar", 0, drawn=False), "2": lost, "4": arm("ar", 0, 0.5, drawn=False)}
    write_cell(tmp_path, "a", 0, {"diffusion": arm("diffusion", 0, drawn=False), "ar": lost})
    write_cell(tmp_path, "b", 0, points, kind="curve", title="prior guidance", series="ar")
    report = draw(tmp_path)
    assert len(report["frontier"]["points"]["ar"]) == 2
    assert (tmp_path / "report.html").is_file()


def test_a_share_that_no_spread_surrounds_is_not_certain(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Eight pictures have all parts, and in none of them anything is swapped."""
    scenes = arm("ar", 0)
    scenes["values"] = {"parts_right": [1.0] * 8 + [0.0] * 32}
    scenes["resamples"] = {"swapped": [0.0] * 21, "probe_match": [1.0] * 21}
    write_cell(tmp_path, "a", 0, {"ar": scenes})
    found = reduce(tmp_path)["priors"]["ar"]["metrics"]
    assert found["swapped"] == pytest.approx(share_interval(0.0, 8)._asdict())
    assert found["probe_match"] == pytest.approx(share_interval(1.0, 64)._asdict())


def test_captions_behind_a_number_are_counted(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Rows of embeddings, captions that were drawn, and the first 512 where a prior is asked for more."""
    counts = {"rows": 2048, "captions": 40, "many": 6, "seeds": 2, "resamples": 20, "many_samples": 4}
    for seed in (0, 1):
        arms = {name: arm(name, seed) for name in ("diffusion", "ar")}
        write_cell(tmp_path, f"{seed}", seed, arms, counts=counts)
    found = {
        name: pairs["diffusion - ar"]["captions"] for name, pairs in reduce(tmp_path)["differences"].items() if pairs
    }
    expected = {"embed_fd_corrected": 2048, "fd_judge_corrected": 40, "nats": 512, "clip_score": 40}
    assert {name: found[name] for name in expected} == expected


def test_other_captions_of_the_same_number_are_not_paired(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 1, {"diffusion": arm("diffusion", 1)}, heldout="these")
    write_cell(tmp_path, "b", 1, {"ar": arm("ar", 1)}, heldout="these")
    before = reduce(tmp_path)
    assert before["differences"]["embed_kid"]
    assert before["duels"][0]["win_rates"]["clip_score"]
    write_cell(tmp_path, "b", 1, {"ar": arm("ar", 1)}, heldout="others")
    after = reduce(tmp_path)
    assert (after["differences"]["embed_kid"], after["duels"]) == ({}, [])


def test_what_is_measured_of_one_network_at_every_seed_varies_by_caption_alone(
    tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    for seed in range(3):
        write_cell(tmp_path, f"{seed}", seed, {name: arm(name, 0) for name in ("linear", "text")})
        write_cell(tmp_path, f"trained-{seed}", seed, {"ar": arm("ar", seed)})
    found = reduce(tmp_path)["differences"]["clip_score"]
    seeds = {name: pair["seeds"] for name, pair in found.items()}
    assert (seeds["linear - text"], seeds["ar - linear"], found["linear - text"]["captions"]) == (1, 3, CAPTIONS)


def test_seeds_of_an_arm_answer_the_same_captions(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for seed, heldout in enumerate(("these", "others")):
        write_cell(tmp_path, f"{seed}", seed, {"ar": arm("ar", seed)}, heldout=heldout)
    with pytest.raises(InputError, match="the same held-out captions at every training seed of 'ar'"):
        read_study(tmp_path, [])


def test_rows_of_more_captions_and_of_fewer_do_not_duel(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    few = arm("ar", 1)
    few["values"] = {name: numbers[:5] for name, numbers in few["values"].items()}
    write_cell(tmp_path, "a", 1, {"diffusion": arm("diffusion", 1)})
    write_cell(tmp_path, "b", 1, {"ar": few})
    assert reduce(tmp_path)["duels"] == []


def test_two_cells_of_one_arm_and_seed_are_an_error(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"ar": arm("ar", 0)})
    write_cell(tmp_path, "b", 0, {"ar": arm("ar", 0)})
    with pytest.raises(ValueError, match=r"seed 0 of 'ar' \(prior\) in a\.json and b\.json: delete one"):
        read_study(tmp_path, [])
    write_cell(tmp_path, "b", 0, {"ar": arm("ar", 0)}, kind="matched")
    assert len(read_study(tmp_path, []).arms) == 2


def _decided(report: dict[str, Any], folder: Path, **moved: tuple[float, float]) -> str:
    """The verdict on compute, with some differences moved."""
    changed = copy.deepcopy(report)
    for measure, (low, high) in moved.items():
        changed["differences"][measure]["diffusion (matched) - ar (matched)"] |= {"low": low, "high": high}
    changed["claims"] = judge(changed, claims_table(folder)["claims"])
    return found(changed)["The diffusion prior needs less training compute"]["verdict"]


def test_less_compute_needs_nothing_worse_and_something_better(report: dict[str, Any], tmp_path: Path) -> None:
    names = ("stated_match", "clip_score", "fd_judge_corrected", "embed_fd_corrected")
    level = dict.fromkeys(names, (-9.0, 9.0))
    assert _decided(report, tmp_path) == HOLDS
    assert _decided(report, tmp_path, **level) == OPEN
    assert _decided(report, tmp_path, **dict.fromkeys(names, (-1e-9, 1e-9))) == HOLDS  # cheaper, and no difference
    assert _decided(report, tmp_path, **{**level, "fd_judge_corrected": (-2, -1)}) == HOLDS
    assert _decided(report, tmp_path, **{**level, "clip_score": (-4, -2)}) == UNTOLD  # cheaper and worse
    both = {**level, "fd_judge_corrected": (-2.0, -1.0), "clip_score": (-4.0, -2.0)}
    assert _decided(report, tmp_path, **both) == DISAGREE


def test_the_top_half_is_best_where_it_beats_every_other_share(report: dict[str, Any], tmp_path: Path) -> None:
    rows = claims_table(tmp_path)["claims"]

    def decided(*differences: tuple[float, float]) -> str:
        sides = {"paper": {"mean": 0.1}, "other": {"mean": 0.1}}
        lines = [
            {"title": f"dot token above 50 or {x} %", "paper": "0.5", "other": f"0.{x}", "seeds": [1, 2],
             "measures": {"embed_fd_corrected": sides | {"difference": {"mean": 0.0, "low": low, "high": high}}}}
            for x, (low, high) in zip((70, 85, 95), differences, strict=True)
        ]  # fmt: skip
        changed = {**report, "ablations": lines}
        changed["claims"] = judge(changed, rows)
        return found(changed)["The dot-product token is best drawn from its top half"]["verdict"]

    better, level, worse, same = (-2.0, -1.0), (-1.0, 1.0), (1.0, 2.0), (-1e-4, 1e-4)
    assert decided(better, better, better) == HOLDS
    assert decided(level, better, better) == OPEN
    assert decided(better, better, worse) == FAILS
    assert decided(better, same, better) == EQUAL


def test_a_row_that_says_the_same_is_left_out(report: dict[str, Any]) -> None:
    one = copy.deepcopy(report)
    one["priors"]["diffusion (matched)"]["metrics"]["embed_fd"]["mean"] += 0.001
    assert set(one["priors"]) - set(distinct(one)["priors"]) == {"ar (matched)"}


def test_curves_are_sorted_and_hold_an_interval_at_every_point(report: dict[str, Any]) -> None:
    points = report["curves"]["prior guidance"]["diffusion"]["embed_fd"]
    assert [point["x"] for point in points] == [1, 2, 4]
    assert all(point["low"] <= point["mean"] <= point["high"] for point in points)


def test_a_curve_of_what_is_not_a_priors_own_takes_x_from_the_cell(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Decoder guidance: one arm of one name in every cell."""
    for x, worse in ((1.0, 1.0), (2.0, 0.0), (4.0, 0.5)):
        fields = {"kind": "curve", "title": "decoder guidance", "series": "ar", "x": x}
        write_cell(tmp_path, f"{x}", 0, {"ar": arm("ar", 0, worse)}, **fields)
    points = reduce(tmp_path)["curves"]["decoder guidance"]["ar"]["stated_match"]
    assert [point["x"] for point in points] == [1, 2, 4]


def test_ablations_are_paired(report: dict[str, Any]) -> None:
    lines = {line["title"]: line for line in report["ablations"]}
    assert {"prediction", "SAM", "best of 2", "dot token", "prior guidance, ar"} <= set(lines)
    steps = lines["analytic variance, 8 steps"]
    assert (steps["paper"], steps["other"]) == ("analytic", "fixed")
    assert (lines["dot token"]["paper"], lines["dot token"]["other"]) == ("0.5", "0")
    gap = lines["prediction"]["measures"]["embed_fd"]
    assert gap["difference"]["mean"] == pytest.approx(gap["paper"]["mean"] - gap["other"]["mean"])
    assert gap["difference"]["high"] < 0


def test_a_point_of_a_curve_stands_for_a_side_of_an_ablation(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    fields = {"kind": "curve", "title": "prior guidance", "series": "diffusion"}
    write_cell(tmp_path, "curve", 0, {"1": arm("x0", 0), "2": arm("x0", 0, 2.0)}, **fields)
    write_cell(tmp_path, "eps", 0, {"eps": arm("eps", 0, 1.0)}, kind="ablation", title="prediction", series="eps")
    pair = reduce(tmp_path)["ablations"][0]
    assert (pair["title"], pair["paper"], pair["other"], pair["seeds"]) == ("prediction", "x0", "eps", [0])
    # A cell of its own comes first.
    write_cell(tmp_path, "x0", 0, {"x0": arm("x0", 0, 1.0)}, kind="ablation", title="prediction", series="x0")
    own = reduce(tmp_path)["ablations"][0]
    assert pair["measures"]["residual"]["difference"]["mean"] < own["measures"]["residual"]["difference"]["mean"]


def test_an_ablation_that_no_table_names_is_compared_all_the_same(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for name in ("deep", "wide"):
        write_cell(tmp_path, name, 0, {"mine": arm("mine", 0)}, kind="ablation", title="shape", series=name)
    assert [(line["title"], line["paper"], line["other"]) for line in reduce(tmp_path)["ablations"]] == [
        ("shape", "deep", "wide")
    ]


def test_every_claim_has_a_verdict_and_a_reason(report: dict[str, Any]) -> None:
    told = found(report)
    assert len(told) == 20
    for claim in told.values():
        assert claim["verdict"] in (HOLDS, FAILS, EQUAL, DISAGREE, OPEN, UNTOLD)
        assert all(claim[key] for key in ("claim", "source", "paper", "ours", "why"))
    assert told["Predicting z_i itself is better than predicting the noise"]["verdict"] == HOLDS
    assert told["A prior is better than feeding the decoder the text embedding"]["verdict"] == HOLDS
    assert told["A linear map is the prior with the lower FID"]["verdict"] == FAILS
    rank = told["CLIP trained with SAM spans a space of drastically lower rank"]
    assert rank["verdict"] == UNTOLD  # one CLIP a side
    assert "with SAM: effective rank 12.0" in rank["ours"]
    assert told["The diffusion prior needs less training compute"]["verdict"] == HOLDS


def test_what_was_not_measured_has_no_verdict(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"diffusion": arm("diffusion", 0)}, kind="matched")
    report = reduce(tmp_path)
    assert {claim["verdict"] for claim in report["claims"] if not claim["ours"]} == {UNMEASURED}
    assert report["duels"] == []
    assert list(report["priors"]) == ["diffusion", "diffusion (matched)"]


@pytest.mark.parametrize(("guidance", "verdict"), [(1.0, HOLDS), (1.5, UNMEASURED)])
def test_a_prior_without_guidance_has_matched_settings(
    guidance: float, verdict: str, tmp_path: Path, arm: Arm, write_cell: Write
) -> None:
    """Its own row then answers what is asked of equally many samples without guidance."""
    for seed in range(3):
        arms = {name: arm(name, seed, worse) for name, worse in (("diffusion", 0.0), ("ar", 1.0))}
        for made in arms.values():
            made["sampling"]["guidance"] = guidance
        write_cell(tmp_path, f"both-{seed}", seed, arms)
    assert found(reduce(tmp_path))["The diffusion prior needs less training compute"]["verdict"] == verdict


def test_a_study_may_have_claims_of_its_own(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    write_cell(tmp_path, "a", 0, {"mine": arm("mine", 0), "yours": arm("yours", 0, 1.0)})
    claim = {
        "claim": "mine",
        "source": "me",
        "paper": "",
        "why": "x",
        "test": "duel",
        "first": "yours",
        "second": "mine",
    }
    (tmp_path / "claims.yaml").write_text(
        json.dumps({"order": ["yours"], "claims": [claim | {"measures": ["residual"]}]})
    )
    assert [claim["verdict"] for claim in reduce(tmp_path)["claims"]] == [FAILS]
    (tmp_path / "claims.yaml").write_text(json.dumps({"claims": [claim | {"test": "guess"}]}))
    with pytest.raises(ValueError, match="Expected a test of duel"):
        claims_table(tmp_path)


def test_what_another_study_measured_is_a_row_here(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write_cell(there, "best-1", 1, {"diffusion": arm("diffusion", 1)})
    write_cell(there, "table-1", 1, {"diffusion": arm("diffusion", 1)}, kind="table", title="Needed?", series="plain")
    write_cell(here, "mine-1", 1, {"mine": arm("mine", 1, 1.0)})
    write_cell(here, "curve-1", 1, {"mine": arm("mine", 1, 1.0)}, kind="curve", title="noise", series="noisy", x=0.2)
    beside = ["../there/cells/*-1.json"]
    ours = {
        "beside": beside,
        "ablations": [{"title": "noise or none", "paper": "noise", "other": "none"}],
        "baselines": [
            {"ablation": "noise or none", "side": "noise", "curve": "noise", "series": "noisy", "x": 0.2},
            {"ablation": "noise or none", "side": "none", "table": "Needed?", "series": "plain"},
        ],
    }
    (here / "claims.yaml").write_text(json.dumps(ours))
    report = reduce(here)
    assert set(report["priors"]) == {"mine", "diffusion"}
    assert report["differences"]["embed_fd_corrected"]["mine - diffusion"]["mean"] > 0.001
    assert [(line["paper"], line["other"]) for line in report["ablations"]] == [("noise", "none")]
    cells = read_study(here, [], beside).cells
    assert len(cells) == 4
    assert all((here / "cells" / cell["file"]).with_suffix(".png").is_file() for cell in cells)
    with pytest.raises(MissingFileError, match=r"another study in .*there/cells/none-\*\.json\. Got none"):
        read_study(here, [], ["../there/cells/none-*.json"])
    write_cell(here, "again", 1, {"diffusion": arm("diffusion", 1)})
    with pytest.raises(InputError, match=r"'diffusion' \(prior\) in again\.json and .*there/cells/best-1\.json"):
        read_study(here, [], beside)


def test_arms_of_other_captions_are_not_paired(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    """Resamples of as many numbers look alike, and each is of other captions."""
    write_cell(tmp_path, "a", 1, {"diffusion": arm("diffusion", 1, drawn=False)})
    write_cell(tmp_path, "b", 1, {"ar": arm("ar", 1, drawn=False)})
    assert reduce(tmp_path)["differences"]["embed_kid"]
    fields = {"kind": "frontier", "series": "diffusion"}
    write_cell(tmp_path, "c", 1, {f"guidance {g}": arm("diffusion", 1, g) for g in (0.0, 1.0)}, **fields)
    write_cell(tmp_path, "d", 1, {f"guidance {g}": arm("ar", 1, g) for g in (0.0, 1.0)}, **fields | {"series": "ar"})
    assert reduce(tmp_path)["frontier"]["differences"]
    for name in ("b", "d"):
        path = tmp_path / "cells" / f"{name}.json"
        content = json.loads(path.read_text())
        content["counts"]["rows"] = 63
        path.write_text(json.dumps(content))
    report = reduce(tmp_path)
    assert report["differences"]["embed_kid"] == {}
    assert report["frontier"]["differences"] == []


def test_prior_against_itself_is_even(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    for seed in range(2):
        write_cell(tmp_path, f"{seed}", seed, {name: arm("same", seed) for name in ("diffusion", "ar")})
    report = reduce(tmp_path)
    rates = report["duels"][0]["win_rates"]
    assert {rate["mean"] for rate in rates.values()} == {0.5}
    assert {rate["p"] for rate in rates.values()} == {1.0}
    pair = report["differences"]["embed_fd"]["diffusion - ar"]
    assert (pair["mean"], pair["low"], pair["high"]) == (0, 0, 0)
    assert pair["first"] == pair["second"]


@pytest.mark.parametrize(
    ("low", "high", "above", "expected"),
    [(0.1, 0.2, True, HOLDS), (-0.2, -0.1, True, FAILS), (-0.1, 0.1, True, OPEN), (None, None, True, OPEN),
     (0.1, 0.2, False, FAILS), (-0.2, -0.1, False, HOLDS)],
)  # fmt: skip
def test_verdict_needs_the_whole_interval(low: float | None, high: float | None, above: bool, expected: str) -> None:
    assert verdict({"mean": 0.0, "low": low, "high": high}, above=above) == expected
    assert verdict(None, above=above) == UNMEASURED


def test_broken_and_uneven_cells_are_named(tmp_path: Path, arm: Arm, write_cell: Write) -> None:
    with pytest.raises(FileNotFoundError, match="Expected cells"):
        reduce(tmp_path)
    write_cell(tmp_path, "a", 0, {"ar": arm("ar", 0)})
    short = arm("ar", 1)
    short["values"]["recall"] = short["values"]["recall"][:-1]
    write_cell(tmp_path, "b", 1, {"ar": short})
    with pytest.raises(ValueError, match="recall of as many captions"):
        reduce(tmp_path)
    (tmp_path / "cells" / "b.json").write_text('{"group": ')
    with pytest.raises(ValueError, match=r"b\.json is broken"):
        reduce(tmp_path)
    write_cell(tmp_path, "b", 1, {"ar": short}, format=99)
    with pytest.raises(ValueError, match=r"format 1 in .*b\.json. Got 99"):
        reduce(tmp_path)
