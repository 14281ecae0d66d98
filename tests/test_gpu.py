"""What only a GPU can show. CI has none; run where torch finds one."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unclip_pl.cli import main
from unclip_pl.data.sampler import RowBatch
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.nn.kernels import recorded
from unclip_pl.tasks import Task
from unclip_pl.training.callbacks import RecordedLoss
from unclip_pl.training.cli import build
from unclip_pl.training.resume import StepCheckpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_recorded_step_is_the_step() -> None:
    """Also where it writes in place and reads what it wrote."""
    memory, weight = torch.zeros(4, 8, device="cuda"), torch.randn(8, 8, device="cuda")

    def step(x: Tensor, position: Tensor) -> Tensor:
        memory.index_copy_(0, position, x @ weight)
        return memory.sum(0)

    replayed, expected = recorded(step, memory.device), torch.zeros(8, device="cuda")
    for i in range(4):
        x = torch.randn(1, 8, device="cuda")
        expected = expected + (x @ weight)[0]
        torch.testing.assert_close(replayed(x, torch.tensor([i], device="cuda")), expected)


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    """torch's alarm is the process's."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("part", ["clip", "prior", "ar_prior", "decoder", "upsampler"])
def test_a_training_step_waits_for_no_device(
    part: str, small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, clipping, the optimizer and the average, in Lightning's loop."""
    begin, save = Task.on_train_batch_start, StepCheckpoint.on_train_batch_end

    def watch(self: Task, *args: Any) -> None:
        begin(self, *args)
        torch.cuda.set_sync_debug_mode("error" if self.global_step else "default")  # the first step sets things up

    def rest(self: StepCheckpoint, *args: Any) -> None:  # the last of the callbacks; to write a file, it has to wait
        torch.cuda.set_sync_debug_mode("default")
        save(self, *args)

    monkeypatch.setattr(Task, "on_train_batch_start", watch)
    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", rest)
    more = "--trainer.precision bf16-mixed --trainer.gradient_clip_val 1.0 --trainer.log_every_n_steps 99"
    assert main(["fit", *small(part, tmp_path, *more.split())]) == 0


@pytest.mark.parametrize("part", ["prior", "ar_prior", "decoder"])
def test_a_recorded_loss_is_the_loss(part: str, small: Callable[..., list[str]], tmp_path: Path) -> None:
    """Random numbers included: a graph draws from the generator's state at its replay."""
    cli = build(small(part, tmp_path))
    task, store = cli.model.cuda().train(), cli.datamodule.embeddings
    callback, make = RecordedLoss(), store.decoder_batch if part == "decoder" else store.prior_batch
    for step in range(5):
        batch = make(RowBatch(np.arange(step, step + 8), np.zeros(8, np.uint64)))
        batch = tree_map(Tensor.cuda, batch)
        found = []
        for loss in (partial(type(task).loss, task), partial(callback.loss, task, cli.datamodule.context_length)):
            torch.manual_seed(step)
            task.zero_grad()
            value = loss(batch)
            value.backward()
            found.append([value.detach(), *(p.grad for p in task.parameters() if p.grad is not None)])
            del value  # a graph cannot be recorded while an eager one's nodes live on another stream
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_pictures_are_those_of_the_cpu(prior: str, mini_run: Path) -> None:
    here, there = (
        Unclip.load(mini_run, device=device).generate(["a red star"], prior=prior, seed=1) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.image_embed.cpu(), here.image_embed.cpu(), atol=1e-3, rtol=0)
    torch.testing.assert_close(there.images.cpu(), here.images.cpu(), atol=2e-2, rtol=0)
