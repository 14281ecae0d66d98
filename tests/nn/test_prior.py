"""Identities and invariances of the prior's network. That it is diffusers' and Karlo's is shown in tests/interop."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.nn.layers import causal_mask, sinusoidal
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.types import TextFeatures

D, CONTEXT = 12, 9  # W = d, since the reference has one number for both


@pytest.fixture
def net() -> PriorTransformer:
    torch.manual_seed(0)
    return PriorTransformer(D, D, CONTEXT, width=16, layers=3, heads=2).double()


def captions(*lengths: int, seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), D, generator=g, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    embed = torch.randn(len(lengths), D, generator=g, dtype=torch.float64)
    return TextFeatures(mask.long(), states, mask, embed)


def noised(batch: int, draws: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, draws, D, generator=g, dtype=torch.float64)
    return x_t, torch.randint(0, 1000, (batch, draws), generator=g).double()


def uncached(net: PriorTransformer, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
    """The whole sequence at once, one draw: (B, d), (B,) → (B, d)."""
    time = net.time_embed(sinusoidal(index, net.width))
    suffix = torch.stack([time, net.clip_img_proj(x_t), net.prd_emb[:, 0].expand_as(time)], dim=1)
    tokens = torch.cat([net.prefix_tokens(text), suffix + net.positional_embedding[:, CONTEXT + 1 :]], dim=1)
    hidden, _ = net.transformer(tokens, causal_mask(F.pad(text.mask, (0, 4), value=True)))
    return net.out_proj(net.final_ln(hidden[:, -1]))


def test_cached_equals_uncached(net: PriorTransformer) -> None:
    text, (x_t, index) = captions(5, 2, 7), noised(3, 1)
    expected = uncached(net, x_t[:, 0], index[:, 0], text)
    torch.testing.assert_close(net(x_t, index, net.encode_prefix(text))[:, 0], expected)


def test_one_prefix_serves_every_step(net: PriorTransformer) -> None:
    text = captions(5, 2)
    prefix = net.encode_prefix(text)
    for seed in (1, 2, 3):
        x_t, index = noised(2, 1, seed)
        expected = uncached(net, x_t[:, 0], index[:, 0], text)
        torch.testing.assert_close(net(x_t, index, prefix)[:, 0], expected)


def test_room_at_the_end_of_a_prefix_serves_every_step(net: PriorTransformer) -> None:
    text, draws = captions(5, 2), 2
    prefix = net.encode_prefix(text)
    room = prefix.pad(prefix.mask.shape[1] + 3 * draws)
    for seed in (1, 2, 3):
        x_t, index = noised(2, draws, seed)
        with torch.no_grad():
            torch.testing.assert_close(net(x_t, index, room, overwrite=True), net(x_t, index, prefix))


def test_draws_of_a_caption_are_independent(net: PriorTransformer) -> None:
    """K draws in one call are K calls."""
    prefix, (x_t, index) = net.encode_prefix(captions(5, 2)), noised(2, 4)
    apart = [net(x_t[:, k, None], index[:, k, None], prefix) for k in range(4)]
    torch.testing.assert_close(net(x_t, index, prefix), torch.cat(apart, dim=1))


def test_draws_share_gradients_with_separate_calls(net: PriorTransformer) -> None:
    text, (x_t, index) = captions(5, 2), noised(2, 3)
    net(x_t, index, net.encode_prefix(text)).square().sum().backward()
    together = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for k in range(3):
        uncached(net, x_t[:, k], index[:, k], text).square().sum().backward()
    for a, b in zip(together, net.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("text_states", [True, False])
def test_one_pass_is_the_two(text_states: bool) -> None:
    """Outputs and every gradient, captions of different lengths, float64."""
    torch.manual_seed(1)
    net = PriorTransformer(D, D, CONTEXT, width=16, layers=3, heads=2, text_states=text_states).double()
    text, (x_t, index) = captions(5, 1, CONTEXT), noised(3, 1)
    found = []
    for out in (net(x_t, index, net.encode_prefix(text)), net.in_one_pass(x_t, index, text)):
        net.zero_grad()
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_padding_and_cutting_change_nothing(net: PriorTransformer) -> None:
    text, (x_t, index) = captions(5, 2), noised(2, 2)
    expected = net(x_t, index, net.encode_prefix(text))
    garbage = torch.full((2, 3, D), 1e3, dtype=torch.float64)
    padded = TextFeatures(
        F.pad(text.tokens, (0, 3)), torch.cat([text.states, garbage], 1), F.pad(text.mask, (0, 3)), text.embed
    )
    torch.testing.assert_close(net(x_t, index, net.encode_prefix(padded)), expected)
    short = TextFeatures(text.tokens[1:, :2], text.states[1:, :2], text.mask[1:, :2], text.embed[1:])
    torch.testing.assert_close(net(x_t[1:], index[1:], net.encode_prefix(short)), expected[1:])


def test_a_batch_is_its_rows(net: PriorTransformer) -> None:
    text, (x_t, index) = captions(4, 4, 4), noised(3, 2)
    whole = net(x_t, index, net.encode_prefix(text))
    for i in range(3):
        row = text.rows(slice(i, i + 1))
        torch.testing.assert_close(net(x_t[i, None], index[i, None], net.encode_prefix(row)), whole[i, None])


def test_captions_see_no_noise_and_outputs_see_everything(net: PriorTransformer) -> None:
    text, (x_t, index) = captions(5, 2), noised(2, 2)
    text.states.requires_grad_()
    text.embed.requires_grad_()
    x_t.requires_grad_()
    net(x_t, index, net.encode_prefix(text))[0, 0].sum().backward()
    assert text.states.grad is not None
    assert text.embed.grad is not None
    assert x_t.grad is not None
    assert (text.states.grad[0].abs().sum(-1) > 0).all()  # every real token
    assert text.states.grad[1].eq(0).all()  # nobody else's
    assert text.embed.grad[0].ne(0).all()
    assert x_t.grad.abs().sum(-1).gt(0).tolist() == [[True, False], [False, False]]


def test_gradient_reaches_every_parameter(net: PriorTransformer) -> None:
    x_t, index = noised(2, 2)
    net(x_t, index, net.encode_prefix(captions(CONTEXT, 2))).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_guidance_batch_with_one_unconditional_prefix(net: PriorTransformer) -> None:
    cond, null, (x_t, index) = net.encode_prefix(captions(5, 3)), net.encode_prefix(captions(2, seed=9)), noised(2, 1)
    both = net(x_t.repeat(2, 1, 1), index.repeat(2, 1), cond.cat(null.expand(2)))
    torch.testing.assert_close(both[:2], net(x_t, index, cond))
    torch.testing.assert_close(both[2:], net(x_t, index, null.repeat(2)))


def test_karlo_size() -> None:
    """1,022,028,544 parameters in Karlo's published prior."""
    with torch.device("meta"):
        net = PriorTransformer(768, 768, 77, width=2048, layers=20, heads=32)
    assert sum(p.numel() for p in net.parameters()) == 1_022_028_544


def test_without_text_states_z_t_alone_speaks() -> None:
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 2, "heads": 2}
    whole, alone = (PriorTransformer(D, D, CONTEXT, **sizes, text_states=states).double() for states in (True, False))
    alone.load_state_dict(whole.state_dict())  # the same network, in size too
    (x_t, index), text, other = noised(2, 3), captions(5, 2), captions(7, 7, seed=3)
    said = TextFeatures(other.tokens, other.states, other.mask, text.embed)
    expected = alone(x_t, index, alone.encode_prefix(text))
    torch.testing.assert_close(alone(x_t, index, alone.encode_prefix(said)), expected)
    assert not torch.allclose(whole(x_t, index, whole.encode_prefix(text)), expected)
    assert not torch.allclose(alone(x_t, index, alone.encode_prefix(other)), expected)
