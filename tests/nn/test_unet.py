"""Invariances of the U-Net. That it is diffusers' and Karlo's, weight for weight, is shown in tests/interop."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.nn.kernels import resample, scale_shift_norm
from unclip_pl.nn.text import TextTransformer, mix_text
from unclip_pl.nn.unet import UNet
from unclip_pl.nn.unet_blocks import group_norm
from unclip_pl.types import TextFeatures

EMBED, WIDTH = 12, 10
N = TypeVar("N", bound=nn.Module)


def make_text(lengths: list[int], seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    return TextFeatures(
        tokens=torch.randint(50, shape, generator=g),
        states=torch.randn(*shape, WIDTH, generator=g, dtype=torch.float64),
        mask=torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        embed=torch.randn(len(lengths), EMBED, generator=g, dtype=torch.float64),
    )


def randomise(net: N) -> N:
    """Float64 weights without zeros or ones: the zero-initialised branches would hide what flows through them."""
    g = torch.Generator().manual_seed(0)
    for p in net.double().parameters():
        nn.init.normal_(p, std=0.2, generator=g)
    return net.eval()


def tiny_decoder(**changes: Any) -> UNet:
    arguments: dict[str, Any] = {
        "channels": 8,
        "channel_mult": [1, 2, 3],
        "res_blocks": 1,
        "attention_levels": [1, 2],
        "head_channels": 4,
        "groups": 4,
        "embed_dim": EMBED,
        "text_width": WIDTH,
        "text_embed_in_time": True,
    }
    return UNet(**{**arguments, **changes})


@pytest.fixture(scope="module")
def decoder() -> UNet:
    return randomise(tiny_decoder())


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 16, 16, generator=g, dtype=torch.float64)
    z_i = torch.randn(3, EMBED, generator=g, dtype=torch.float64)
    return x, torch.tensor([0.0, 400.0, 999.0], dtype=torch.float64), z_i


EVERYONE = torch.ones(3, dtype=torch.bool)
NOBODY = ~EVERYONE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 3, "time_mode": "additive"},
        {"patch": 2, "resample_with_blocks": False},
        {"channels": 12, "groups": 32, "channel_mult": [2, 3], "context_width": 20, "attention_levels": [0]},
        {"text_width": 0, "text_embed_in_time": False, "image_tokens": 2},
        {"image_map": 4},
        {"text_encoder": TextTransformer(8, 1, 2, context_length=6, vocab_size=50)},
    ],
)
def test_shapes_zero_output_at_the_start_and_a_gradient_for_every_parameter(
    changes: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    net = tiny_decoder(**changes)
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    start = net.double().eval()(x, index, net.encode_condition(z_i, text, EVERYONE))
    assert start.shape == (3, changes.get("out_channels", 6), 16, 16)
    assert start.eq(0).all()
    randomise(net)
    net(x, index, net.encode_condition(z_i, text, torch.tensor([True, False, True]))).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_padding_changes_nothing(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    wide = text.pad(9)
    wide = wide._replace(states=torch.where(wide.mask[..., None], wide.states, 1e3))
    out = decoder(x, index, decoder.encode_condition(z_i, text, EVERYONE))
    torch.testing.assert_close(decoder(x, index, decoder.encode_condition(z_i, wide, EVERYONE)), out)


def test_rows_do_not_see_each_other(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    out = decoder(x, index, decoder.encode_condition(z_i, text, EVERYONE))
    for i in range(3):
        row = text.rows(slice(i, i + 1))
        condition = decoder.encode_condition(z_i[i : i + 1], row, EVERYONE[:1])
        torch.testing.assert_close(decoder(x[i : i + 1], index[i : i + 1], condition), out[i : i + 1])


def test_dropped_conditions_are_not_read(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    null = make_text([1], seed=9)
    a = decoder.encode_condition(z_i, mix_text(make_text([2, 5, 1]), null, NOBODY), NOBODY)
    b = decoder.encode_condition(-z_i, mix_text(make_text([4, 4, 3], seed=5), null, NOBODY), NOBODY)
    torch.testing.assert_close(decoder(x, index, a), decoder(x, index, b))
    only_image = decoder.encode_condition(z_i, mix_text(make_text([2, 5, 1]), null, NOBODY), EVERYONE)
    only_text = decoder.encode_condition(z_i, make_text([2, 5, 1]), NOBODY)
    outputs = [decoder(x, index, c) for c in (a, only_image, only_text)]
    assert all((p - q).abs().amax() > 1e-3 for p, q in zip(outputs, outputs[1:] + outputs[:1], strict=True))


def test_the_map_says_where_at_any_size(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """It lies at the lowest level, stretched to its side, and it is dropped with z_i."""
    net = tiny_decoder(image_map=4).double()
    randomise(net)
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    kept, dropped = (net.encode_condition(z_i, text, keep) for keep in (EVERYONE, NOBODY))
    torch.testing.assert_close(dropped.image_map, dropped.image_map[:1].expand(3, -1, -1, -1))  # the null embedding's
    for side in (16, 32):
        images = F.interpolate(x, size=(side, side))
        flat = kept._replace(image_map=kept.image_map.mean((2, 3), keepdim=True).expand_as(kept.image_map))
        assert not torch.allclose(net(images, index, kept), net(images, index, flat))


def test_no_image_is_not_told_as_an_image_without_noise(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A dropped z_i has no level of noise: no level changes anything, and 0 is another one than none."""
    net = tiny_decoder(image_levels=True).double()
    randomise(net)
    *_, z_i = inputs
    text, levels = make_text([2, 5, 1]), torch.tensor([0.0, 0.2, 0.4]).double()
    told, untold = (net.encode_condition(z_i, text, NOBODY, level) for level in (levels, None))
    torch.testing.assert_close(told.time_bias, untold.time_bias)
    clean = net.encode_condition(z_i, text, EVERYONE, torch.zeros_like(levels))
    assert net.condition_encoder is not None
    net.condition_encoder.level_to_time = None
    torch.testing.assert_close(net.encode_condition(z_i, text, NOBODY).time_bias, told.time_bias)
    assert not torch.allclose(net.encode_condition(z_i, text, EVERYONE).time_bias, clean.time_bias)


