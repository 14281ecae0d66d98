"""What every Task does alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import fast_bfloat16
from unclip_pl.parts import Optimization
from unclip_pl.tasks.base import ITERATIONS, QUINTIC, Muon, Task, orthogonalised
from unclip_pl.training.cli import build


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


SHAPES = [(6, 40), (40, 6), (9, 9), (6, 40), (3, 1), (1, 5)]


def quintic(s: Tensor) -> Tensor:
    """What the iterations make of a singular value."""
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return s


def test_orthogonalisation_keeps_singular_vectors_and_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    for matrix, out in zip(matrices, orthogonalised(matrices), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(out, (u * quintic(s / s.norm())) @ vh, rtol=1e-9, atol=1e-9)
        assert torch.nn.functional.cosine_similarity(out.flatten(), (u @ vh).flatten(), dim=0) > 0.9  # polar factor
    (nothing,) = orthogonalised([torch.zeros(4, 7)])
    assert not nothing.any()


def test_singular_values_come_near_one() -> None:
    s = torch.linspace(0.08, 1, 200)  # of a matrix with norm 1
    assert ((quintic(s) - 1).abs() < 0.35).all()


def test_bfloat16_is_the_same_to_its_rounding() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    exact = orthogonalised([matrix.double() for matrix in matrices])
    for out, expected in zip(orthogonalised(matrices), exact, strict=True):
        assert (out - expected).norm() <= (0.06 if fast_bfloat16("cpu") else 1e-5) * expected.norm()


def test_a_step_is_a_loop_over_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an SVD for each matrix, torch's own Muon, which works in bfloat16, and AdamW for the rest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 12)).double()
    matrices, others = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": others, "lr": 1e-3}, {"params": matrices, "lr": 0.02, "weight_decay": 0.1, "muon": True}]
    optimizer = Muon(groups, weight_decay=0.0)
    start, by_hand = ([p.detach().clone() for p in matrices] for _ in range(2))
    momenta = [torch.zeros_like(p) for p in matrices]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=ITERATIONS)
    plain = [nn.Parameter(p.detach().clone()) for p in others]
    adamw = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        for ours, copy in zip(matrices + others, theirs + plain, strict=True):
            assert ours.grad is not None
            copy.grad = ours.grad.reshape(copy.shape).clone()
        for p, weight, momentum in zip(matrices, by_hand, momenta, strict=True):
            assert p.grad is not None
            momentum.mul_(0.95).add_(0.05 * p.grad)
            u, s, vh = torch.linalg.svd((0.05 * p.grad + 0.95 * momentum).flatten(1), full_matrices=False)
            step = (u * quintic(s / s.norm())) @ vh * max(1, len(u) / vh.shape[1]) ** 0.5
            weight.mul_(1 - 0.02 * 0.1).sub_(0.02 * step.view_as(weight))
        optimizer.step()
        reference.step()
        adamw.step()
    for p, weight, their, first in zip(matrices, by_hand, theirs, start, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-9)
        assert (their.view_as(first) - p).norm() < 0.05 * (p - first).norm()
    assert all(torch.equal(a, b) for a, b in zip(others, plain, strict=True))


def test_a_parameter_without_gradient_stays() -> None:
    seen, unseen = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = Muon([{"params": [seen, unseen], "muon": True}], lr=0.1)
    optimizer.step()
    seen.sum().backward()
    optimizer.step(lambda: 3.0)
    assert torch.equal(unseen, torch.ones(2, 3))
    assert not torch.equal(seen, torch.ones(2, 3))


@pytest.mark.parametrize("part", ["prior", "ar_prior", "decoder", "upsampler", "clip"])
def test_every_parameter_is_in_one_group(part: str, small: Callable[..., list[str]], tmp_path: Path) -> None:
    task = build(small(part, tmp_path, "--model.init_args.optimization.muon_lr", "0.01")).model
    names = {p: name for name, p in task.named_parameters()}
    *rest, muon = ([names[p] for p in group["params"]] for group in task.optimizer().param_groups)
    everything = [name for group in (*rest, muon) for name in group]
    assert sorted(everything) == sorted(names.values())
    modules = dict(task.named_modules())
    assert all(edge in modules for edge in task.edges)
    left = [name for name in rest[0] if not name.startswith(task.edges)]
    # tokens, positions, and what CLIP multiplies by at the end of its text tower
    known = ("embedding", "prd_emb", "text_projection", "token_embedding.weight")
    assert all(name.removesuffix(".weight").endswith(known) for name in left), left
    assert muon
    assert not any(name.startswith(task.edges) for name in muon)


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    task, other = Square(), Square()
    task.optimization, task._fits = Optimization(muon_lr=0.01), True
    with pytest.raises(InputError, match=r"trained with AdamW alone, .* asks for Muon: change .*muon_lr"):
        task.on_load_checkpoint({"optimizer_states": [other.optimizer().state_dict()]})
    other._fits = True
    with pytest.raises(InputError, match=r"trained with Muon, .* asks for AdamW alone"):
        other.on_load_checkpoint({"optimizer_states": [task.optimizer().state_dict()]})
    other._fits = False  # a test needs the weights alone
    other.on_load_checkpoint({"optimizer_states": [task.optimizer().state_dict()]})
