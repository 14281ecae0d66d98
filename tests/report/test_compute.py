"""Quality for compute: fitted slopes, their interval, and what becomes of an excess that is not positive."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip_pl.errors import InputError
from unclip_pl.metrics.crossed import crossed_resamples
from unclip_pl.report.compute import EXCESS, compute, exponent
from unclip_pl.report.page import markdown_table
from unclip_pl.report.plots import draw_compute
from unclip_pl.report.study import read_study
from unclip_pl.report.tables import excess_table, slope_table

Write = Callable[..., None]
FLOPS = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]) * 1e13
RESAMPLES, STUDIES = 8, 200


def test_a_power_law_has_its_own_exponent_and_nothing_is_left_out() -> None:
    for slope in (-1.5, -0.3, 0.0, 0.7):
        law = 3e-3 * (FLOPS.double() / 1e13) ** slope
        assert exponent(FLOPS, law).item() == pytest.approx(slope, abs=1e-9)
        fitted = exponent(FLOPS * 7, 1e4 * law.expand(2, 3, 5))  # units change nothing
        assert (fitted - slope).abs().max() < 1e-9
    falling = torch.tensor([4.0, 2.0, 1.0, 0.5, -0.2])
    lower, without = exponent(FLOPS, falling), exponent(FLOPS[:4], falling[:4])
    assert lower < without - 0.05  # a last point below 0 makes the slope steeper: it counts
    share = torch.softmax(lower * FLOPS.double().log(), dim=0) * falling.sum()
    for weight in (torch.ones(5), FLOPS.double().log()):  # the equations of Poisson's likelihood
        assert (weight * share).sum().item() == pytest.approx((weight * falling).sum().item())


@pytest.mark.parametrize("excess", [[-1.0, -1.0, 0.5, 0.2, 0.1], [1.0, 0.1, 0.0, 0.0, -0.5], [0.0] * 5])
def test_where_no_power_law_fits_there_is_no_slope(excess: list[float]) -> None:
    assert math.isnan(exponent(FLOPS, torch.tensor(excess)).item())


def test_the_interval_holds_the_slope_as_often_as_it_says() -> None:
    """Noise of captions is common to all seeds, as in cells; the bootstrap draws it again."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    law = 2e-3 * (FLOPS.double() / 1e13) ** -0.4
    estimate = law * (1 + 0.1 * noise(STUDIES, 3, 1, 5)) + 1e-4 * noise(STUDIES, 1, 1, 5)
    resamples = estimate + 1e-4 * noise(STUDIES, 1, 50, 5)
    slopes = exponent(FLOPS, torch.cat([estimate, resamples], dim=2))
    inside = sum(low < -0.4 < high for _, low, high in map(crossed_resamples, slopes))
    assert 0.92 < inside / STUDIES <= 1


def cell(excess: float, flops: float) -> dict[str, Any]:
    """An arm whose excess over the perfect prior is the same number in every measure."""
    flat = {
        "embed_fd": 0.002 + excess, "embed_kid": 0.001 + excess, "cos_samples": 0.7 + excess, "cos_true": 0.7,
        "calibration_gap": 0.0, "cos_mean": 0.7, "text_cos": 0.7,
    }  # fmt: skip
    costs = ("parameters", "training_steps", "training_samples", "training_seconds", "evaluations")
    return {
        "values": {}, "resamples": {name: [value] * (1 + RESAMPLES) for name, value in flat.items()}, "class": "Prior",
        "reference": flops == 0, "lr": None, "config_hash": None, "sampling": {}, "seconds_per_embedding": 0.0,
        "training_flops": flops, "flops_per_embedding": 1e6, **dict.fromkeys(costs, 0),
    }  # fmt: skip