def test_guidance_batch_is_two_batches(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A caption beside a shorter empty one, each for three samples."""
    x, index, z_i = inputs
    text, null = make_text([5]).repeat(3), make_text([1], seed=9).repeat(3)
    condition = decoder.encode_condition(z_i, text, EVERYONE)
    unconditional = decoder.encode_condition(z_i, null, NOBODY)
    both = decoder.encode_condition(
        torch.cat([z_i, z_i]), TextFeatures.cat([text, null]), torch.cat([EVERYONE, NOBODY])
    )
    out = decoder(torch.cat([x, x]), torch.cat([index, index]), both)
    torch.testing.assert_close(out, torch.cat([decoder(x, index, condition), decoder(x, index, unconditional)]))


def test_channels_last_is_the_same_function_and_comes_out_as_it_went_in(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    net = randomise(tiny_decoder())
    condition = net.encode_condition(z_i, make_text([2, 5, 1]), EVERYONE)
    out = net(x, index, condition)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), index, condition)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)
    net = net.to(memory_format=torch.contiguous_format)
    net.channels_last = True  # as where the norms are compiled
    torch.testing.assert_close(net(x, index, condition), out)


def test_resampling_by_hand_is_torchs_with_its_gradient() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    for ours, torchs in (
        (resample(x, "down"), F.avg_pool2d(x, 2)),
        (resample(x, "up"), F.interpolate(x, scale_factor=2.0, mode="nearest")),
    ):
        torch.testing.assert_close(ours, torchs)
        weight = torch.randn_like(ours)
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, torchs)))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_norm_with_scale_and_shift_is_the_norm_scaled_and_shifted(format: torch.memory_format) -> None:
    norm = randomise(group_norm(4, 8)).double()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=format)
    scale, shift = torch.randn(2, 3, 8, dtype=torch.float64)
    inputs = [x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_(), *norm.parameters()]
    ours = scale_shift_norm(norm, x, scale, shift)
    plain = norm(x) * (1 + scale)[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, plain)))


def test_upsampler_has_no_attention_and_takes_any_size() -> None:
    net = randomise(UNet(6, 3, channels=8, channel_mult=[1, 2], res_blocks=1, attention_levels=[], groups=4))
    assert not any("attention" in name for name, _ in net.named_parameters())
    for height, width in ((16, 16), (40, 24)):
        x = torch.randn(2, 6, height, width, dtype=torch.float64)
        assert net(x, torch.tensor([10.0, 20.0])).shape == (2, 3, height, width)


def test_a_text_transformer_of_its_own_reads_tokens_and_not_clips_states(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    net = randomise(tiny_decoder(text_encoder=TextTransformer(8, 1, 2, context_length=6, vocab_size=50)))
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    out = net(x, index, net.encode_condition(z_i, text, EVERYONE))
    blind = text._replace(states=torch.zeros_like(text.states))
    torch.testing.assert_close(net(x, index, net.encode_condition(z_i, blind, EVERYONE)), out)
    wide = text.pad(6)
    torch.testing.assert_close(net(x, index, net.encode_condition(z_i, wide, EVERYONE)), out)
    other = text._replace(tokens=(text.tokens + 1) % 50)
    condition = net.encode_condition(z_i, other, EVERYONE)
    assert (net(x, index, condition) - out).abs().amax((1, 2, 3)).min() > 1e-3
    # GLIDE's two ways in: every state is context, the last slot's joins the time.
    assert not torch.allclose(condition.time_bias, net.encode_condition(z_i, text, EVERYONE).time_bias)


def test_errors_name_the_fault(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    unconditional = UNet(channels=8, channel_mult=[1, 2], res_blocks=1, attention_levels=[], groups=4).double()
    condition = decoder.encode_condition(z_i, make_text([2, 5, 1]), EVERYONE)
    with pytest.raises(ValueError, match="unconditional"):
        unconditional.encode_condition(z_i, make_text([2, 5, 1]), EVERYONE)
    with pytest.raises(ValueError, match="exactly when embed_dim"):
        unconditional(x, index, condition)
    with pytest.raises(ValueError, match="exactly when embed_dim"):
        decoder(x, index)
    with pytest.raises(ValueError, match="multiples of 4"):
        decoder(x[..., :14], index, condition)
    with pytest.raises(ValueError, match="head_channels=5"):
        tiny_decoder(head_channels=5)
    with pytest.raises(ValueError, match="embed_dim > 0"):
        UNet(text_width=4)
    with pytest.raises(ValueError, match="embed_dim > 0"):
        UNet(image_levels=True)


KARLO: dict[str, Any] = {"channels": 320, "res_blocks": 3, "channel_mult": [1, 2, 3, 4], "head_channels": 64}


def test_karlos_parameter_counts() -> None:
    """PEERS: decoder 885,439,686 and its text projection 7,878,400; one upsampler 691,579,523."""
    with torch.device("meta"):
        decoder = UNet(
            **KARLO, out_channels=6, embed_dim=768, text_width=768, context_width=1536, text_embed_in_time=True
        )
        upsampler = UNet(6, 3, **KARLO, attention_levels=[], time_mode="additive")
    assert sum(p.numel() for p in decoder.parameters()) == 893_318_086
    assert sum(p.numel() for p in upsampler.parameters()) == 691_579_523
