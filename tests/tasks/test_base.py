"""What every Task does alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unclip_pl.tasks.base import Task


class Square(Task):
    """|W x|², whose gradient is far above what is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        return 1e3 * self.net(batch[0]).float().square().sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = torch.nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)


class Watched(Square):
    """Its gradient as the optimizer gets it, after clipping."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.clipped = torch.nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision: Any, tmp_path: Path) -> None:
    """Under mixed precision Lightning refuses fused optimizers, though bfloat16 has no loss scale to undo."""
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=1,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    task = Watched()
    trainer.fit(task, DataLoader([(torch.randn(4, 8),)], batch_size=None))
    assert task.norm > 1
    assert abs(task.clipped - 0.5) < 1e-3
