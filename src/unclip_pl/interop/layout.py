"""Names and forms of our networks' tensors in other people's checkpoints: diffusers', and Karlo's own.

Weights are copied from name to name, and every tensor is accounted for, on both sides. Import and export read the same
tables.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip_pl.errors import InputError

Weights = Mapping[str, Tensor]


class Layout(NamedTuple):
    """Where another checkpoint keeps the tensors of one of our networks."""

    names: Callable[[str], tuple[str, ...]]  # our parameter's name → the names there of the tensors that make it up
    join: Callable[[list[Tensor], str], Tensor]  # those tensors, our parameter's name → our parameter
    extra: tuple[str, ...] = ()  # tensors there that our network does not have
    split: Callable[[Tensor, int], list[Tensor]] | None = None  # undoes join, given the number of tensors: for export

    def has(self, weights: Weights, name: str) -> bool:
        """Say whether a checkpoint holds all tensors of our parameter ``name``."""
        return all(there in weights for there in self.names(name))

    def modules(self, weights: Weights, pattern: str) -> int:
        """Count modules 0, 1, … in a checkpoint. ``pattern`` is a parameter of ours, with ``{}`` for the number."""
        n = 0
        while self.has(weights, pattern.format(n)):
            n += 1
        return n

    def shape(self, weights: Weights, name: str) -> tuple[int, ...]:
        """Return the shape of our parameter ``name`` in a checkpoint.

        Raises:
            InputError: the checkpoint lacks it.
        """
        missing = [there for there in self.names(name) if there not in weights]
        if missing:
            raise InputError(
                f"Expected {', '.join(missing)}, which says the network's sizes. Got a checkpoint without: download it "
                "again."
            )
        return tuple(self.join([weights[there] for there in self.names(name)], name).shape)


_DIFFUSERS_PRIOR = {
    "text_enc_proj": "encoder_hidden_states_proj",
    "text_emb_proj": "embedding_proj",
    "clip_img_proj": "proj_in",
    "out_proj": "proj_to_clip_embeddings",
    "final_ln": "norm_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
_DIFFUSERS_PRIOR_BLOCK = {
    "attn.c_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.c_proj": ("attn1.to_out.0",),
    "ln_1": ("norm1",),
    "ln_2": ("norm3",),
    "mlp.c_fc": ("ff.net.0.proj",),
    "mlp.c_proj": ("ff.net.2",),
}


def diffusers_prior(heads: int) -> Layout:
    """Return the layout of diffusers' ``PriorTransformer`` with so many attention heads.

    Its ``clip_mean`` and ``clip_std`` belong to our embedding space, not to the network.
    """

    def names(name: str) -> tuple[str, ...]:
        if name == "positional_embedding":
            return (name,)
        if name == "prd_emb":
            return ("prd_embedding",)
        path, leaf = name.rsplit(".", 1)
        if path in _DIFFUSERS_PRIOR:
            return (f"{_DIFFUSERS_PRIOR[path]}.{leaf}",)
        _, _, block, part = path.split(".", 3)  # transformer.resblocks.{block}.{part}
        return tuple(f"transformer_blocks.{block}.{there}.{leaf}" for there in _DIFFUSERS_PRIOR_BLOCK[part])

    return Layout(
        names,
        lambda parts, _: _side_by_side(parts, heads),
        ("clip_mean", "clip_std"),
        lambda whole, count: _apart(whole, count, heads),
    )


_DIFFUSERS_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "condition_encoder.image_to_time": "clip_image_embeddings_project_to_time_embeddings",
    "condition_encoder.image_to_context": "clip_extra_context_tokens_proj",
    "condition_encoder.text_embed_to_time": "embedding_proj",
    "condition_encoder.text_to_context.0": "encoder_hidden_states_proj",
    "condition_encoder.text_to_context.1": "text_encoder_hidden_states_norm",
}
_DIFFUSERS_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_DIFFUSERS_ATTENTION = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "context_kv": ("add_k_proj", "add_v_proj"),
    "proj_out": ("to_out.0",),
}


def diffusers_unet(head_channels: int) -> Layout:
    """Return the layout of ``UNet2DConditionModel`` with its ``UnCLIPTextProjModel``, or of ``UNet2DModel``.

    Args:
        head_channels: channels of one attention head.
    """

    def names(name: str) -> tuple[str, ...]:
        if name == "condition_encoder.null_image_embed":
            return ("learned_classifier_free_guidance_embeddings",)
        path, leaf = name.rsplit(".", 1)
        if path in _DIFFUSERS_UNET:
            return (f"{_DIFFUSERS_UNET[path]}.{leaf}",)
        way, number, *rest = path.split(".")
        if rest[0] == "resample":  # down.{level}.resample.conv1
            return (f"{way}_blocks.{number}.{way}samplers.0.{_DIFFUSERS_BLOCK[rest[1]]}.{leaf}",)
        if way == "mid":  # mid.{layer}.block.conv1
            level, layer, (kind, module) = "mid_block", number, rest
        else:  # down.{level}.layers.{layer}.block.conv1
            level, (_, layer, kind, module) = f"{way}_blocks.{number}", rest
        if kind == "block":
            return (f"{level}.resnets.{layer}.{_DIFFUSERS_BLOCK[module]}.{leaf}",)
        return tuple(f"{level}.attentions.{layer}.{there}.{leaf}" for there in _DIFFUSERS_ATTENTION[module])

    return Layout(
        names,
        lambda parts, _: _side_by_side(parts, len(parts[0]) // head_channels),
        split=lambda whole, count: _apart(whole, count, len(whole) // (count * head_channels)),
    )


def _side_by_side(parts: list[Tensor], heads: int) -> Tensor:
    """Fuse projections of equal height so that those of one head lie together: q, k, v, q, k, v, …"""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _apart(whole: Tensor, count: int, heads: int) -> list[Tensor]:
    """Undo :func:`_side_by_side`."""
    if count == 1:
        return [whole]
    return [part.flatten(0, 1).contiguous() for part in whole.unflatten(0, (heads, count, -1)).unbind(1)]


def karlo_prior() -> Layout:
    """Return the layout of Karlo's ``PriorTransformer``, whose names ours has taken over."""
    return Layout(lambda name: (name,), lambda parts, _: parts[0])


