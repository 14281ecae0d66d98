"""The profile of a fit."""

import json
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unclip_pl.generation.provenance import PROFILE
from unclip_pl.training.profile import StageProfile, union


def test_union_counts_what_overlaps_once() -> None:
    assert union([]) == 0
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4


class Line(LightningModule):
    """One linear layer: 2·8·16·4 FLOPs forward and as many for the weights' gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("steps", [2, 8])
def test_it_counts_the_arithmetic_of_one_step(tmp_path: Path, steps: int) -> None:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[StageProfile(warmup=4, window=2)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Line(), DataLoader(torch.randn(80, 16), batch_size=8))
    path = Path(trainer.log_dir or "") / PROFILE
    assert path.is_file() == (steps > 4)
    if path.is_file():
        found = json.loads(path.read_text())
        assert found["flops_per_step"] == 2 * (2 * 8 * 16 * 4)
        assert found["steps"] == 4
        assert found["steps_per_second"] > 0
        assert found["mfu"] is None
