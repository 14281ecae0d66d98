import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from unclip_pl.callbacks import WarmupEMA


def test_the_average_follows_its_recursion() -> None:
    ema = WarmupEMA(decay=0.9)
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=ema._average)
    expected = None
    for n in range(120):
        value = float(n % 7)
        with torch.no_grad():
            model.weight.fill_(value)
        averaged.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert expected is not None
    torch.testing.assert_close(averaged.module.weight.item(), expected, rtol=1e-5, atol=1e-5)
