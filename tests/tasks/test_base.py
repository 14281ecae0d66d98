"""What every Task does alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
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


def test_samples_are_counted_over_accumulated_batches_and_kept(tmp_path: Path) -> None:
    """What a callback saves at the end of a step already holds that step's samples."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "accumulate_grad_batches": 2,
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
    }
    batches = DataLoader([(torch.randn(n, 8),) for n in (4, 4, 4, 4)], batch_size=None)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    task = Square()
    Trainer(**settings, max_epochs=1, enable_checkpointing=False, callbacks=[Save()]).fit(task, batches)
    assert task.train_samples == 16
    assert torch.load(tmp_path / "one.ckpt", weights_only=False)["train_samples"] == 8
    resumed = Square()
    Trainer(**settings, max_epochs=1, enable_checkpointing=False).fit(
        resumed, batches, ckpt_path=tmp_path / "one.ckpt", weights_only=False
    )
    assert resumed.train_samples == 16


def test_a_rank_takes_its_rows_of_the_global_draw() -> None:
    task = Square()
    assert task.share(torch.arange, 3).tolist() == [0, 1, 2]
    task._rank, task._world_size = 1, 2
    assert task.share(torch.arange, 3).tolist() == [3, 4, 5]
    task.eval()
    assert task.share(torch.arange, 3).tolist() == [0, 1, 2]
