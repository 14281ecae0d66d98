"""Two processes (gloo) do what one does: train to the same weights, resume bit for bit, pool every metric."""

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Metric

from unclip_pl import metrics
from unclip_pl.files import read_checkpoint
from unclip_pl.tasks import ClipTask
from unclip_pl.tasks.base import Task
from unclip_pl.training.cli import build
from unclip_pl.types import ClipBatch

Small = Callable[..., list[str]]
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--data.init_args.batch_size", "8"]


@pytest.fixture(autouse=True)
def _free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))


def fit(line: list[str], out: Path, resume: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network's first weights, and the last checkpoint."""
    cli = build(["--trainer.accelerator", "cpu", *line, "--trainer.logger.init_args.save_dir", str(out)])
    start = {name: value.clone() for name, value in cli.model.named_parameters()}
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    return start, read_checkpoint(last(out))


def last(out: Path) -> Path:
    """The checkpoint of the only run in a folder."""
    (path,) = out.rglob("last.ckpt")
    return path


@pytest.mark.parametrize(
    "part",
    [
        "prior",
        pytest.param("ar_prior", marks=pytest.mark.slow),
        pytest.param("decoder", marks=pytest.mark.slow),
        pytest.param("upsampler", marks=pytest.mark.slow),
        "upsampler corrupted",
        "clip",
        "prior muon",
    ],
)
def test_two_processes_train_as_one(part: str, small: Small, tmp_path: Path) -> None:
    part, _, special = part.partition(" ")
    line = small(part, tmp_path, "--trainer.max_steps", "3", "--trainer.limit_val_batches", "0")
    # Muon, whose iterations in bfloat16 enlarge rounding, has a case of its own.
    line += ["--model.init_args.optimization.muon_lr", "0.01" if special == "muon" else "0"]
    if special == "corrupted":  # each image by chance, where tiny.yaml blurs all of them alike
        config = yaml.safe_load(Path("configs/upsampler/shapes-64.yaml").read_text())
        line += ["--model.init_args.corruption", json.dumps(config["model"]["init_args"]["corruption"])]
    if part == "clip":  # without batch norm, which sees one rank's batch (trainer.sync_batchnorm needs GPUs)
        (tmp_path / "tiny-vit.json").write_text(json.dumps(VIT))
        open_clip.add_model_config(tmp_path / "tiny-vit.json")
        line += ["--data.init_args.clip.name", "tiny-vit"]
    # Adam divides by the root of tiny second moments, where rounding is all there is: a larger eps keeps it down.
    line += ["--model.init_args.optimization.warmup_steps", "0", "--model.init_args.optimization.eps", "1e-4"]
    start, one = fit(line, tmp_path / "one")
    _, two = fit([*line, *TWO], tmp_path / "two")
    assert one["train_samples"] == two["train_samples"] == 3 * 16
    one, two = (end.get("current_model_state", end["state_dict"]) for end in (one, two))
    moved = sum((one[name] - value).square().sum() for name, value in start.items())
    apart = sum((one[name] - two[name]).square().sum() for name in start)
    assert moved > 0
    assert apart <= 1e-8 * moved  # 1e-4 of the way


class Towers(nn.Module):
    """CLIP's interface on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(6, 4, dtype=torch.float64) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeds = (F.normalize(net(x.flatten(1)), dim=-1) for net, x in ((self.image, image), (self.text, tokens)))
        return *embeds, self.logit_scale.exp()


class TowersTask(ClipTask):
    """Trains them by gradient descent, each rank on a batch of its own."""

    def __init__(self, out: Path) -> None:
        Task.__init__(self)
        self.net, self.preprocess, self.sam_rho, self.out = Towers(), nn.Identity(), 0.1, out

    def train_dataloader(self) -> Any:
        return DataLoader([pairs(self.global_rank)], batch_size=None)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        torch.save(self.net.state_dict(), self.out / f"{self.global_rank}.pt")


def pairs(rank: int) -> ClipBatch:
    image, tokens = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).unbind()
    return ClipBatch(image[:, :, None, None], tokens)


def test_every_rank_looks_for_the_worst_point_by_itself(tmp_path: Path) -> None:
    """A copy of the weights per rank, moved by its own gradient; the step is the mean of the gradients over there."""
    torch.manual_seed(0)
    task = TowersTask(tmp_path)
    copies = [copy.deepcopy(task.net) for _ in range(2)]

    def gradients() -> list[tuple[Tensor, ...]]:
        """Return the gradients of the loss over both batches in each copy: rows of rank r go through copy r."""
        image, text, scale = zip(*(net(*pairs(rank)) for rank, net in enumerate(copies)), strict=True)
        logits, n = torch.cat(image) @ torch.cat(text).T, torch.arange(16)
        loss = torch.zeros((), dtype=torch.float64)
        for rank, rows in enumerate(n.split(8)):
            loss += sum(F.cross_entropy(scale[rank] * part[rows], rows) for part in (logits, logits.T)) / 2
        return [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for net in copies]

    first_gradients = gradients()
    with torch.no_grad():
        for net, first in zip(copies, first_gradients, strict=True):
            length = torch.cat([g.flatten() for g in first]).norm()
            for p, g in zip(net.parameters(), first, strict=True):
                p += 0.1 * g / length
    mean = [(a + b) / 2 for a, b in zip(*gradients(), strict=True)]
    expected = [p.detach() - 0.1 * g for p, g in zip(task.net.parameters(), mean, strict=True)]

    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task)
    names = dict(task.net.named_parameters())
    for rank in range(2):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(weights[name], value)


def test_two_processes_resume_bit_for_bit(small: Small, tmp_path: Path) -> None:
    line = [*small("prior", tmp_path, "--trainer.max_steps", "7"), *TWO]
    line += ["--model.init_args.optimization.decay", "constant"]
    _, whole = fit(line, tmp_path / "whole")
    fit([*line, "--trainer.max_steps", "3"], tmp_path / "cut")
    _, resumed = fit(line, tmp_path / "resumed", resume=last(tmp_path / "cut"))
    for part in ("current_model_state", "state_dict"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    assert len(whole["random_state"]) == 2
    assert str(whole["random_state"]) == str(resumed["random_state"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_both_at_the_same_step(number: signal.Signals, small: Small, tmp_path: Path) -> None:
    line = small("prior", tmp_path, *TWO, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
    line += ["--trainer.max_steps", "1000000", "--trainer.logger.init_args.version", ""]
    command = [sys.executable, "-m", "unclip_pl", "fit", *line]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.05)
    time.sleep(random.random())
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert f"stopped at step {read_checkpoint(last(tmp_path))['global_step']}: " in said


def unit(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def updates(metric: Metric, rows: slice) -> None:
    """Give a metric some rows of the same data."""
    a, b = unit(31, 0)[rows], unit(31, 1)[rows]
    match metric:
        case metrics.FrechetDistance():
            metric.update(a, real=True)
            metric.update(b, real=False)
        case _:
            metric.update(a=a, b=b)


def every_metric() -> list[Metric]:
    return [metrics.FrechetDistance(8), metrics.Rows("a", "b")]


def scores(metric: Metric) -> list[float]:
    value = metric.compute()
    parts = value.values() if isinstance(value, dict) else (value,)
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).flatten() for part in parts]).tolist()


def pool(rank: int, out: Path) -> None:
    """One of two processes: 20 rows here, 11 there, in batches of 4."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    pooled = every_metric()
    for metric in pooled:
        for first in range(0, 20, 4) if rank == 0 else range(20, 31, 4):
            updates(metric, slice(first, min(first + 4, 20 if rank == 0 else 31)))
    torch.save([scores(metric) for metric in pooled], out / f"{rank}.pt")
    dist.destroy_process_group()


def test_every_metric_pools_to_one_value(tmp_path: Path) -> None:
    assert {type(metric).__name__ for metric in every_metric()} == {
        name
        for name in metrics.__all__
        if isinstance(kind := getattr(metrics, name), type) and issubclass(kind, Metric)
    }
    torch.multiprocessing.start_processes(pool, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for metric, first, second in zip(every_metric(), *ranks, strict=True):
        updates(metric, slice(None))
        assert first == second
        assert first == pytest.approx(scores(metric), rel=1e-6), metric