_KARLO_UNET = {
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "condition_encoder.image_to_time": "clip_emb",
    "condition_encoder.image_to_context": "clip_tok_proj",
    "condition_encoder.text_embed_to_time": "text_feat_proj",
    "condition_encoder.text_to_context.0": "text_seq_proj.0",
    "condition_encoder.text_to_context.1": "text_seq_proj.1",
}
_KARLO_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_KARLO_ATTENTION = {"norm": "norm", "qkv": "qkv", "context_kv": "encoder_kv", "proj_out": "proj_out"}


def karlo_unet(weights: Weights) -> Layout:
    """Return the layout of Karlo's ``PLMImUNet`` or ``SuperResUNetModel`` (github.com/kakaobrain/karlo).

    They keep guided-diffusion's lists of input and output blocks, and 1×1 convolutions for attention.

    Args:
        weights: checkpoint, whose first block with an upsampler at its end shows how many blocks a level has.
    """
    blocks = {key.split(".")[1] for key in weights if key.startswith("output_blocks.")}

    def has(block: int, part: int, module: str) -> bool:
        return f"output_blocks.{block}.{part}.{module}.weight" in weights

    ends = [i for i in range(len(blocks)) if has(i, 1, "in_layers.0") or has(i, 2, "in_layers.0")]
    res_blocks = ends[0] if ends else len(blocks) - 1
    middle_attention = "middle_block.1.norm.weight" in weights

    def place(way: str, number: int, part: list[str]) -> str:
        if way == "mid":  # mid.{layer}.block.conv1
            kind, module = part
            if kind == "attention":
                return f"middle_block.1.{_KARLO_ATTENTION[module]}"
            return f"middle_block.{number * (2 if middle_attention else 1)}.{_KARLO_BLOCK[module]}"
        # Each level ends in a resampler. On the way down, conv_in is a block before the first level.
        first, list_of = number * (res_blocks + 1) + (way == "down"), "input" if way == "down" else "output"
        if part[0] == "resample":  # on the way up behind the last layer of its level, in the same block
            position = 0 if way == "down" else 2 if has(first, 1, "norm") else 1
            return f"{list_of}_blocks.{first + res_blocks}.{position}.{_KARLO_BLOCK[part[1]]}"
        _, layer, kind, module = part  # down.{level}.layers.{layer}.block.conv1
        inside = f"1.{_KARLO_ATTENTION[module]}" if kind == "attention" else f"0.{_KARLO_BLOCK[module]}"
        return f"{list_of}_blocks.{first + int(layer)}.{inside}"

    def names(name: str) -> tuple[str, ...]:
        if name == "condition_encoder.null_image_embed":
            return ("cf_param",)
        path, leaf = name.rsplit(".", 1)
        if path.startswith("time_embed."):
            return (name,)
        if path in _KARLO_UNET:
            return (f"{_KARLO_UNET[path]}.{leaf}",)
        way, number, *part = path.split(".")
        return (f"{place(way, int(number), part)}.{leaf}",)

    def join(parts: list[Tensor], name: str) -> Tensor:
        (part,) = parts
        return part.squeeze(-1) if ".attention." in name and part.ndim == 3 else part

    return Layout(names, join)


