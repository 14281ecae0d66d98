"""Packed weights change how long a product takes and nothing else; what is counted is not replayed."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.nn.kernels import packed, recorded


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32, bias=False))


def run(net: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("shape", [(1, 48), (3, 5, 48), (0, 2, 48), (48,)])
def test_the_same_products(net: nn.Sequential, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    plain = run(net, x)
    with packed(net):
        assert ("forward" in vars(net[0])) == torch.backends.mkldnn.is_available()
        torch.testing.assert_close(run(net, x), plain)
        torch.testing.assert_close(run(net, x.expand(2, *shape)), plain.expand(2, *plain.shape))  # not contiguous
    assert torch.equal(run(net, x), plain)


def test_nothing_of_it_stays(net: nn.Sequential) -> None:
    names = set(net.state_dict())
    with packed(net):
        assert set(net.state_dict()) == names
    with pytest.raises(RuntimeError), packed(net):
        net(torch.randn(2, 47))
    assert not any("forward" in vars(layer) for layer in net.modules())
    x = torch.randn(2, 48)
    net(x).sum().backward()  # and gradients flow again
    net.get_parameter("0.weight").data.zero_()
    with packed(net):  # the weights as they are now
        assert torch.equal(run(net, x), run(net, 2 * x))


def test_autocast_goes_before(net: nn.Sequential) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), packed(net):
        assert run(net, torch.randn(2, 48)).dtype == torch.bfloat16


def test_a_packed_product_counts_as_any_other(net: nn.Sequential) -> None:
    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            run(net, torch.randn(3, 5, 48))
        return counter.get_total_flops()

    with packed(net):
        inside = count()
    assert inside == count() == 2 * 15 * (48 * 96 + 96 * 32)


def test_a_step_whose_operations_are_counted_is_not_replayed() -> None:
    """A counter sees what Python dispatches: of a replay nothing."""

    def step(x: Tensor) -> Tensor:
        return x

    with FlopCounterMode(display=False):
        assert recorded(step, torch.device("cuda")) is step
    assert recorded(step, torch.device("cuda")) is not step
    assert recorded(step, torch.device("cpu")) is step
