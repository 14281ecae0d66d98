"""With another library's weights our networks are that library's; nothing of a checkpoint goes unnoticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip_pl.clip import ClipSpec
from unclip_pl.interop.layout import diffusers_prior, diffusers_unet, karlo_prior, karlo_unet, load_weights
from unclip_pl.interop.sizes import HEAD, decoder_sizes, prior_sizes, upsampler_sizes
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.unet import UNet, UpsamplerUNet
from unclip_pl.settings import read_yaml
from unclip_pl.types import TextFeatures

D, CONTEXT_WIDTH = 24, 20
SAME = {"rtol": 0, "atol": 1e-4}  # float32


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def captions(lengths: list[int], embed_dim: int) -> TextFeatures:
    g = generator()
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    states = torch.randn(*mask.shape, embed_dim, generator=g)
    return TextFeatures(mask.long(), states, mask, torch.randn(len(lengths), embed_dim, generator=g))


def our_decoder(channels: list[int], layers: int, *, head: int, groups: int, embed_dim: int = D) -> UNet:
    return UNet(
        out_channels=6,
        channels=channels[0],
        channel_mult=[c // channels[0] for c in channels],
        res_blocks=layers,
        attention_levels=range(1, len(channels)),
        head_channels=head,
        groups=groups,
        embed_dim=embed_dim,
        text_width=embed_dim,
        context_width=CONTEXT_WIDTH,
        text_embed_in_time=True,
    ).eval()


def our_upsampler(channels: list[int], layers: int, groups: int) -> UpsamplerUNet:
    mult = [c // channels[0] for c in channels]
    return UpsamplerUNet(channels[0], mult, layers, groups=groups, time_mode="additive").eval()


@pytest.mark.parametrize(
    ("heads", "head_dim", "layers", "embed_dim", "context"),
    [(2, 8, 3, 12, 9), (4, 16, 1, 20, 5), (1, 32, 2, 8, 77), (2, 64, 2, 24, 16)],
)
@torch.no_grad()
def test_prior_is_diffusers(
    heads: int, head_dim: int, layers: int, embed_dim: int, context: int, reference: Any
) -> None:
    theirs = reference.prior(heads, head_dim, layers, embed_dim, context)
    ours = PriorTransformer(embed_dim, embed_dim, context, width=heads * head_dim, layers=layers, heads=heads)
    load_weights(ours, theirs.state_dict(), diffusers_prior(heads))
    text = captions([context, 4, 2], embed_dim)
    x_t = torch.randn(3, 1, embed_dim, generator=generator())
    index = torch.tensor([[0.0], [500.0], [999.0]])
    expected = theirs(x_t[:, 0], index[:, 0], text.embed, text.states, text.mask).predicted_image_embedding
    torch.testing.assert_close(ours(x_t, index, ours.encode_prefix(text))[:, 0], expected, **SAME)


UNETS = [
    {"channels": [8, 16, 24], "layers": 2, "head": 4, "groups": 4},
    {"channels": [32, 64], "layers": 1, "head": 64, "groups": 32},
    {"channels": [8, 16, 24, 32], "layers": 3, "head": 8, "groups": 8},
]


@pytest.mark.parametrize("size", UNETS)
@torch.no_grad()
def test_decoder_is_diffusers(size: dict[str, Any], reference: Any) -> None:
    theirs, projection = reference.decoder(**size, embed_dim=D, context_width=CONTEXT_WIDTH)
    ours = our_decoder(**size)
    load_weights(ours, theirs.state_dict() | projection.state_dict(), diffusers_unet(size["head"]))
    text = captions([2, 5, 1], D)
    z_i = torch.randn(3, D, generator=generator())
    x_t = torch.randn(3, 3, 16, 16, generator=generator())
    index = torch.tensor([0.0, 400.0, 999.0])
    context, time_bias = projection(
        image_embeddings=z_i,
        prompt_embeds=text.embed,
        text_encoder_hidden_states=text.states,
        do_classifier_free_guidance=False,
    )
    visible = torch.cat([torch.ones(3, 4, dtype=torch.bool), text.mask], dim=1)
    expected = theirs(x_t, index, encoder_hidden_states=context, class_labels=time_bias, attention_mask=visible).sample
    out = ours(x_t, index, ours.encode_condition(z_i, text, torch.ones(3, dtype=torch.bool)))
    torch.testing.assert_close(out, expected, **SAME)


@pytest.mark.parametrize("size", UNETS)
@torch.no_grad()
def test_upsampler_is_diffusers(size: dict[str, Any], reference: Any) -> None:
    sizes = {"channels": size["channels"], "layers": size["layers"], "groups": size["groups"]}
    theirs = reference.upsampler(**sizes)
    ours = our_upsampler(**sizes)
    load_weights(ours, theirs.state_dict(), diffusers_unet(size["head"]))
    x = torch.randn(2, 6, 32, 16, generator=generator())
    index = torch.tensor([0.0, 832.0])
    torch.testing.assert_close(ours(x, index), theirs(x, index).sample, **SAME)


def test_the_small_karlo_is_diffusers(reference: Any) -> None:
    """Every tensor of `*/karlo-tiny.yaml` has its place in diffusers' modules, whose shapes tell the config's sizes."""
    clip = ClipSpec("karlo-tiny")
    assert clip.embed_dim == clip.text_width  # one number in diffusers

    def sizes(part: str) -> dict[str, Any]:
        return read_yaml(Path("configs") / part / "karlo-tiny.yaml")["model"]["init_args"]["net"]["init_args"]

    prior, decoder, upsampler = (sizes(part) for part in ("prior", "decoder", "upsampler"))
    theirs = reference.prior(prior["heads"], HEAD, prior["layers"], clip.embed_dim, clip.context_length).state_dict()
    channels = [[net["channels"] * mult for mult in net["channel_mult"]] for net in (decoder, upsampler)]
    blocks = decoder["res_blocks"]
    two = reference.decoder(channels[0], blocks, embed_dim=clip.embed_dim, context_width=decoder["context_width"])
    both = two[0].state_dict() | two[1].state_dict()
    large = reference.upsampler(channels[1], upsampler["res_blocks"]).state_dict()
    cases = [
        (prior, theirs, diffusers_prior(prior["heads"]), prior_sizes, PriorTransformer),
        (decoder, both, diffusers_unet(HEAD), decoder_sizes, UNet),
        (upsampler, large, diffusers_unet(HEAD), upsampler_sizes, UpsamplerUNet),
    ]
    for ours, weights, layout, sizes_of, network in cases:
        found = sizes_of(weights, layout)
        assert ours.items() <= (found | {"dropout": 0.0}).items()  # which no shape tells
        load_weights(network(**found), weights, layout)


def weights_of(net: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(("channels", "layers"), [([32, 64], 1), ([32, 64, 128], 2), ([32, 64, 128, 192], 3)])
def test_karlos_own_layout_gives_the_same_weights(channels: list[int], layers: int, reference: Any) -> None:
    """The original checkpoint, counted up as diffusers' conversion script counts it, against diffusers' own names."""
    theirs, projection = reference.decoder(channels, layers, embed_dim=D, context_width=CONTEXT_WIDTH)
    state = theirs.state_dict() | projection.state_dict()
    original = reference.original_unet(theirs.state_dict()) | reference.original_projection(projection.state_dict())
    a, b = (our_decoder(channels, layers, head=64, groups=32) for _ in range(2))
    load_weights(a, state, diffusers_unet(64))
    load_weights(b, original, karlo_unet(original))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    state = reference.upsampler(channels, layers).state_dict()
    original = reference.original_unet(state)
    c, d = (our_upsampler(channels, layers, 32) for _ in range(2))
    load_weights(c, state, diffusers_unet(64))
    load_weights(d, original, karlo_unet(original))
    assert all(torch.equal(x, y) for x, y in zip(c.parameters(), d.parameters(), strict=True))

    state = reference.prior(2, 64, 3, D, 9).state_dict()
    e, f = (PriorTransformer(D, D, 9, width=128, layers=3, heads=2) for _ in range(2))
    load_weights(e, state, diffusers_prior(2))
    load_weights(f, reference.original_prior(state), karlo_prior())
    assert all(torch.equal(x, y) for x, y in zip(e.parameters(), f.parameters(), strict=True))


def test_every_fault_is_listed_and_nothing_is_loaded(reference: Any) -> None:
    state = reference.prior(2, 8, 2, 12, 9).state_dict()
    for key in ("norm_out.bias", "transformer_blocks.1.attn1.to_k.weight"):
        del state[key]
    state |= {"proj_in.weight": torch.zeros(16, 13), "transformer_blocks.0.attn1.to_v.bias": torch.zeros(15)}
    state |= {"transformer_blocks.2.norm1.bias": torch.zeros(16), "transformer_blocks.2.norm1.weight": torch.zeros(16)}
    net = PriorTransformer(12, 12, 9, width=16, layers=2, heads=2)
    before = weights_of(net)
    with pytest.raises(ValueError, match="does not fit PriorTransformer") as error:
        load_weights(net, state, diffusers_prior(2), "prior.bin")
    said = str(error.value)
    assert "prior.bin" in said
    assert "2 missing (norm_out.bias, transformer_blocks.1.attn1.to_k.weight)" in said
    assert "2 unexpected (transformer_blocks.2.norm1.bias, transformer_blocks.2.norm1.weight)" in said
    assert "2 misshapen" in said
    assert "proj_in.weight of shape (16, 13), together not (16, 12)" in said
    assert "attn1.to_v.bias of shape (16,) + (16,) + (15,)" in said
    assert all(torch.equal(x, y) for x, y in zip(before, net.parameters(), strict=True))


def test_statistics_are_asked_for(reference: Any) -> None:
    state = reference.prior(2, 8, 1, 12, 9).state_dict()
    del state["clip_std"]
    with pytest.raises(ValueError, match=r"1 missing \(clip_std\)"):
        load_weights(PriorTransformer(12, 12, 9, 16, 1, 2), state, diffusers_prior(2))
