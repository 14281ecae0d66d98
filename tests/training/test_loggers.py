"""Pictures, scores and settings reach every logger that can show them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unclip_pl import report
from unclip_pl.cli import main
from unclip_pl.training.loggers import log_picture, log_settings, samples_in, takes_pictures
from unclip_pl.types import PriorBatch, TextFeatures

Small = Callable[..., list[str]]
PICTURE = torch.tensor([[[0.0, 1.0], [0.2, 0.4]]]).repeat(3, 1, 1)
CONFIG = {"seed_everything": 3, "data": {"init_args": {"batch_size": 16}}}
TITLE = "samples (true above, drawn below)"


def given(logger: Any, folder: Path, told: dict[str, Any]) -> None:
    """All that a fit and a comparison give to a logger."""
    assert takes_pictures(logger)
    log_settings([logger], CONFIG)
    log_picture(logger, TITLE, PICTURE, 7)
    report.show(folder, told, [logger])


@pytest.fixture
def comparison(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with one picture of a comparison, and its report."""
    from PIL import Image

    (tmp_path / "run" / "plots").mkdir(parents=True)
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "run" / "plots" / "grid.png")
    row = {"metrics": {"embed_fd": {"mean": 0.25}, "fid": {"mean": None}}, "sampling": {"guidance": 2.0}, "lr": 0.1}
    return tmp_path / "run", {"priors": {"diffusion": row}, "curves": {}}


def test_tensorboard(comparison: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    given(logger, *comparison)
    logger.experiment.flush()
    tags: list[str] = []
    for file in tmp_path.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags += events.Tags()["images"]
    assert sorted(tags) == ["compare/grid", TITLE]


def test_csv_says_once_that_it_cannot(comparison: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    assert not takes_pictures(logger)
    log_settings([logger], CONFIG)
    with pytest.warns(UserWarning, match="CSVLogger cannot show the pictures of a comparison") as said:
        report.show(*comparison, [logger])
    assert len(said) == 1
    logger.save()
    assert "batch_size: 16" in (tmp_path / "hparams.yaml").read_text()
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(row["compare/diffusion/embed_fd"]) == 0.25
    assert "compare/diffusion/fid" not in row


@pytest.mark.slow  # imports MLflow, an extra that `make test-slow` installs
def test_mlflow(comparison: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # releases since 3.7 ask for it
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    given(logger, *comparison)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params["data/init_args/batch_size"] == "16"
    assert run.data.metrics["compare/diffusion/embed_fd"] == 0.25
    pictures = [path.name for path in (tmp_path / "mlruns").rglob("*.png")]
    assert any("samples" in name for name in pictures)
    assert any("grid" in name for name in pictures)


@pytest.mark.slow  # starts W&B's process, an extra that `make test-slow` installs
def test_wandb_offline(comparison: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger("test", save_dir=tmp_path, offline=True)
    given(logger, *comparison)
    run = logger.experiment
    assert run.config["data"]["init_args"]["batch_size"] == 16
    assert run.summary["compare/diffusion/embed_fd"] == 0.25
    wandb.finish()
    pictures = [path for path in tmp_path.rglob("*.png") if "media" in path.parts]
    assert len(pictures) == 2
    assert {path.parts[path.parts.index("images") + 1][:7] for path in pictures} == {"samples", "compare"}


def test_monitor_adds_learning_rate_and_throughput(small: Small, tmp_path: Path) -> None:
    csv_logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.init_args.save_dir", str(tmp_path)]
    line = small("prior", tmp_path)
    at = line.index("--trainer.logger.init_args.save_dir")
    line = [*line[:at], *line[at + 2 :], "--config", "configs/trainer/monitor.yaml", *csv_logger]
    assert main(["fit", *line, "--trainer.max_steps", "8", "--trainer.log_every_n_steps", "2"]) == 0
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    found = {name for row in rows for name, value in row.items() if value}
    assert {"lr-Muon/pg1", "train/samples", "val/embed_fd"} <= found  # speeds come with Lightning's 100th step


def test_samples_are_counted_by_rows() -> None:
    text = TextFeatures(torch.ones(5, 2), torch.ones(5, 2, 3), torch.ones(5, 2), torch.ones(5, 4))
    assert samples_in(PriorBatch(torch.zeros(5, 4), text)) == 5
