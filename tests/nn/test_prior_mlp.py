"""The residual MLP: RCG's block by its formula, and the identities that every network of a diffusion prior obeys."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.nn.layers import sinusoidal
from unclip_pl.nn.prior import PriorMLP, PriorNetwork, PriorTransformer
from unclip_pl.types import TextFeatures

D, W, CONTEXT, WIDTH, BLOCKS = 6, 5, 7, 8, 3


def louder(net: PriorNetwork) -> PriorNetwork:
    """With layers that start at zero drawn, too: wrong inputs are to show in the outputs."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    return net.double()


def mlp(*, text_states: bool = True) -> PriorMLP:
    torch.manual_seed(0)
    return louder(PriorMLP(D, W, WIDTH, BLOCKS, text_states=text_states))  # type: ignore[return-value]


def transformer() -> PriorTransformer:
    torch.manual_seed(0)
    return louder(PriorTransformer(D, W, CONTEXT, WIDTH, layers=2, heads=2))  # type: ignore[return-value]


def captions(*lengths: int, seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), W, generator=g, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(mask.long(), states, mask, torch.randn(len(lengths), D, generator=g, dtype=torch.float64))


def noised(batch: int, draws: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, draws, D, generator=g, dtype=torch.float64)
    return x_t, torch.randint(0, 1000, (batch, draws), generator=g).double()


def test_the_network_is_its_formula() -> None:
    """One caption and one draw, written out from the weights."""
    net, text, (x_t, index) = mlp(), captions(4), noised(1, 1)
    p = dict(net.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    time = linear("time_embed.2", silu(linear("time_embed.0", sinusoidal(index[0, 0], WIDTH).double())))
    y = linear("text_emb_proj", text.embed[0]) + linear("text_enc_proj", text.states[0].mean(0))
    x = linear("in_proj", x_t[0, 0])
    for i in range(BLOCKS):
        b = f"blocks.{i}"
        h = linear(f"{b}.in_proj", silu(norm(f"{b}.ln_1", x)))
        h = h + linear(f"{b}.time_proj", silu(time)) + linear(f"{b}.text_proj", silu(y))
        x = x + linear(f"{b}.out_proj", silu(norm(f"{b}.ln_2", h)))
    torch.testing.assert_close(net.predict(x_t, index, text)[0, 0], linear("out_proj", silu(norm("final_ln", x))))


def test_a_fresh_network_predicts_zero() -> None:
    net, (x_t, index) = PriorMLP(D, W, WIDTH, BLOCKS).double(), noised(2, 3)
    assert not net.predict(x_t, index, captions(4, 2)).any()


@pytest.mark.parametrize("make", [mlp, transformer])
def test_a_sampler_asks_what_was_trained(make: type) -> None:
    """K draws are K calls, for the captions and for the empty one behind them; a second call is like the first."""
    net, text, null = make(), captions(4, 2), captions(1, seed=5)
    with torch.no_grad():
        for seed in (1, 2):
            x_t, index = noised(2, 3, seed)
            expected = torch.cat([net.predict(x_t[:, k, None], index[:, k, None], text) for k in range(3)], dim=1)
            torch.testing.assert_close(net.predict(x_t, index, text), expected)
            step = net.under(text, draws=3)
            for _ in range(2):
                torch.testing.assert_close(step(x_t, index), expected)
            both = net.under(text, null, draws=3)(x_t.repeat(2, 1, 1), index.repeat(2, 1))
            torch.testing.assert_close(both, torch.cat([expected, net.predict(x_t, index, null.repeat(2))]))


def test_padding_changes_nothing_and_no_words_are_heard_as_none() -> None:
    net, text, (x_t, index) = mlp(), captions(4, 2), noised(2, 2)
    expected = net.predict(x_t, index, text)
    garbage = torch.full((2, 2, W), 1e3, dtype=torch.float64)
    padded = TextFeatures(
        F.pad(text.tokens, (0, 2)), torch.cat([text.states, garbage], 1), F.pad(text.mask, (0, 2)), text.embed
    )
    torch.testing.assert_close(net.predict(x_t, index, padded), expected)
    silent = net.predict(x_t, index, text.without_states())
    torch.testing.assert_close(silent, net.predict(x_t, index, text._replace(mask=torch.zeros_like(text.mask))))
    assert not torch.allclose(silent, expected)
    alone = mlp(text_states=False)
    other = text._replace(states=2 * text.states)
    torch.testing.assert_close(alone.predict(x_t, index, text), alone.predict(x_t, index, other))


def test_gradient_reaches_every_parameter() -> None:
    net, (x_t, index) = mlp(), noised(2, 2)
    net.predict(x_t, index, captions(4, 2)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_token_states_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="text_states to false"):
        PriorMLP(D, 0)
    text = captions(4)
    with pytest.raises(ValueError, match=r"states of width 5. Got 2"):
        mlp().predict(*noised(1, 1), text._replace(states=text.states[..., :2]))
