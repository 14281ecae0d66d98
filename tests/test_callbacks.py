import torch
from lightning import LightningModule, Trainer

from unclip_pl.callbacks import WarmupEMA


class Number(LightningModule):
    """One weight, and a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))


def test_the_average_follows_its_recursion() -> None:
    ema, model, trainer = WarmupEMA(decay=0.9), Number(), Trainer(logger=False, accelerator="cpu")
    ema.setup(trainer, model, "fit")
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