@torch.no_grad()
def load_weights(net: nn.Module, weights: Weights, layout: Layout, what: str = "the checkpoint") -> None:
    """Copy a checkpoint into ``net``. Nothing may be missing, left over or of another shape.

    Args:
        net: our network, with the checkpoint's sizes.
        weights: tensors by their other names.
        layout: map from our names to the others.
        what: name of the checkpoint, for the error.

    Raises:
        InputError: a key is missing, unexpected or misshapen; the error lists all. ``net`` is left as it was.
    """
    parameters = dict(net.named_parameters())
    sources = {name: layout.names(name) for name in parameters}
    wanted = {there for names in sources.values() for there in names} | set(layout.extra)
    made, misshapen = {}, []
    for name, parameter in parameters.items():
        if not layout.has(weights, name):
            continue
        parts = [weights[there] for there in sources[name]]
        if (tensor := _joined(layout, parts, name)) is not None and tensor.shape == parameter.shape:
            made[name] = tensor
        else:
            have = " + ".join(str(tuple(part.shape)) for part in parts)
            misshapen.append(f"{' + '.join(sources[name])} of shape {have}, together not {tuple(parameter.shape)}")
    faults = [
        _fault("missing", wanted - weights.keys()),
        _fault("unexpected", weights.keys() - wanted),
        _fault("misshapen", misshapen),
    ]
    if any(faults):
        said = "; ".join(filter(None, faults))
        raise InputError(f"{what} does not fit {type(net).__name__}: {said}. Import a checkpoint of Karlo as it is.")
    for name, parameter in parameters.items():
        parameter.copy_(made[name])


def exported(net: nn.Module, layout: Layout) -> Weights:
    """Return the weights of ``net`` under a layout's names: what :func:`load_weights` reads back, bit for bit."""
    assert layout.split is not None
    found: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        names = layout.names(name)
        found |= zip(names, layout.split(parameter.detach().float(), len(names)), strict=True)
    return found


def _joined(layout: Layout, parts: list[Tensor], name: str) -> Tensor | None:
    try:
        return layout.join(parts, name)
    except (RuntimeError, IndexError):  # parts of unequal sizes, or of too few axes
        return None


def _fault(kind: str, keys: Iterable[str]) -> str:
    listed = sorted(keys)
    return f"{len(listed)} {kind} ({', '.join(listed)})" if listed else ""
