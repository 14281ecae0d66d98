"""A sharded run is the unsharded one: weights, average, optimizer state; each goes on from the other's checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from unclip_pl.errors import InputError
from unclip_pl.nn.ar_prior import ARPriorTransformer
from unclip_pl.nn.layers import Block
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.unet import UNet, UpsamplerUNet
from unclip_pl.nn.unet_blocks import ResBlock
from unclip_pl.tasks.base import Muon
from unclip_pl.training.callbacks import SampleGrid
from unclip_pl.training.sharding import ActivationCheckpointing, units

SHARDED = '{"class_path": "unclip_pl.training.sharding.FullySharded"}'


def callbacks(ema: str, *more: str) -> str:
    named: list[dict[str, Any]] = [{"class_path": ema, "init_args": {"decay": 0.9}}]
    named += [{"class_path": name} for name in more]
    return json.dumps([*named, {"class_path": "unclip_pl.training.resume.StepCheckpoint"}])


EMA = callbacks("unclip_pl.training.callbacks.WarmupEMA")
SHARDED_EMA = callbacks("unclip_pl.training.callbacks.WarmupEMA", "unclip_pl.training.sharding.ActivationCheckpointing")


def upsampler() -> UpsamplerUNet:
    torch.manual_seed(0)
    net = UpsamplerUNet(8, [1, 2], res_blocks=1, dropout=0.5, groups=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def test_every_block_is_a_unit() -> None:
    nets = [
        PriorTransformer(4, 4, 4, width=8, layers=3, heads=2),
        ARPriorTransformer(4, 4, 4, code_length=2, buckets=4, width=8, layers=2, heads=2),
        UNet(channels=8, channel_mult=[1, 2], res_blocks=2, attention_levels=[1], head_channels=8, embed_dim=4),
        upsampler(),
    ]
    for net in nets:
        chosen = list(units(net))
        inside = {id(p) for unit in chosen for p in unit.parameters()}
        blocks = [module for module in net.modules() if isinstance(module, Block | ResBlock)]
        assert blocks
        assert all(id(p) in inside for block in blocks for p in block.parameters())
        assert len(inside) == sum(len(list(unit.parameters())) for unit in chosen)  # none twice


def test_checkpointed_activations_give_the_same_gradients_and_names() -> None:
    """With dropout: the second forward pass must draw what the first one drew."""
    grads = []
    for callback in (None, ActivationCheckpointing()):
        net = upsampler()
        names = list(net.state_dict())
        if callback is not None:
            callback.on_fit_start(None, SimpleNamespace(net=net))  # type: ignore[arg-type]
        torch.manual_seed(1)
        net(torch.randn(2, 6, 8, 8), torch.tensor([3.0, 500.0])).square().sum().backward()
        assert list(net.state_dict()) == names
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_grid_of_a_sharded_network_is_refused() -> None:
    sharded: Any = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))
    module: Any = None
    with pytest.raises(InputError, match="one rank"):
        SampleGrid().on_fit_start(sharded, module)


def fit(mini_run: Path, out: Path, part: str, *words: str, config: str = "tiny") -> dict[str, Any]:
    """``unclip fit`` in two processes, and the checkpoint that they leave."""
    command = [sys.executable, "-m", "unclip_pl", "fit", "--config", f"configs/{part}/{config}.yaml"]
    data = {"source": "data", "store": "store", "clip.pretrained": "clip/checkpoints/last.ckpt"}
    for key, value in data.items():
        command += [f"--data.init_args.{key}", f"{mini_run}/{value}"]
    command += ["--data.init_args.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    command += ["--trainer.val_check_interval", "2", "--trainer.enable_model_summary", "false"]
    command += ["--trainer.enable_progress_bar", "false", "--trainer.logger.init_args.version", ""]
    command += ["--trainer.logger.init_args.save_dir", str(out.parent), "--trainer.logger.init_args.name", out.name]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: dict[str, Any], b: dict[str, Any], atol: float = 1e-6) -> None:
    for kind in ("state_dict", "current_model_state"):
        assert a[kind].keys() == b[kind].keys()
        for name in a[kind]:
            torch.testing.assert_close(a[kind][name], b[kind][name], rtol=1e-5, atol=atol)
    (a_state,), (b_state,) = a["optimizer_states"], b["optimizer_states"]
    assert [g["params"] for g in a_state["param_groups"]] == [g["params"] for g in b_state["param_groups"]]
    for number in a_state["state"]:
        assert a_state["state"][number].keys() == b_state["state"][number].keys()
        for moment in a_state["state"][number].keys() - {"step"}:
            ours, theirs = a_state["state"][number][moment], b_state["state"][number][moment]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol)
    assert int(a["averaging_state"]["n_averaged"]) == int(b["averaging_state"]["n_averaged"])


@pytest.mark.slow
def test_sharded_is_ddp_and_each_goes_on_from_the_other(mini_run: Path, tmp_path: Path) -> None:
    """Two ranks of gloo, the same rows and noise: without sharding, and with it, across an interruption too."""
    adamw = ["--model.init_args.optimization.muon_lr", "0"]  # Muon has a test of its own below
    ddp = [*adamw, "--trainer.strategy", "ddp", "--trainer.callbacks", EMA]
    fsdp = [*adamw, "--trainer.strategy", SHARDED, "--trainer.callbacks", SHARDED_EMA]
    whole = fit(mini_run, tmp_path / "whole", "prior", *ddp, "--trainer.max_steps", "4")
    assert_same(fit(mini_run, tmp_path / "sharded", "prior", *fsdp, "--trainer.max_steps", "4"), whole)
    for first, second in ((ddp, fsdp), (fsdp, ddp), (fsdp, fsdp)):
        fit(mini_run, tmp_path / "half", "prior", *first, "--trainer.max_steps", "2", "--trainer.max_epochs", "9")
        half = ["--ckpt_path", str(tmp_path / "half" / "checkpoints" / "last.ckpt")]
        assert_same(fit(mini_run, tmp_path / "other", "prior", *second, *half, "--trainer.max_steps", "4"), whole)


@pytest.mark.slow
def test_a_sharded_upsampler_is_ddps(mini_run: Path, tmp_path: Path) -> None:
    steps = ["--trainer.max_steps", "2"]
    whole = fit(mini_run, tmp_path / "a", "upsampler", "--trainer.strategy", "ddp", "--trainer.callbacks", EMA, *steps)
    words = ["--trainer.strategy", SHARDED, "--trainer.callbacks", SHARDED_EMA, *steps]
    assert_same(fit(mini_run, tmp_path / "b", "upsampler", *words), whole)


def small_net() -> nn.Module:
    """Matrices of one shape in odd numbers, shards of unequal and of no rows, convolutions, and vectors."""
    torch.manual_seed(0)
    linear = [nn.Linear(*shape) for shape in ((5, 7), (7, 1), (1, 7), (7, 7), (7, 7), (7, 7))]
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), *linear)


def muon_of(net: nn.Module) -> Muon:
    matrices, others = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": others}, {"params": matrices, "muon": True, "lr": 0.02, "weight_decay": 0.1}]
    return Muon(groups, lr=1e-3)


def one_of_two(rank: int, out: Path) -> None:
    """Three steps of a sharded network beside three of a whole one, with the same gradients."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = small_net(), small_net()
    fully_shard(sharded, mesh=mesh)
    ours, theirs = muon_of(whole), muon_of(sharded)
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = distribute_tensor(p.grad, mesh, q.placements)  # type: ignore[attr-defined]
        ours.step()
        theirs.step()
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    apart = max((q.full_tensor() - p).abs().max().item() for p, q in pairs)  # type: ignore[operator]
    (out / f"{rank}.txt").write_text(str(apart))
    dist.destroy_process_group()


