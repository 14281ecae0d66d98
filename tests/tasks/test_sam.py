"""Sharpness-aware minimisation in CLIP's training: the worst point nearby gives the gradient, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unclip_pl.tasks import ClipTask
from unclip_pl.tasks.base import Task
from unclip_pl.tasks.sam import check_strategy, perturbed
from unclip_pl.training.sharding import FullySharded

RHO, LR = 0.3, 0.05


class Net(nn.Module):
    """A point, and CLIP's temperature, which nothing here depends on."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.logit_scale = nn.Parameter(torch.ones(()))


class Quadratic(ClipTask):
    """½ wᵀ H w, by gradient descent. A batch is H."""

    def __init__(self, w: Tensor, sam_rho: float) -> None:
        Task.__init__(self)
        self.net, self.sam_rho = Net(w), sam_rho

    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        (H,) = batch
        return 0.5 * self.net.w @ H @ self.net.w

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


class Losses(Callback):
    """What was logged, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.callback_metrics["train/loss"].item())


def trainer(path: Path, **more: Any) -> Trainer:
    plain = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1}
    return Trainer(accelerator="cpu", default_root_dir=path, **plain, **more)


def hessians(n: int) -> list[Tensor]:
    a = torch.randn(n, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(a @ a.mT)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_on_a_quadratic(rho: float, tmp_path: Path) -> None:
    """w ← w − lr H (w + ρ H w / ‖H w‖), and the loss that is logged is the one at w."""
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    task, losses = Quadratic(w, rho), Losses()
    trainer(tmp_path, callbacks=[losses]).fit(task, DataLoader([(H,) for H in hessians(6)], batch_size=None))
    expected = []
    for H in hessians(6):
        expected.append((0.5 * w @ H @ w).item())
        w = w - LR * H @ (w + rho * H @ w / (H @ w).norm())
    torch.testing.assert_close(task.net.w.detach(), w)
    assert losses.seen == pytest.approx(expected)
    assert task.net.logit_scale == 1


def test_a_flat_place_has_no_worst_point(tmp_path: Path) -> None:
    task = Quadratic(torch.zeros(4, dtype=torch.float64), RHO)
    trainer(tmp_path).fit(task, DataLoader([(H,) for H in hessians(2)], batch_size=None))
    assert torch.equal(task.net.w.detach(), torch.zeros(4, dtype=torch.float64))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def test_batch_norm_counts_a_batch_once() -> None:
    x, net, plain = torch.randn(16, 3), network(), network()
    plain(x)
    net(x).square().mean().backward()
    with perturbed(net, RHO):
        assert net[1].training
        net(x).square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))
    net(x)
    assert net[1].num_batches_tracked == 2


def test_weights_are_back_whatever_happens() -> None:
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(16, 3)).square().mean().backward()

    def interrupted() -> None:
        pairs = zip(net.parameters(), before, strict=True)
        raise KeyboardInterrupt(torch.stack([(p - q).square().sum() for p, q in pairs]).sum().sqrt().item())

    with pytest.raises(KeyboardInterrupt) as interrupt, perturbed(net, RHO):
        interrupted()
    assert interrupt.value.args[0] == pytest.approx(RHO, rel=1e-4)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert net[1].track_running_stats


def test_where_it_would_be_wrong_it_is_refused(tmp_path: Path) -> None:
    check_strategy(SingleDeviceStrategy(), 1)
    check_strategy(DDPStrategy(), 1)
    with pytest.raises(ValueError, match=r"one device or trainer.strategy ddp .* Got FullySharded"):
        check_strategy(FullySharded(), 1)
    with pytest.raises(ValueError, match=r"Got DeepSpeedStrategy"):
        check_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy), 1)
    with pytest.raises(ValueError, match=r"sam_rho >= 0. Got -0.1"):
        ClipTask("tiny-rn", sam_rho=-0.1)
    data = DataLoader([(H,) for H in hessians(2)], batch_size=None)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches 1 .* Got 2"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(Quadratic(torch.ones(4, dtype=torch.float64), RHO), data)
