"""The recipe for one GPU, from shards to bundle, on a CPU with two steps of every fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unclip_pl.cli import run as unclip

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "reproduce" / "emoji-64px.yaml"
#: Options that make two steps of a fit, and a few pictures of the comparison.
SHORT = {
    "fit": (
        "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.limit_val_batches 1 "
        "--data.init_args.batch_size 8"
    ),
    "test": (
        "--model.init_args.captions 4 --model.init_args.batch_size 8 --model.init_args.resamples 4 "
        "--model.init_args.grid_rows 2 --model.init_args.decoder.init_args.sampler.init_args.steps 2"
    ),
}


@pytest.mark.slow  # eleven processes, each of which imports torch
def test_the_recipe_runs_to_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    counts = ("--train", "64", "--val", "16", "--heldout", "16")
    assert unclip(["pack", "shapes", "--out", str(tmp_path / "shards"), "--size", "64", *counts]) == 0
    recipe = yaml.safe_load(RECIPE.read_text())
    for stage in recipe["stages"].values():
        stage["run"] += " " + SHORT.get(stage["run"].split()[0], "")
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(recipe, sort_keys=False))
    words = [
        "--config",
        str(short),
        "--source",
        str(tmp_path / "shards"),
        "--run",
        str(tmp_path / "run"),
        "--jobs",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "unclip_pl", "reproduce", *words], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"diffusion", "ar", "linear", "text", "ceiling"} <= report["priors"].keys()
    picture = tmp_path / "circle.png"
    bundle = str(tmp_path / "run" / "emoji.zip")
    assert unclip(["sample", "a red circle", "--num", "1", "--run", bundle, "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (128, 128)  # through the upsampler