@pytest.mark.slow
def test_muon_orthogonalises_whole_matrices(tmp_path: Path) -> None:
    """Gathered, orthogonalised on one process and scattered: two processes are one."""
    torch.multiprocessing.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    assert all(float((tmp_path / f"{rank}.txt").read_text()) < 1e-6 for rank in range(2))


@pytest.mark.slow
def test_muon_sharded_is_muon_under_ddp(mini_run: Path, tmp_path: Path) -> None:
    """And a sharded run goes on from an unsharded one's checkpoint.

    Clipping's last bit may turn one of bfloat16 in an update of .01 · .2 · √(largest side): some 1e-5 a step.
    """
    muon = ["--model.init_args.optimization.muon_lr", "0.01"]
    ddp = [*muon, "--trainer.strategy", "ddp", "--trainer.callbacks", EMA]
    fsdp = [*muon, "--trainer.strategy", SHARDED, "--trainer.callbacks", SHARDED_EMA]
    whole = fit(mini_run, tmp_path / "whole", "prior", *ddp, "--trainer.max_steps", "4")
    fit(mini_run, tmp_path / "half", "prior", *ddp, "--trainer.max_steps", "2", "--trainer.max_epochs", "9")
    half = ["--ckpt_path", str(tmp_path / "half" / "checkpoints" / "last.ckpt")]
    assert_same(fit(mini_run, tmp_path / "other", "prior", *fsdp, *half, "--trainer.max_steps", "4"), whole, atol=4e-5)


SHRUNK = {
    "prior": ["width 64", "layers 2", "heads 2"],
    "ar_prior": ["width 64", "layers 2", "heads 2", "code_length 32", "buckets 256", "dot_buckets 32"],
    "decoder": ["channels 32", "head_channels 32"],
    "upsampler": ["channels 32"],
}
TEXT = "model.init_args.net.init_args.text_encoder.init_args"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "config", "side"),
    [
        ("prior", "paper", None),
        ("ar_prior", "paper", None),
        ("decoder", "paper", 32),
        ("upsampler", "paper", 64),
        ("upsampler", "paper-1024", 128),
    ],
)
def test_the_papers_configs_step_when_shrunk(
    part: str, config: str, side: int | None, mini_run: Path, tmp_path: Path
) -> None:
    """Everything as they say but for sizes: sharding, average, checkpointing, accumulation, bfloat16, drops."""
    words = ["--trainer.num_nodes", "1", "--trainer.max_steps", "1", "--data.init_args.num_workers", "0"]
    words += ["--data.init_args.clip.name", "tiny-rn"]
    for setting in SHRUNK[part]:
        name, value = setting.split()
        words += [f"--model.init_args.net.init_args.{name}", value]
    if part in ("ar_prior", "decoder"):
        words += [f"--{TEXT}.width", "64", f"--{TEXT}.layers", "2", f"--{TEXT}.heads", "2"]
    if part == "ar_prior":
        words += ["--model.init_args.codec", str(mini_run / "codec.safetensors")]
    if side is not None:
        words += ["--data.init_args.image_size", str(side)]
    left = fit(mini_run, tmp_path / part, part, *words, config=config)
    assert left["global_step"] == 1
    (state,) = left["optimizer_states"]
    moved = any(moments["exp_avg"].abs().sum() > 0 for moments in state["state"].values())
    assert moved  # the U-Net's last layer alone, whose zeros shield the others for one step
    assert all(value.isfinite().all() for value in left["state_dict"].values() if value.is_floating_point())
