"""Karlo's networks as diffusers builds them, small, with random weights; and the same in Karlo's own layout."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import diffusers
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
HEAD = 64  # channels of one attention head, in all of Karlo's networks


@pytest.fixture(scope="session")
def reference() -> Any:
    """This module."""
    return sys.modules[__name__]


def randomised(net: N, seed: int = 0) -> N:
    """Weights without zeros or ones: zero-initialised branches would hide what flows through them."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2, generator=g)
    return net.eval()


def prior(heads: int, head_dim: int, layers: int, embed_dim: int, context: int) -> Any:
    net = diffusers.PriorTransformer(heads, head_dim, layers, embed_dim, context)
    return randomised(net)


def decoder(
    channels: Sequence[int], layers: int, *, embed_dim: int, context_width: int, head: int = HEAD, groups: int = 32
) -> tuple[Any, Any]:
    """UNet and text projection; every level but the first attends, as in Karlo."""
    deeper = len(channels) - 1
    net = diffusers.UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * deeper),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * deeper, "ResnetUpsampleBlock2D"),
        attention_head_dim=head,
        cross_attention_dim=context_width,
        norm_num_groups=groups,
        only_cross_attention=False,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=embed_dim, time_embed_dim=4 * channels[0], cross_attention_dim=context_width
    )
    return randomised(net), randomised(projection)


def upsampler(channels: Sequence[int], layers: int, *, groups: int = 32, seed: int = 0) -> Any:
    net = diffusers.UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=["ResnetDownsampleBlock2D"] * len(channels),
        up_block_types=["ResnetUpsampleBlock2D"] * len(channels),
        add_attention=False,
        resnet_time_scale_shift="default",
    )
    return randomised(net, seed)


def original_prior(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' prior under Karlo's names, as its conversion script has them; statistics are a file of their own."""
    words = {
        "encoder_hidden_states_proj": "text_enc_proj",
        "embedding_proj": "text_emb_proj",
        "proj_in": "clip_img_proj",
        "proj_to_clip_embeddings": "out_proj",
        "norm_out": "final_ln",
        "prd_embedding": "prd_emb",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "transformer_blocks": "transformer.resblocks",
        "norm1": "ln_1",
        "norm3": "ln_2",
        "ff.net.0.proj": "mlp.c_fc",
        "ff.net.2": "mlp.c_proj",
        "attn1.to_out.0": "attn.c_proj",
    }
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("clip_mean", "clip_std"):
            continue
        for theirs, ours in words.items():
            key = key.replace(theirs, ours)
        found[key] = value
    return interleaved(found, ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.c_qkv")


def original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' U-Net as guided-diffusion numbers it: counted up block by block, as the conversion script does."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    resnet |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    fixed |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places = dict(fixed)
    levels = sum(f"down_blocks.{i}.resnets.0.norm1.weight" in state for i in range(9))

    def place(theirs: str, original: str) -> None:
        places.update({f"{theirs}.{a}": f"{original}.{b}" for a, b in resnet.items()})

    def attention(theirs: str, original: str) -> bool:
        places.update({f"{theirs}.group_norm": f"{original}.norm", f"{theirs}.to_out.0": f"{original}.proj_out"})
        places.update({f"{theirs}.to_{x}": f"{original}.to_{x}" for x in "qkv"})
        places.update({f"{theirs}.add_{x}_proj": f"{original}.add_{x}_proj" for x in "kv"})
        return f"{theirs}.group_norm.weight" in state

    block = 1
    for i in range(levels):
        j = 0
        while f"down_blocks.{i}.resnets.{j}.norm1.weight" in state:
            place(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{block}.0")
            attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{block}.1")
            block, j = block + 1, j + 1
        if f"down_blocks.{i}.downsamplers.0.norm1.weight" in state:
            place(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{block}.0")
            block += 1
    place("mid_block.resnets.0", "middle_block.0")
    attends = attention("mid_block.attentions.0", "middle_block.1")
    place("mid_block.resnets.1", f"middle_block.{1 + attends}")
    block = 0
    for i in range(levels):
        j = 0
        while f"up_blocks.{i}.resnets.{j}.norm1.weight" in state:
            place(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0")
            attends = attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{block}.1")
            block, j = block + 1, j + 1
        place(f"up_blocks.{i}.upsamplers.0", f"output_blocks.{block - 1}.{1 + attends}")
    found = {}
    for key, value in state.items():
        path, leaf = key.rsplit(".", 1)
        found[f"{places[path]}.{leaf}"] = value
    found = interleaved(found, ("to_q", "to_k", "to_v"), "qkv")
    found = interleaved(found, ("add_k_proj", "add_v_proj"), "encoder_kv")
    convolutions = (".qkv.weight", ".encoder_kv.weight", ".proj_out.weight")
    return {key: value[..., None] if key.endswith(convolutions) else value for key, value in found.items()}


def original_projection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' text projection, which is part of the decoder in Karlo."""
    words = {
        "learned_classifier_free_guidance_embeddings": "cf_param",
        "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
        "clip_extra_context_tokens_proj": "clip_tok_proj",
        "embedding_proj": "text_feat_proj",
        "encoder_hidden_states_proj": "text_seq_proj.0",
        "text_encoder_hidden_states_norm": "text_seq_proj.1",
    }
    found = {}
    for key, value in state.items():
        for theirs, original in words.items():
            if key.startswith(theirs):
                found[original + key.removeprefix(theirs)] = value
    return found


def interleaved(state: dict[str, Tensor], parts: Sequence[str], fused: str) -> dict[str, Tensor]:
    """Separate projections fused row by row: 64 rows of the first, 64 of the second, …, then the next head."""
    found = {}
    for key, value in state.items():
        name = next((part for part in parts if f".{part}." in key), None)
        if name is None:
            found[key] = value
        elif name == parts[0]:
            group = [state[key.replace(name, part)] for part in parts]
            found[key.replace(name, fused)] = torch.cat(
                [rows for head in zip(*(g.split(HEAD) for g in group), strict=True) for rows in head]
            )
    return found
