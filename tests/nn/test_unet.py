"""Invariances of the U-Net, and equality with diffusers' modules, whose weights are renamed here for the test only."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.nn.text import mix_text, pad_text
from unclip_pl.nn.unet import UNet
from unclip_pl.types import TextFeatures

EMBED, WIDTH = 12, 10
N = TypeVar("N", bound=nn.Module)


def make_text(lengths: list[int], seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    return TextFeatures(
        tokens=torch.zeros(shape, dtype=torch.long),
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
        {"out_channels": 6, "time_mode": "additive"},
        {"patch": 2, "resample_with_blocks": False},
        {"channels": 12, "groups": 32, "channel_mult": [2, 3], "context_width": 20, "attention_levels": [0]},
        {"text_width": 0, "text_embed_in_time": False, "image_tokens": 2},
        {"image_map": 4},
    ],
)
def test_shapes_zero_output_at_the_start_and_a_gradient_for_every_parameter(
    changes: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    net = tiny_decoder(**changes)
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    start = net.double()(x, index, net.encode_condition(z_i, text, EVERYONE))
    assert start.shape == (3, changes.get("out_channels", 3), 16, 16)
    assert start.eq(0).all()
    randomise(net)
    net(x, index, net.encode_condition(z_i, text, torch.tensor([True, False, True]))).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_padding_changes_nothing(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    wide = pad_text(text, 9)
    wide = wide._replace(states=torch.where(wide.mask[..., None], wide.states, 1e3))
    out = decoder(x, index, decoder.encode_condition(z_i, text, EVERYONE))
    torch.testing.assert_close(decoder(x, index, decoder.encode_condition(z_i, wide, EVERYONE)), out)


def test_rows_do_not_see_each_other(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    out = decoder(x, index, decoder.encode_condition(z_i, text, EVERYONE))
    for i in range(3):
        row = TextFeatures(*(f[i : i + 1] for f in text))
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


def test_guidance_batch_is_two_batches(decoder: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """One condition a caption, repeated for its samples and joined with a shorter unconditional one."""
    x, index, z_i = inputs
    condition = decoder.encode_condition(z_i[:1], make_text([5]), EVERYONE[:1]).repeat(3)
    null = decoder.encode_condition(z_i[:1], make_text([1], seed=9), NOBODY[:1]).repeat(3)
    both = decoder(torch.cat([x, x]), torch.cat([index, index]), condition.cat(null))
    torch.testing.assert_close(both, torch.cat([decoder(x, index, condition), decoder(x, index, null)]))


def test_channels_last_is_the_same_function_and_comes_out_as_it_went_in(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, z_i = inputs
    net = randomise(tiny_decoder())
    condition = net.encode_condition(z_i, make_text([2, 5, 1]), EVERYONE)
    out = net(x, index, condition)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), index, condition)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)


def test_upsampler_has_no_attention_and_takes_any_size() -> None:
    net = randomise(UNet(6, 3, channels=8, channel_mult=[1, 2], res_blocks=1, attention_levels=[], groups=4))
    assert not any("attention" in name for name, _ in net.named_parameters())
    for height, width in ((16, 16), (40, 24)):
        x = torch.randn(2, 6, height, width, dtype=torch.float64)
        assert net(x, torch.tensor([10.0, 20.0])).shape == (2, 3, height, width)


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


# Independent reference: Karlo as diffusers has it.

BLOCK = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
KARLO: dict[str, Any] = {"channels": 320, "res_blocks": 3, "channel_mult": [1, 2, 3, 4], "head_channels": 64}


def diffusers_name(name: str) -> list[str]:
    """The names in diffusers of one of our tensors; several are fused into ours."""
    fixed = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    fixed |= {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}
    path, leaf = name.rsplit(".", 1)
    if path in fixed:
        return [f"{fixed[path]}.{leaf}"]
    way, level, *rest = path.split(".")
    if way == "mid":
        base, number = "mid_block", level
    else:
        base = f"{way}_blocks.{level}"
        if rest[0] == "resample":
            return [f"{base}.{way}samplers.0.{BLOCK[rest[1]]}.{leaf}"]
        number, rest = rest[1], rest[2:]
    if rest[0] == "block":
        return [f"{base}.resnets.{number}.{BLOCK.get(rest[1], 'conv_shortcut')}.{leaf}"]
    parts = {
        "norm": ["group_norm"],
        "qkv": ["to_q", "to_k", "to_v"],
        "context_kv": ["add_k_proj", "add_v_proj"],
        "proj_out": ["to_out.0"],
    }[rest[1]]
    return [f"{base}.attentions.{number}.{part}.{leaf}" for part in parts]


def from_diffusers(net: UNet, reference: dict[str, Tensor], head_channels: int) -> dict[str, Tensor]:
    """``net``'s weights made of ``reference``, which must be used up."""
    state, left = {}, dict(reference)
    for name in net.state_dict():
        if name.startswith("condition_encoder"):
            continue
        parts = [left.pop(n) for n in diffusers_name(name)]
        if len(parts) > 1:  # q, k, v lie side by side within each head
            parts = [torch.stack([p.unflatten(0, (-1, head_channels)) for p in parts], dim=1).flatten(0, 2)]
        state[name] = parts[0]
    assert left == {}
    return state


