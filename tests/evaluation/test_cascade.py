"""What an upsampler adds, by a recipe that builds on another run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.commands.plan import Stage
from unclip_pl.commands.reproduce import reproduce
from unclip_pl.evaluation.cascade import CascadeEvaluation, Shared, tiles_of
from unclip_pl.evaluation.scores import View
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import EvaluationBatch

SHRINK = {
    "data": "--train 16 --val 8 --heldout 8",
    "upsampler": (
        "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 4 "
        "--trainer.enable_progress_bar false --model.init_args.net.init_args.channels 8"
    ),
    "evaluation": "--data.init_args.batch_size 4 --model.init_args.shown 2 --model.init_args.resamples 4",
}


@pytest.mark.usefixtures("in_process")
def test_the_recipe_trains_two_upsamplers_and_measures_every_stage(mini_run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path("configs/reproduce/cascade.yaml").read_text())["stages"]
    stages = {
        name: Stage(**stage | {"run": f"{stage['run']} {SHRINK.get(name, '')}"}) for name, stage in recipe.items()
    }
    reproduce(stages, str(tmp_path), base=str(mini_run))
    report = json.loads((tmp_path / "evaluation" / "cascade.json").read_text())
    assert report["pictures"] == 8
    assert list(report["stages"]) == ["32", "64", "128", "real"]
    assert set(report["stages"]["real"]["accuracy"].values()) == {1.0}
    for name in ("32", "64", "128"):
        assert report["stages"][name]["residual"]["mean"] > report["stages"]["real"]["residual"]["mean"]
        assert report["stages"][name]["fd_judge_tiles"] > 0
    with Image.open(tmp_path / "evaluation" / "cascade.png") as picture:
        assert picture.width > 5 * 128
        assert picture.text["run"] == tmp_path.name  # type: ignore[attr-defined]


def test_a_perfect_decoder_of_full_size_leaves_nothing_to_add(
    batches: list[EvaluationBatch], lookup: DecoderSpec, tmp_path: Path
) -> None:
    torch.manual_seed(1)  # of the random encoders
    clip, judge = ClipSpec("tiny-rn"), ClipSpec("tiny-judge")
    module = CascadeEvaluation("", "", clip, judge, lookup, [], ShapesOracle(), str(tmp_path), resamples=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (scores,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert scores["32/all_right"] == 1
    assert scores["32/residual"] < 0.01
    for name in ("32/fd_judge", "32/fd_judge_tiles"):
        assert scores[name] == pytest.approx(0, abs=1e-6)


def test_the_grid_of_two_ranks_is_as_large_as_that_of_one(lookup: DecoderSpec, tmp_path: Path) -> None:
    clip, judge, noise = ClipSpec("tiny-rn"), ClipSpec("tiny-judge"), torch.Generator().manual_seed(0)
    rows = [Shared(torch.empty(0), ["a star", "a ring"], torch.randn(2, 3, 4, 4, generator=noise)) for _ in range(2)]
    images = torch.randn(4, 3, 8, 8, generator=noise)
    drawn = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        module = CascadeEvaluation("", "", clip, judge, lookup, [], ShapesOracle(), str(out), shown=2)
        view = View(torch.empty(0), torch.empty(0), torch.empty(0), images[: 2 * ranks])
        module._write({}, {"8": view, "real": view}, rows[:ranks])
        with Image.open(out / "cascade.png") as picture:
            drawn.append(picture.tobytes())
    assert drawn[0] == drawn[1]


def test_tiles() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tiles = tiles_of(images, 2)
    assert tiles.shape == (8, 3, 2, 2)
    assert torch.equal(tiles[1], images[0, :, :2, 2:])
    assert torch.equal(tiles[6], images[1, :, 2:, :2])
    assert tiles_of(images, 3).shape == (2, 3, 3, 3)


def test_the_conditioning_clip_is_no_judge(lookup: DecoderSpec, tmp_path: Path) -> None:
    clip = ClipSpec("tiny-rn")
    with pytest.raises(ValueError, match="another CLIP as judge"):
        CascadeEvaluation("", "", clip, clip, lookup, [], ShapesOracle(), str(tmp_path))