def write(
    folder: Path, write_cell: Write, slopes: dict[str, float], last: float | None = None, reachable: float = 0.0
) -> dict[str, Any]:
    """A study of power laws over what training shows, and what is found of its trainings.

    Args:
        folder: folder of the study.
        write_cell: writes a cell.
        slopes: contender → exponent.
        last: excess at the largest budget, in place of the law's.
        reachable: excess of the perfect prior of the training pictures.
    """
    for seed in (1, 2, 3):
        write_cell(folder, f"posterior-{seed}", seed, {"true posterior": cell(0.0, 0.0)})
        if reachable:
            write_cell(folder, f"seen-{seed}", seed, {"seen posterior": cell(reachable, 0.0)})
        for name, slope in slopes.items():
            for x in (0.5, 1, 2, 4, 8):
                excess = last if last is not None and x == 8 else reachable + 1e-3 * x**slope
                fields = {"kind": "curve", "title": "training budget", "series": name, "x": x}
                write_cell(folder, f"{name}-{x:g}-{seed}", seed, {name: cell(excess, 1e13 * x)}, **fields)
    return compute(read_study(folder, []).arms)["training budget"]


def test_cells_give_the_slopes_that_they_were_made_with(tmp_path: Path, write_cell: Write) -> None:
    slopes = {"diffusion": -0.5, "ar": -0.25}
    found = write(tmp_path, write_cell, slopes)
    assert set(found) == set(slopes)
    for name, slope in slopes.items():
        for measure in EXCESS:
            fitted = found[name]["slopes"][measure]
            assert fitted["seeds"] == [1, 2, 3]
            assert [fitted[end] for end in ("mean", "low", "high")] == pytest.approx([slope] * 3, abs=1e-6)
            assert fitted["start"] == pytest.approx(1e-3 * 0.5**slope)
        assert [point["x"] for point in found[name]["points"]] == [0.5, 1, 2, 4, 8]


def test_over_what_training_shows_the_law_is_straight_and_over_the_perfect_prior_it_is_not(
    tmp_path: Path, write_cell: Write
) -> None:
    lines = write(tmp_path, write_cell, {"flow": -0.5}, reachable=4e-4)
    line = lines["flow"]
    assert line["reachable"]["mean_error"]["mean"] == pytest.approx(4e-4)
    for measure in EXCESS:
        assert line["reducible"][measure]["mean"] == pytest.approx(-0.5, abs=1e-6)
        assert -0.35 < line["slopes"][measure]["mean"] < -0.2
    table = slope_table({"compute": {"training budget": lines}})
    assert table is not None
    assert [row[2].text for row in table.rows] == ["perfect prior", "perfect prior of the training pictures"]


def test_seeds_that_a_budget_lacks_do_not_hide_it(tmp_path: Path, write_cell: Write) -> None:
    write(tmp_path, write_cell, {"ar": -0.5})
    (tmp_path / "cells" / "ar-8-3.json").unlink()
    line = compute(read_study(tmp_path, []).arms)["training budget"]["ar"]
    assert [point["seeds"] for point in line["points"]] == [[1, 2, 3]] * 4 + [[1, 2]]
    assert line["slopes"]["embed_kid"]["seeds"] == [1, 2]


def test_a_point_below_zero_is_shown_and_counts(tmp_path: Path, write_cell: Write) -> None:
    lines = write(tmp_path, write_cell, {"flow": -0.5}, last=-1e-4)
    assert lines["flow"]["points"][-1]["excess"]["embed_kid"]["mean"] == pytest.approx(-1e-4)
    slope = lines["flow"]["slopes"]["embed_kid"]["mean"]
    assert slope < -0.55
    found = {"compute": {"training budget": lines}, "priors": {}}
    slopes, points = slope_table(found), excess_table(found)
    assert slopes is not None
    assert points is not None
    assert f"| flow 5 points | perfect prior | {slope:+.2f} [{slope:+.2f}, {slope:+.2f}], 3 seeds |" in markdown_table(
        slopes
    )
    assert "| training budget 8 flow | 8.00e+13 3 seeds | -0.10 [-0.10, -0.10] |" in markdown_table(points)
    assert [len(axes.lines) for axes in draw_compute(found).axes] == [7] * 3  # points, 4 bars, a triangle, the law


def test_curves_on_other_captions_than_the_perfect_priors_are_refused(tmp_path: Path, write_cell: Write) -> None:
    write(tmp_path, write_cell, {"ar": -0.5})
    for path in (tmp_path / "cells").glob("posterior-*.json"):
        content = json.loads(path.read_text())
        content["counts"]["rows"] = 63
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the perfect prior's captions. Got .*: measure again"):
        compute(read_study(tmp_path, []).arms)
