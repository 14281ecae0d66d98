from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from unclip_pl.nn.kernels import NormSiLU
from unclip_pl.nn.layers import Transformer
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.training.callbacks import CompiledBlocks, RecordedLoss, WarmupEMA, compile_blocks
from unclip_pl.types import PriorBatch, TextFeatures


class Number(LightningModule):
    """One weight, and a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))


def test_the_average_follows_its_recursion() -> None:
    ema, model, trainer = WarmupEMA(decay=0.9), Number(), Trainer(logger=False, accelerator="cpu")
    ema.on_fit_start(trainer, model)
    expected = 0.0
    for n in range(120):
        value = float(n % 7)
        with torch.no_grad():
            model.weight.fill_(value)
            model.seen.fill_(n)
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
    saved: dict = {"state_dict": model.state_dict()}
    ema.on_save_checkpoint(trainer, model, saved)
    torch.testing.assert_close(saved["state_dict"]["weight"].item(), expected, rtol=1e-5, atol=1e-5)
    assert saved["state_dict"]["seen"] == 119
    assert saved["averaging_state"]["n_averaged"] == 120


class Falling(Number):
    """One weight that falls by 1 at every step; what it is when it is scored is kept."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.scored = self.weight.item()

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.scored = self.weight.item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_scores_are_the_averages_and_a_fit_goes_on_from_the_weights(tmp_path: Path) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    batches = DataLoader(torch.zeros(8, 1))

    def trainer(steps: int) -> Trainer:
        written = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        return Trainer(max_steps=steps, callbacks=[WarmupEMA(), written], limit_val_batches=0, **quiet)

    trainer(3).fit(Falling(), batches)
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    average, raw = (checkpoint[name]["weight"].item() for name in ("state_dict", "current_model_state"))
    assert average > raw == -3
    for command in ("validate", "test", "predict"):
        model, other = Falling(), Trainer(callbacks=[WarmupEMA()], **quiet)
        getattr(other, command)(model, batches, ckpt_path=path)
        assert model.scored == average, command
    trainer(4).fit(Falling(), batches, ckpt_path=path)
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["current_model_state"]["weight"] == -4


class Read(LightningModule):
    """A transformer that is to say nothing; what it says in training is kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Transformer(16, 2, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.said = self.net(batch, None)[0]
        return self.said.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_compiled_blocks_say_the_same() -> None:
    said = []
    for callbacks in ([], [CompiledBlocks(), WarmupEMA()]):
        g, model = torch.Generator().manual_seed(1), Read()
        names = list(model.state_dict())
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(max_steps=4, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(model, DataLoader([torch.randn(3, length, 16, generator=g) for length in (5, 7, 5, 6)], None))
        said.append(model.said)
        assert all((block._compiled_call_impl is not None) == bool(callbacks) for block in model.net.resblocks)
        assert list(model.state_dict()) == names
    torch.testing.assert_close(*said)


@pytest.mark.slow  # compiles
def test_a_compiled_norm_says_the_same_and_keeps_the_format() -> None:
    torch.manual_seed(0)
    norm = NormSiLU(4, 16)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.randn(2, 2, 16)
    said = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(norm)
        y = norm(x, scale, shift)
        assert y.is_contiguous(memory_format=torch.channels_last)
        said.append([y, *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])])
    torch.testing.assert_close(*said)


def captions(n: int, length: int) -> TextFeatures:
    mask = torch.ones(n, length, dtype=torch.bool)
    return TextFeatures(mask.long(), torch.randn(n, length, 6), mask, torch.randn(n, 8))


def test_the_loss_that_is_recorded_is_the_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the graphs left out: captions of any length, from the third batch on as a function of tensors."""
    given: list[int] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **_: object) -> torch.nn.Module:
        assert not torch.is_autocast_cache_enabled()
        given.append(inputs[1].shape[1])
        torch.rand(3)  # as the loss does, which is run to warm up
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    torch.manual_seed(0)
    moments = Moments.of(torch.randn(100, 8))
    write_statistics(tmp_path / "s.safetensors", moments=moments, null_text=captions(1, 2), fingerprint="c")
    task = DiffusionPriorTask(PriorTransformer(8, 6, 10, 16, 2, 2), str(tmp_path / "s.safetensors"))
    callback = RecordedLoss()
    for step in range(5):
        batch = PriorBatch(torch.randn(4, 8), captions(4, 3 + step))
        found = []
        for loss in (lambda b: DiffusionPriorTask.loss(task, b), lambda b: callback.loss(task, 10, b)):
            torch.manual_seed(step)
            task.zero_grad()
            value = loss(batch)
            value.backward()
            found.append([value, *(p.grad for p in task.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found)
    assert given == [10]
    task.eval()
    noise = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(callback.loss(task, 10, batch, noise[0]), DiffusionPriorTask.loss(task, batch, noise[1]))