TEXT_PROJECTION = {
    "null_image_embed": "learned_classifier_free_guidance_embeddings",
    "image_to_time": "clip_image_embeddings_project_to_time_embeddings",
    "image_to_context": "clip_extra_context_tokens_proj",
    "text_embed_to_time": "embedding_proj",
    "text_to_context.0": "encoder_hidden_states_proj",
    "text_to_context.1": "text_encoder_hidden_states_norm",
}


def test_decoder_equals_karlos_in_diffusers(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    reference = randomise(
        diffusers.UNet2DConditionModel(
            in_channels=3, out_channels=6, block_out_channels=(8, 16, 24), layers_per_block=2,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"),
            attention_head_dim=4, cross_attention_dim=20, norm_num_groups=4, only_cross_attention=False,
            class_embed_type="identity", resnet_time_scale_shift="scale_shift",
        )
    )  # fmt: skip
    projection = randomise(UnCLIPTextProjModel(clip_embeddings_dim=EMBED, time_embed_dim=32, cross_attention_dim=20))
    net = tiny_decoder(out_channels=6, res_blocks=2, context_width=20, text_width=EMBED).double()
    state = from_diffusers(net, reference.state_dict(), head_channels=4)
    for ours, theirs in TEXT_PROJECTION.items():
        tensors = {k: v for k, v in projection.state_dict().items() if k.startswith(theirs)}
        state |= {k.replace(theirs, f"condition_encoder.{ours}"): v for k, v in tensors.items()}
    net.load_state_dict(state)

    x, index, z_i = inputs
    text = make_text([2, 5, 1])
    text = text._replace(states=torch.randn(3, 5, EMBED, dtype=torch.float64))
    index = index.float()  # the sinusoids of diffusers are float32
    out = net(x, index, net.encode_condition(z_i, text, EVERYONE))
    context, time_bias = projection(
        image_embeddings=z_i, prompt_embeds=text.embed, text_encoder_hidden_states=text.states,
        do_classifier_free_guidance=False,
    )  # fmt: skip
    visible = torch.cat([torch.ones(3, 4, dtype=torch.bool), text.mask], dim=1)
    expected = reference(x, index, encoder_hidden_states=context, class_labels=time_bias, attention_mask=visible).sample
    torch.testing.assert_close(out, expected)


def test_upsampler_equals_karlos_in_diffusers(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = randomise(
        diffusers.UNet2DModel(
            in_channels=6, out_channels=3, block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4,
            down_block_types=["ResnetDownsampleBlock2D"] * 3, up_block_types=["ResnetUpsampleBlock2D"] * 3,
            add_attention=False, resnet_time_scale_shift="default",
        )
    )  # fmt: skip
    net = UNet(
        6, 3, channels=8, channel_mult=[1, 2, 3], res_blocks=2, attention_levels=[], groups=4, time_mode="additive"
    ).double()
    net.load_state_dict(from_diffusers(net, reference.state_dict(), head_channels=1))
    x = torch.cat([inputs[0], inputs[0].flip(0)], dim=1)
    index = inputs[1].float()
    torch.testing.assert_close(net(x, index), reference(x, index).sample)


def test_karlos_parameter_counts() -> None:
    """PEERS: decoder 885,439,686 and its text projection 7,878,400; one upsampler 691,579,523."""
    with torch.device("meta"):
        decoder = UNet(
            **KARLO, out_channels=6, embed_dim=768, text_width=768, context_width=1536, text_embed_in_time=True
        )
        upsampler = UNet(6, 3, **KARLO, attention_levels=[], time_mode="additive")
    assert sum(p.numel() for p in decoder.parameters()) == 893_318_086
    assert sum(p.numel() for p in upsampler.parameters()) == 691_579_523
