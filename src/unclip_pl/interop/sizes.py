"""Find a network's constructor arguments from the shapes of its tensors."""

from typing import Any

from unclip_pl.interop.layout import Layout, Weights

#: Channels of one attention head in all of Karlo's networks, which no tensor's shape tells.
HEAD = 64


def prior_sizes(weights: Weights, layout: Layout) -> dict[str, Any]:
    """Return the arguments of a :class:`~unclip_pl.nn.prior.PriorTransformer`."""
    width, text_width = layout.shape(weights, "text_enc_proj.weight")
    return {
        "embed_dim": layout.shape(weights, "clip_img_proj.weight")[1],
        "text_width": text_width,
        "context_length": layout.shape(weights, "positional_embedding")[1] - 4,  # z_t, t, z_i^(t), query
        "width": width,
        "layers": layout.modules(weights, "transformer.resblocks.{}.ln_1.weight"),
        "heads": width // HEAD,
    }


def decoder_sizes(weights: Weights, layout: Layout) -> dict[str, Any]:
    """Return the arguments of a decoder's :class:`~unclip_pl.nn.unet.UNet`. Karlo's dropout is 0.1."""
    sizes = _unet_sizes(weights, layout)
    levels = range(len(sizes["channel_mult"]))
    attention = [i for i in levels if layout.has(weights, f"down.{i}.layers.0.attention.norm.weight")]
    context_width, text_width = layout.shape(weights, "condition_encoder.text_to_context.0.weight")
    tokens = layout.shape(weights, "condition_encoder.image_to_context.bias")[0]
    return sizes | {
        "in_channels": layout.shape(weights, "conv_in.weight")[1],
        "out_channels": layout.shape(weights, "conv_out.bias")[0],
        "attention_levels": attention,
        "head_channels": HEAD,
        "dropout": 0.1,
        "embed_dim": layout.shape(weights, "condition_encoder.null_image_embed")[0],
        "text_width": text_width,
        "context_width": context_width,
        "image_tokens": tokens // context_width,
        "text_embed_in_time": layout.has(weights, "condition_encoder.text_embed_to_time.weight"),
    }


def upsampler_sizes(weights: Weights, layout: Layout) -> dict[str, Any]:
    """Return the arguments of an :class:`~unclip_pl.nn.unet.UpsamplerUNet`."""
    return _unet_sizes(weights, layout)


def _unet_sizes(weights: Weights, layout: Layout) -> dict[str, Any]:
    channels = layout.shape(weights, "time_embed.0.weight")[1]
    pattern = "down.{}.layers.0.block.conv1.weight"
    levels = layout.modules(weights, pattern)
    (time_width,) = layout.shape(weights, "down.0.layers.0.block.time.bias")
    return {
        "channels": channels,
        "channel_mult": [layout.shape(weights, pattern.format(i))[0] // channels for i in range(levels)],
        "res_blocks": layout.modules(weights, f"up.{levels - 1}.layers.{{}}.block.norm1.weight") - 1,
        "time_mode": "scale_shift" if time_width > channels else "additive",
    }
