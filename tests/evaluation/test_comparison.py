"""The comparison end to end, with stand-ins whose scores are known: no checkpoint, random judges."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.comparison import Comparison
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec, TextEmbeddingSpec, TrueEmbeddingSpec
from unclip_pl.report.report import Atlas
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import ATTRIBUTES
from unclip_pl.types import EvaluationBatch

CLIP, JUDGE = ClipSpec("tiny-rn"), ClipSpec("tiny-judge")
Batches = list[EvaluationBatch]


def compare(
    batches: Batches,
    decoder: DecoderSpec,
    run: Path,
    priors: dict[str, PriorSpec],
    oracle: ShapesOracle | None = None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(1)  # of the random encoders
    comparison = Comparison(
        str(run), CLIP, JUDGE, decoder, priors, oracle,
        captions=40, seeds=2, diversity_captions=4, diversity_samples=4, batch_size=7, resamples=5,
        **{"grid_rows": 3, **options},
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=run)
    trainer.test(comparison, DataLoader(batches, batch_size=None), verbose=False)
    assert not comparison.state_dict()  # no frozen network may reach a checkpoint
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def report(
    batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    priors = {"diffusion": chance, "ar": copy.copy(chance), "text": TextEmbeddingSpec(), "ceiling": TrueEmbeddingSpec()}
    return compare(batches, lookup, tmp_path_factory.mktemp("run"), priors, ShapesOracle())


def test_true_embeddings_through_a_perfect_decoder_score_perfectly(report: dict[str, Any]) -> None:
    metrics = report["priors"]["ceiling"]["metrics"]
    for name in ("stated_match", "captions_right", "precision", "recall", "retrieval_r10", "cos_true", "cos_samples"):
        assert metrics[name]["mean"] == pytest.approx(1), name
    for name in ("embed_fd", "fd_judge", "calibration_gap"):
        assert metrics[name]["mean"] == pytest.approx(0, abs=1e-6), name
    assert report["decoder"]["reconstruction"] == dict.fromkeys(ATTRIBUTES, 1.0)
    assert report["decoder"]["judge_r10"]["mean"] == 1
    assert report["oracle"]["real"] == dict.fromkeys(ATTRIBUTES, 1.0)


def test_every_prior_has_every_number_with_an_interval_around_it(report: dict[str, Any]) -> None:
    wanted = {
        "stated_match", "captions_right", "residual", "diversity_gap", "vendi", "fd_judge", "embed_fd", "clip_score",
        "retrieval_r1", "retrieval_r5", "retrieval_r10", "cos_true", "cos_samples", "cos_mean", "calibration_gap",
        "precision", "recall", "coverage", "density", "unseen_match", "intra_distance",
    }  # fmt: skip
    once = {"diversity_gap", "vendi", "intra_distance"}
    for name, entry in report["priors"].items():
        assert set(entry["metrics"]) == wanted - (once if name == "ceiling" else set())
        for measure, value in entry["metrics"].items():
            assert measure == "density" or value["low"] <= value["mean"] <= value["high"]


def test_two_priors_that_are_the_same_are_even(report: dict[str, Any]) -> None:
    duel = report["head_to_head"]
    assert {value["mean"] for value in duel["win_rates"].values()} == {0.5}  # same noise, so every caption is a tie
    assert report["differences"]["embed_fd"]["diffusion - ar"] == {"mean": 0, "low": 0, "high": 0}
    assert {claim["verdict"] for claim in report["paper"] if "Table 1" in claim["source"]} == {"undecided"}


def test_deterministic_prior_always_says_the_same(report: dict[str, Any]) -> None:
    metrics = report["priors"]["text"]["metrics"]
    assert metrics["cos_samples"]["mean"] == pytest.approx(1)
    assert metrics["vendi"]["mean"] == pytest.approx(1)  # this decoder has no noise either
    assert metrics["diversity_gap"]["mean"] > 0.1


def test_random_directions_are_spread_as_chance_has_it(report: dict[str, Any]) -> None:
    metrics = report["priors"]["diffusion"]["metrics"]
    assert abs(metrics["cos_samples"]["mean"]) < 0.1
    assert abs(metrics["cos_true"]["mean"]) < 0.1
    assert metrics["vendi"]["mean"] > 1


def test_counts_and_meta_are_told(report: dict[str, Any]) -> None:
    counts = {
        "heldout_rows": 48, "seeds": 2, "decoded_captions": 40, "diversity_captions": 4, "diversity_samples": 4,
    }  # fmt: skip
    assert report["meta"]["counts"] == counts
    assert {"commit", "config", "hardware", "wall_seconds", "stages", "versions"} <= set(report["meta"])
    assert report["meta"]["config"]["priors"]["ceiling"] == {"class": "TrueEmbedding", "keep_norm": False}


def test_other_data_than_shapes_has_no_oracle(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    report = compare(batches, lookup, tmp_path, {"text": TextEmbeddingSpec(), "ceiling": TrueEmbeddingSpec()})
    assert report["oracle"] is None
    assert report["head_to_head"] is None
    assert "stated_match" not in report["priors"]["text"]["metrics"]
    assert report["priors"]["text"]["metrics"]["vendi"]["mean"] == pytest.approx(1)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_only_pictures_that_may_be_shown_are(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    licences = ["MIT, one", "CC BY", "CC BY-SA", "Apache-2.0, two"]
    named = [
        batch._replace(metadata=[{"license": licences[i % 4]} for i in range(len(batch.metadata))]) for batch in batches
    ]
    report = compare(
        named, lookup, tmp_path, {"ceiling": TrueEmbeddingSpec()}, grid_rows=3, grid_licenses=["MIT", "Apache"]
    )
    captions = [caption for batch in batches for caption in batch.captions]
    assert report["pictures"]["grid"]["rows"] == [captions[row] for row in (0, 3, 4)]
    sheet = Atlas.load(tmp_path / "plots" / "grid.png", **report["pictures"]["grid"]).images
    torch.testing.assert_close(sheet[:, 0], torch.cat([b.image for b in batches])[[0, 3, 4]], atol=1 / 127, rtol=0)


def test_own_pictures_name_no_licence_and_a_report_may_have_no_grid(
    batches: Batches, lookup: DecoderSpec, tmp_path: Path
) -> None:
    priors: dict[str, PriorSpec] = {"ceiling": TrueEmbeddingSpec()}
    report = compare(batches, lookup, tmp_path / "own", priors, grid_licenses=["MIT"])
    assert len(report["pictures"]["grid"]["rows"]) == 3
    theirs = [batch._replace(metadata=[{"license": "CC BY"} for _ in batch.metadata]) for batch in batches]
    report = compare(theirs, lookup, tmp_path / "theirs", priors, grid_licenses=["MIT"])
    assert "grid" not in report["pictures"]
    assert (tmp_path / "theirs" / "report.html").is_file()


def test_oracle_refuses_data_without_attributes(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    bare = [batch._replace(metadata=[{} for _ in batch.metadata]) for batch in batches]
    with pytest.raises(ValueError, match="no `attributes`"):
        compare(bare, lookup, tmp_path, {"ceiling": TrueEmbeddingSpec()}, ShapesOracle())


def test_judge_must_be_another_clip(lookup: DecoderSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another CLIP"):
        Comparison(str(tmp_path), CLIP, CLIP, lookup, {})


def test_prior_of_another_clip_is_refused(
    batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path: Path
) -> None:
    stranger = replace(chance, fingerprint="other-clip")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="other-clip"):
        compare(batches, lookup, tmp_path, {"stranger": stranger})
