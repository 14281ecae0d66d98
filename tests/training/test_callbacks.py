import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from unclip_pl.nn.layers import Transformer
from unclip_pl.training.callbacks import CompiledBlocks, WarmupEMA


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
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
    saved: dict = {"state_dict": model.state_dict()}
    ema.on_save_checkpoint(trainer, model, saved)
    torch.testing.assert_close(saved["state_dict"]["weight"].item(), expected, rtol=1e-5, atol=1e-5)
    assert saved["state_dict"]["seen"] == 119
    assert saved["averaging_state"]["n_averaged"] == 120


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
