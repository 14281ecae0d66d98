"""The report from plain data: nothing here needs a network."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unclip_pl.commands.report import report as draw_again
from unclip_pl.evaluation.claims import claims, verdict
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.report.report import Atlas, render, scalars, write_report
from unclip_pl.report.tables import metric_tables
from unclip_pl.shapes.render import draw_attributes
from unclip_pl.shapes.render import render as render_shapes

PRIORS = ("diffusion", "ar", "linear", "text", "ceiling")
#: Means in the order of PRIORS, and the half width of their intervals.
MEANS = {
    "stated_match": ((0.931, 0.902, 0.948, 0.861, 0.962), 0.012),
    "captions_right": ((0.852, 0.791, 0.883, 0.702, 0.915), 0.03),
    "unseen_match": ((0.887, 0.861, 0.912, 0.853, 0.951), 0.035),
    "clip_score": ((61.2, 59.0, 62.8, 55.1, 61.9), 0.9),
    "retrieval_r10": ((0.321, 0.294, 0.318, 0.262, 0.962), 0.04),
    "residual": ((0.0532, 0.0549, 0.0581, 0.0702, 0.0511), 0.0012),
    "fd_judge": ((0.0312, 0.0351, 0.0497, 0.0913, 0.0214), 0.003),
    "precision": ((0.781, 0.752, 0.803, 0.602, 0.812), 0.035),
    "recall": ((0.702, 0.715, 0.451, 0.402, 0.741), 0.04),
    "diversity_gap": ((0.061, 0.048, 0.412, 0.433, None), 0.018),
    "vendi": ((3.81, 3.97, 1.42, 1.38, None), 0.11),
    "embed_fd": ((0.0071, 0.0098, 0.0196, 0.0607, 0.0), 0.0007),
    "cos_true": ((0.785, 0.712, 0.847, 0.512, 1.0), 0.004),
    "cos_samples": ((0.801, 0.722, 1.0, 1.0, 1.0), 0.003),
    "calibration_gap": ((-0.016, -0.010, -0.153, -0.488, 0.0), 0.003),
}
COSTS = (
    (2_310_000, 1080, 118.2, 128, 412e6, 1.9e-3),
    (1_020_000, 480, 121.4, 33, 66e6, 1.1e-3),
    (4160, 0, 0.3, 1, 8192, 1e-6),
)


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def example() -> dict[str, Any]:
    """Plausible numbers."""
    names = (
        "parameters",
        "training_steps",
        "training_seconds",
        "evaluations",
        "flops_per_embedding",
        "seconds_per_embedding",
    )
    attributes = {"shape": 0.81, "color": 1.0, "size": 0.96, "position": 0.998, "background": 1.0}
    priors = {
        prior: {
            "class": "Prior",
            "reference": prior == "ceiling",
            "metrics": {n: interval(m[i], half) for n, (m, half) in MEANS.items() if m[i] is not None},
            "attributes": dict(attributes),
            **dict(zip(names, COSTS[i] if i < len(COSTS) else (0, 0, 0.0, 0, 0, 1e-7), strict=True)),
        }
        for i, prior in enumerate(PRIORS)
    }
    rates = {
        "stated_match": 0.53, "captions_right": 0.531, "clip_score": 0.556, "retrieval_r10": 0.513, "residual": 0.512,
        "vendi": 0.437, "diversity_gap": 0.461,
    }  # fmt: skip
    differences = {
        measure: {
            f"{a} - {b}": interval(MEANS[measure][0][i] - MEANS[measure][0][j], 0.0009)  # type: ignore[operator]
            for i, a in enumerate(PRIORS)
            for j, b in enumerate(PRIORS)
            if i != j
        }
        for measure in ("embed_fd", "fd_judge")
    }
    report: dict[str, Any] = {
        "oracle": {"real": dict.fromkeys(attributes, 0.999), "residual": interval(0.003, 0.0002)},
        "decoder": {
            "reconstruction": attributes,
            "fd_judge": interval(0.0214, 0.002),
            "judge_r10": interval(0.962, 0.02),
            "residual": interval(0.0511, 0.001),
        },
        "clip": {"zero_shot": {**attributes, "shape": 0.97}, "retrieval_r1": 0.041, "retrieval_r10": 0.312},
        "judge": {"retrieval_r1": 0.036, "retrieval_r10": 0.288},
        "codec": {
            "roundtrip_cosine": 0.9981, "pca_error": 0.0041, "quantisation_error": 0.0006, "code_length": 32,
            "axes_for_99": 22,
            "embed_dim": 64, "buckets": 256,
        },
        "priors": priors,
        "head_to_head": {
            "first": "diffusion", "second": "ar",
            "win_rates": {name: interval(rate, 0.03) for name, rate in rates.items()},
        },
        "differences": differences,
        "meta": {
            "commit": "0123456789ab", "hardware": "2 × Example CPU, 2 threads", "versions": {"python": "3.11"},
            "config": {
                "resamples": 200, "decoder": {"class": "Decoder", "guidance": 2.0},
                "priors": {
                    "diffusion": {
                        "class": "DiffusionPrior", "guidance": 1.0, "candidates": 2,
                        "sampler": {"class": "Ancestral", "steps": 64, "variance": "small"},
                    },
                    "ar": {"class": "ARPrior", "guidance": 2.0, "temperature": 1.0, "dot_quantile": 0.5},
                },
            },
            "counts": {
                "heldout_rows": 2000, "seeds": 3, "decoded_captions": 512, "diversity_captions": 64,
                "diversity_samples": 16,
            },
            "comparison_seconds": {"embed": 21.0, "decode and look": 240.0, "score": 9.0},
        },
    }  # fmt: skip
    return {**report, "paper": claims(report)}


def pictures(rows: int, columns: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    images = render_shapes(draw_attributes(rows * columns, split="train", rng=rng), rng=rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).div(127.5).sub(1).unflatten(0, (rows, columns))


def example_atlases() -> dict[str, Atlas]:
    captions = ["a large red star", "a blue shape on navy", "at the top, a small <pink> ring", "a circle & a half"]
    columns = ["real", *PRIORS, "embedding alone"]
    rows = [f"{prior}: {caption}" for caption in captions[:3] for prior in PRIORS[:4]]
    return {
        "grid": Atlas(pictures(len(captions), len(columns)), captions, columns),
        "many": Atlas(pictures(len(rows), 16), rows, [str(i) for i in range(16)]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_report(path, example(), example_atlases())
    return path


def test_every_number_and_interval_is_on_the_page(folder: Path) -> None:
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for name, (means, half) in MEANS.items():
        for mean in means:
            if mean is not None:
                show = MEASURES[name].show
                assert show(mean) in markdown
                assert f"[{show(mean - half)}, {show(mean + half)}]" in markdown
                assert f"[{show(mean - half)}, {show(mean + half)}]" in html


def test_costs_name_the_guidance_that_they_are_of(folder: Path) -> None:
    for page in ("report.html", "report.md"):
        text = (folder / page).read_text()
        assert "Ancestral 64 small, guidance 1, best of 2" in text
        assert "guidance 2, dot token above 50%" in text


def test_page_needs_no_other_file(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", html)
    assert html.count("data:image/png;base64,") == 6 + 4 * 7 + 12 * 16  # figures, grid, many


def test_captions_cannot_break_the_page(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    assert "<pink>" not in html
    assert "small &lt;pink&gt; ring" in html


def test_rendering_again_changes_nothing(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.md", "report.html")}
    render(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_times_come_from_the_stages_once_they_are_known(tmp_path: Path) -> None:
    report = write_report(tmp_path, example(), {})
    assert report["meta"]["wall_seconds"] == 270  # no stages: the comparison alone
    records = {"clip": {"seconds": 200.0, "done": True}, "comparison": {"seconds": 0.0, "done": False}}
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert render(tmp_path)["meta"]["wall_seconds"] == 470  # the comparison is the stage that is running
    records["comparison"] = {"seconds": 280.0, "done": True}
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert render(tmp_path)["meta"]["stages"] == {"clip": 200, "comparison": 280}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    report = example()
    report["priors"]["ar"]["attributes"]["shape"] = float("nan")
    write_report(tmp_path, report, {})
    assert json.loads((tmp_path / "report.json").read_text())["priors"]["ar"]["attributes"]["shape"] is None


def test_atlas_survives_its_file(tmp_path: Path) -> None:
    atlas = Atlas(pictures(3, 5), list("abc"), list("12345"))
    atlas.save(tmp_path / "atlas.png")
    again = Atlas.load(tmp_path / "atlas.png", atlas.rows, atlas.columns)
    assert torch.allclose(again.images, atlas.images, atol=1e-5)
    assert torch.equal(atlas.sheet()[:, 32:64, 64:96], atlas.images[1, 2].add(1).div(2))


def test_best_is_whoever_reaches_the_best_mean_without_the_ceiling() -> None:
    match = metric_tables(example())[0]
    column = next(i for i, head in enumerate(match.head) if head.startswith("stated"))
    assert [row[0].text for row in match.rows if row[column].best] == ["linear"]
    residual = metric_tables(example())[1]
    assert [row[0].text for row in residual.rows if row[1].best] == ["diffusion"]


@pytest.mark.parametrize(
    ("low", "high", "above", "expected"),
    [(0.51, 0.6, True, "agrees"), (0.4, 0.49, True, "disagrees"), (0.45, 0.55, True, "undecided"),
     (0.51, 0.6, False, "disagrees"), (0.4, 0.49, False, "agrees")],
)  # fmt: skip
def test_verdict_needs_the_whole_interval(low: float, high: float, above: bool, expected: str) -> None:
    assert verdict({"mean": (low + high) / 2, "low": low, "high": high}, 0.5, above=above) == expected


def test_verdict_on_nothing_is_not_measured() -> None:
    assert verdict(None, 0.5, above=True) == "not measured"


def test_claims_say_so_when_we_find_the_opposite() -> None:
    found = {claim["claim"]: claim["verdict"] for claim in claims(example())}
    assert found["A linear map is the prior with the lowest FID"] == "disagrees"
    assert found["A prior is better than feeding the decoder the text embedding"] == "agrees"


def test_loggers_get_every_mean() -> None:
    found = scalars(example())
    assert found["compare/embed_fd/ar"] == 0.0098
    assert "compare/diversity_gap/ceiling" not in found


def test_command_draws_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").unlink()
    draw_again(str(folder))
    assert (folder / "report.html").is_file()
    assert "93.1 [91.9, 94.3]" in capsys.readouterr().out


def test_missing_and_broken_reports_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No report at"):
        render(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="no report of a comparison"):
        render(tmp_path)
