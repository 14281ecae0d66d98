"""One cell of a study with stand-ins whose scores are known, and what it says of where they come from."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.cell import Cell, settings_hash, spectrum, training_config
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec, TextEmbeddingSpec, TrueEmbeddingSpec
from unclip_pl.report.report import Atlas
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import EvaluationBatch

CLIP, JUDGE = ClipSpec("tiny-rn"), ClipSpec("tiny-judge")
Batches = list[EvaluationBatch]
MANY = ("vendi", "diversity_gap", "intra_distance")


def measure(batches: Batches, folder: Path, priors: dict[str, PriorSpec], **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)  # of the random encoders
    sizes = {"captions": 40, "diversity_captions": 4, "diversity_samples": 4, "grid_rows": 2, "resamples": 5}
    cell = Cell(
        str(folder), str(folder), CLIP, priors, "matched", str(folder / "cells" / "a.json"), **{**sizes, **options}
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.test(cell, DataLoader(batches, batch_size=None), verbose=False)
    assert not cell.state_dict()
    return json.loads((folder / "cells" / "a.json").read_text())


@pytest.fixture(scope="module")
def drawn(batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    priors = {"chance": chance, "again": copy.copy(chance), "text": TextEmbeddingSpec(), "ceiling": TrueEmbeddingSpec()}
    cell = measure(batches, folder, priors, judge=JUDGE, decoder=lookup, oracle=ShapesOracle(), seed=3)
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
    assert (cell["group"], cell["seed"]) == ("matched", 3)


def test_arms_share_their_noise_and_their_resamples(drawn: tuple[dict[str, Any], Path]) -> None:
    """So that what is compared is compared caption by caption."""
    ours, theirs = (drawn[0]["arms"][name] for name in ("chance", "again"))
    assert ours["values"] == theirs["values"]
    assert ours["resamples"] == theirs["resamples"]


def test_pictures_lie_beside_the_numbers(drawn: tuple[dict[str, Any], Path]) -> None:
    cell, folder = drawn
    atlas = Atlas.load(folder / "cells" / "a.png", **cell["pictures"])
    assert atlas.columns == ["real", "chance", "again", "text", "ceiling"]
    torch.testing.assert_close(atlas.images[:, 0], atlas.images[:, 4])  # this decoder is perfect


def test_without_a_decoder_embeddings_alone_are_measured(batches: Batches, chance: PriorSpec, tmp_path: Path) -> None:
    cell = measure(batches, tmp_path, {"chance": chance})
    assert cell["arms"]["chance"]["values"] == {}
    assert "fd_judge" not in cell["arms"]["chance"]["resamples"]
    assert cell["pictures"] is None
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
    """Of k axes with equal variance the effective rank is k, and 99 % need all of fewer than a hundred."""
    axes = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double()).Q
    found = spectrum(torch.cat([axes[:rank], -axes[:rank]]))
    assert found["effective_rank"] == pytest.approx(rank)
    assert (found["axes_for_99"], found["embed_dim"]) == (rank, 20)


def test_where_files_lie_changes_no_hash_and_a_learning_rate_does(tmp_path: Path) -> None:
    def write(lr: float, place: str) -> dict[str, Any]:
        model = {"codec": f"{place}/codec.safetensors", "optimization": {"lr": lr}}
        data = {"source": place, "batch_size": 64, "seed": 1}
        config = {"model": {"init_args": model}, "data": {"init_args": data}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return training_config(tmp_path)

    one, moved, faster = write(0.001, "runs/a"), write(0.001, "elsewhere/b"), write(0.002, "runs/a")
    assert one == moved
    assert (one["lr"], one["batch_size"], faster["lr"]) == (0.001, 64, 0.002)
    assert one["hash"] != faster["hash"]
    assert training_config(tmp_path / "nothing") == {}
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})


def test_numbers_that_are_none_are_null(drawn: tuple[dict[str, Any], Path]) -> None:
    unseen = drawn[0]["arms"]["chance"]["values"]["unseen_match"]
    assert any(value is None for value in unseen)  # captions of pairs that training showed
    assert all(value is None or math.isfinite(value) for value in unseen)
