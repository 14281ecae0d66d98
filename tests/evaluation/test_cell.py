"""One cell of a study, and a comparison, with stand-ins whose scores are known: no checkpoint, random judges."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.cell import Cell
from unclip_pl.evaluation.costs import Training, settings_hash, training_of
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.evaluation.scores import spectrum
from unclip_pl.evaluation.sheet import Sheet
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec, TextEmbeddingSpec, TrueEmbeddingSpec
from unclip_pl.report import draw
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import ATTRIBUTES
from unclip_pl.types import EvaluationBatch

CLIP, JUDGE = ClipSpec("tiny-rn"), ClipSpec("tiny-judge")
Batches = list[EvaluationBatch]
MANY = ("vendi", "diversity_gap", "intra_distance")


def measure(batches: Batches, folder: Path, priors: dict[str, PriorSpec], **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)  # of the random encoders
    sizes = {"captions": 40, "diversity_captions": 4, "diversity_samples": 4, "grid_rows": 2, "resamples": 5}
    cell = Cell(str(folder), CLIP, priors, **{**sizes, "batch_size": 7, **options})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.test(cell, DataLoader(batches, batch_size=None), verbose=False)
    assert not cell.state_dict()  # no frozen network may reach a checkpoint
    return json.loads(cell.out.read_text())


@pytest.fixture(scope="module")
def drawn(batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    priors = {"chance": chance, "again": copy.copy(chance), "text": TextEmbeddingSpec(), "ceiling": TrueEmbeddingSpec()}
    options = {"judge": JUDGE, "decoder": lookup, "oracle": ShapesOracle(), "foundations": True, "grid_many": 2}
    cell = measure(batches, folder, priors, kind="prior", seed=3, **options)
    return cell, folder


def test_a_perfect_arm_is_perfect_caption_by_caption(drawn: tuple[dict[str, Any], Path]) -> None:
    arm = drawn[0]["arms"]["ceiling"]
    for name in ("stated_match", "captions_right", "retrieval_r10", "precision", "recall"):
        assert arm["values"][name] == [1] * 40, name
    for name in ("embed_fd", "fd_judge", "calibration_gap"):
        assert arm["resamples"][name] == pytest.approx([0] * 6, abs=1e-5), name
    assert "vendi" not in arm["values"]  # one image of a caption is all that there is
    assert arm["reference"]


def test_every_value_is_of_a_caption_and_every_resample_beside_its_estimate(
    drawn: tuple[dict[str, Any], Path],
) -> None:
    cell, _ = drawn
    assert cell["counts"] == {
        "rows": 48, "captions": 40, "many": 4, "seeds": 2, "resamples": 5, "many_samples": 4,
    }  # fmt: skip
    arm = cell["arms"]["chance"]
    assert {len(values) for name, values in arm["values"].items() if name not in MANY} == {40}
    assert {len(arm["values"][name]) for name in MANY} == {4}
    assert {len(values) for values in arm["resamples"].values()} == {6}
    assert (cell["kind"], cell["title"], cell["series"], cell["x"], cell["seed"]) == ("prior", "", "", None, 3)


def test_arms_share_their_noise_and_their_resamples(drawn: tuple[dict[str, Any], Path]) -> None:
    """So that what is compared is compared caption by caption."""
    ours, theirs = (drawn[0]["arms"][name] for name in ("chance", "again"))
    assert ours["values"] == theirs["values"]
    assert ours["resamples"] == theirs["resamples"]


def test_pictures_lie_beside_the_numbers(drawn: tuple[dict[str, Any], Path]) -> None:
    cell, folder = drawn
    sheet = Sheet.load(folder / "cells" / "comparison.png", **cell["pictures"]["grid"])
    assert sheet.columns == ["real", "chance", "again", "text", "ceiling", "embedding alone"]
    for column in (4, 5):
        torch.testing.assert_close(sheet.images[:, 0], sheet.images[:, column])  # this decoder is perfect
    many = Sheet.load(folder / "cells" / "comparison-many.png", **cell["pictures"]["many"])
    assert [row.partition(":")[0] for row in many.rows] == ["chance", "again", "text"] * 2
    assert many.columns == ["1", "2", "3", "4"]


def test_foundations_of_a_perfect_decoder_are_perfect(drawn: tuple[dict[str, Any], Path]) -> None:
    found = drawn[0]["foundations"]
    assert found["oracle"] == found["reconstruction"] == dict.fromkeys(ATTRIBUTES, 1.0)
    assert found["arms"]["reconstruction"]["values"]["retrieval_r10"] == [1] * 40
    assert found["arms"]["reconstruction"]["resamples"]["fd_judge"] == pytest.approx([0] * 6, abs=1e-5)
    assert set(found["clip"]) == {"zero_shot", "retrieval_r1", "retrieval_r10"}
    assert found["codec"] is None


def test_its_report_has_every_number_with_an_interval_around_it(drawn: tuple[dict[str, Any], Path]) -> None:
    report = draw(drawn[1])
    assert list(report["priors"]) == ["text", "ceiling", "chance", "again"]
    once = {"diversity_gap", "vendi", "intra_distance"}
    for name, entry in report["priors"].items():
        missing = {"probe_match", "dot_obedience", "nats"}  # no store, so no probes; no AR prior
        missing |= once if name == "ceiling" else set()
        missing |= {"parts_right", "swapped", "colors_swapped", "class_share"}  # of scenes and words
        assert set(entry["metrics"]) == set(MEASURES) - missing
        for value in entry["metrics"].values():
            assert value["low"] <= value["mean"] <= value["high"]
    duel = next(duel for duel in report["duels"] if (duel["first"], duel["second"]) == ("chance", "again"))
    assert {value["mean"] for value in duel["win_rates"].values()} == {0.5}  # same noise, so every caption is a tie
    difference = report["differences"]["embed_fd"]["chance - again"]
    assert [difference[end] for end in ("mean", "low", "high")] == [0, 0, 0]
    metrics = report["priors"]["text"]["metrics"]
    assert metrics["cos_samples"]["mean"] == pytest.approx(1)
    assert metrics["vendi"]["mean"] == pytest.approx(1)  # this decoder has no noise
    assert metrics["diversity_gap"]["mean"] > 0.1
    assert abs(report["priors"]["chance"]["metrics"]["cos_samples"]["mean"]) < 0.1
    assert report["meta"]["config"]["priors"]["ceiling"]["class"] == "TrueEmbedding"


def test_without_a_decoder_embeddings_alone_are_measured(batches: Batches, chance: PriorSpec, tmp_path: Path) -> None:
    cell = measure(batches, tmp_path, {"chance": chance}, out=str(tmp_path / "cells" / "a.json"))
    assert cell["arms"]["chance"]["values"] == {}
    assert "fd_judge" not in cell["arms"]["chance"]["resamples"]
    assert cell["pictures"] == {}
    assert cell["foundations"] is None
    assert cell["counts"]["captions"] == 0
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.json"]  # whole, and nothing else


def test_other_seeds_draw_other_samples_of_the_same_captions(
    batches: Batches, chance: PriorSpec, tmp_path: Path
) -> None:
    one, two = (
        measure(batches, tmp_path, {"chance": chance, "true": TrueEmbeddingSpec()}, seed=s)["arms"] for s in (0, 1)
    )
    assert one["chance"]["resamples"] != two["chance"]["resamples"]
    assert one["true"]["resamples"] == two["true"]["resamples"]


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_spectrum_of_evenly_used_axes(rank: int) -> None:
    """Let k axes have equal variance: the effective rank is k, and 99 % need all of fewer than a hundred."""
    axes = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double()).Q
    found = spectrum(torch.cat([axes[:rank], -axes[:rank]]))
    assert found["effective_rank"] == pytest.approx(rank)
    assert (found["axes_for_99"], found["embed_dim"]) == (rank, 20)


def test_where_files_lie_changes_no_hash_and_a_learning_rate_does(tmp_path: Path) -> None:
    def write(lr: float, place: str, muon_lr: float = 0.0) -> Training:
        model = {"codec": f"{place}/codec.safetensors", "optimization": {"lr": lr, "muon_lr": muon_lr}}
        data = {"source": place, "batch_size": 64, "seed": 1}
        config = {"model": {"init_args": model}, "data": {"init_args": data}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return training_of(tmp_path)

    one, moved, faster = write(0.001, "runs/a"), write(0.001, "elsewhere/b"), write(0.002, "runs/a")
    assert one == moved
    assert (one.lr, faster.lr) == (0.001, 0.002)
    assert write(0.001, "runs/a", muon_lr=0.02).lr == 0.02  # it trains the matrices
    assert one.config_hash != faster.config_hash
    assert training_of(tmp_path / "nothing") == Training()
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})


def test_numbers_that_are_none_are_null(drawn: tuple[dict[str, Any], Path]) -> None:
    unseen = drawn[0]["arms"]["chance"]["values"]["unseen_match"]
    assert any(value is None for value in unseen)  # captions of pairs that training showed
    assert all(value is None or math.isfinite(value) for value in unseen)


def test_other_data_than_shapes_has_no_oracle(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    priors = {"text": TextEmbeddingSpec(), "ceiling": TrueEmbeddingSpec()}
    cell = measure(batches, tmp_path, priors, judge=JUDGE, decoder=lookup, foundations=True)
    assert cell["foundations"]["oracle"] is None
    assert "stated_match" not in cell["arms"]["text"]["values"]
    assert draw(tmp_path)["duels"] == []


def test_only_pictures_that_may_be_shown_are(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    """Pictures that name no licence are the user's own."""
    licences = ["MIT, one", "CC BY", "CC BY-SA", "Apache-2.0, two"]
    named = [
        batch._replace(metadata=[{"license": licences[i % 4]} for i in range(len(batch.metadata))]) for batch in batches
    ]
    options = {"judge": JUDGE, "decoder": lookup, "grid_rows": 3, "diversity_captions": 0}
    priors: dict[str, PriorSpec] = {"ceiling": TrueEmbeddingSpec()}
    grid = measure(named, tmp_path, priors, grid_licenses=["MIT", "Apache"], **options)["pictures"]["grid"]
    captions = [caption for batch in batches for caption in batch.captions]
    assert grid["rows"] == [captions[row] for row in (0, 3, 4)]
    sheet = Sheet.load(tmp_path / "cells" / "comparison.png", **grid).images
    torch.testing.assert_close(sheet[:, 0], torch.cat([b.image for b in batches])[[0, 3, 4]], atol=1 / 127, rtol=0)
    assert len(measure(batches, tmp_path, priors, grid_licenses=["MIT"], **options)["pictures"]["grid"]["rows"]) == 3
    assert measure(named, tmp_path, priors, grid_licenses=["GPL"], **options)["pictures"] == {}


def test_oracle_refuses_data_without_attributes(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    bare = [batch._replace(metadata=[{} for _ in batch.metadata]) for batch in batches]
    with pytest.raises(ValueError, match="no `attributes`"):
        measure(bare, tmp_path, {"ceiling": TrueEmbeddingSpec()}, judge=JUDGE, decoder=lookup, oracle=ShapesOracle())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"judge": CLIP}, "another CLIP"), ({"seeds": 1}, "seeds >= 2"), ({"foundations": True}, "a decoder where"),
        ({"decoder": DecoderSpec("x")}, "a judge beside"), ({"kind": "curve"}, "a title for"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cell("run", CLIP, {}, **options)


def test_prior_of_another_clip_is_refused(batches: Batches, chance: PriorSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other-clip"):
        measure(batches, tmp_path, {"stranger": replace(chance, fingerprint="other-clip")})  # type: ignore[call-arg]
