"""Two ranks score what one scores: metrics pool over the held-out set, whoever has seen which part of it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def scores(mini_run: Path, out: Path, devices: int) -> dict[str, float]:
    """``unclip test`` of the linear prior in that many processes."""
    linear = {"class_path": "unclip_pl.priors.LinearPrior", "init_args": {"checkpoint": "linear.safetensors"}}
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(out), "name": "", "version": ""},
    }
    command = [sys.executable, "-m", "unclip_pl", "test", "--config", "configs/evaluate/prior.yaml"]
    command += ["--model.init_args.prior", json.dumps(linear)]
    command += ["--model.init_args.run", str(mini_run), "--data.init_args.batch_size", "4"]
    command += ["--data.init_args.source", f"{mini_run}/data", "--data.init_args.store", f"{mini_run}/store"]
    command += ["--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
    command += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        str(devices),
        "--trainer.limit_test_batches",
        "1.0",
    ]
    command += ["--trainer.logger", json.dumps(logger), "--trainer.enable_progress_bar", "false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if name not in ("epoch", "step")}


@pytest.mark.slow
def test_two_ranks_score_what_one_does(mini_run: Path, tmp_path: Path) -> None:
    """By a prior that draws nothing: which noise a caption gets does depend on the number of ranks."""
    one, two = (scores(mini_run, tmp_path / str(devices), devices) for devices in (1, 2))
    assert {"embed_fd", "precision", "recall", "cos_true"} <= one.keys()
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
