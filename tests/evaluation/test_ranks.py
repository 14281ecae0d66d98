"""Two ranks score what one scores: metrics pool over the held-out set, whoever has seen which part of it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def scores(mini_run: Path, out: Path, config: str, devices: int) -> dict[str, float]:
    """``unclip test`` in that many processes."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(out), "name": "", "version": ""},
    }
    command = [sys.executable, "-m", "unclip_pl", "test", "--config", f"configs/evaluate/{config}.yaml"]
    command += ["--model.init_args.run", str(mini_run), "--data.init_args.batch_size", "5"]
    command += ["--data.init_args.source", f"{mini_run}/data", "--data.init_args.store", f"{mini_run}/store"]
    command += ["--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices)]
    command += ["--trainer.limit_test_batches", "1.0", "--trainer.enable_progress_bar", "false"]
    command += ["--trainer.logger", json.dumps(logger)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if name not in ("epoch", "step")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "names"), [("prior", {"embed_fd", "precision", "cos_true"}), ("pipeline", {"fd_judge", "clip_score"})]
)
def test_two_ranks_score_what_one_does(config: str, names: set[str], mini_run: Path, tmp_path: Path) -> None:
    """Drawn by a prior and a decoder: in batches of 5 by one process, of 4 by two, from the same noise."""
    one, two = (scores(mini_run, tmp_path / str(devices), config, devices) for devices in (1, 2))
    assert names <= one.keys()
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
