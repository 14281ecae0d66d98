"""Names in diffusers' PriorTransformer, UNet2DConditionModel with UnCLIPTextProjModel, and UNet2DModel."""

from torch import Tensor

from unclip_pl.interop.layout import Layout, side_by_side

_PRIOR = {
    "text_enc_proj": "encoder_hidden_states_proj",
    "text_emb_proj": "embedding_proj",
    "clip_img_proj": "proj_in",
    "out_proj": "proj_to_clip_embeddings",
    "final_ln": "norm_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
_PRIOR_BLOCK = {
    "attn.c_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.c_proj": ("attn1.to_out.0",),
    "ln_1": ("norm1",),
    "ln_2": ("norm3",),
    "mlp.c_fc": ("ff.net.0.proj",),
    "mlp.c_proj": ("ff.net.2",),
}
_UNET = {
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
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "context_kv": ("add_k_proj", "add_v_proj"),
    "proj_out": ("to_out.0",),
}


class DiffusersPrior(Layout):
    """``PriorTransformer``. Its ``clip_mean`` and ``clip_std`` belong to our embedding space, not to the network.

    Args:
        heads: number of attention heads.
    """

    extra = ("clip_mean", "clip_std")

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names there of our parameter."""
        if name == "positional_embedding":
            return (name,)
        if name == "prd_emb":
            return ("prd_embedding",)
        path, leaf = name.rsplit(".", 1)
        if path in _PRIOR:
            return (f"{_PRIOR[path]}.{leaf}",)
        _, _, block, part = path.split(".", 3)  # transformer.resblocks.{block}.{part}
        return tuple(f"transformer_blocks.{block}.{there}.{leaf}" for there in _PRIOR_BLOCK[part])

    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Fuse the projections, head by head."""
        return side_by_side(parts, self.heads)


class DiffusersUNet(Layout):
    """``UNet2DConditionModel`` and its ``UnCLIPTextProjModel`` in one dictionary, or ``UNet2DModel`` without attention.

    Args:
        head_channels: channels of one attention head.
    """

    def __init__(self, head_channels: int) -> None:
        self.head_channels = head_channels

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names there of our parameter."""
        if name == "condition_encoder.null_image_embed":
            return ("learned_classifier_free_guidance_embeddings",)
        path, leaf = name.rsplit(".", 1)
        if path in _UNET:
            return (f"{_UNET[path]}.{leaf}",)
        way, number, *rest = path.split(".")
        if way == "mid":  # mid.{layer}.block.conv1
            return self._layer("mid_block", number, rest, leaf)
        if rest[0] == "resample":  # down.{level}.resample.conv1
            return (f"{way}_blocks.{number}.{way}samplers.0.{_BLOCK[rest[1]]}.{leaf}",)
        return self._layer(f"{way}_blocks.{number}", rest[1], rest[2:], leaf)  # down.{level}.layers.{layer}.block.conv1

    @staticmethod
    def _layer(level: str, layer: str, part: list[str], leaf: str) -> tuple[str, ...]:
        kind, module = part
        if kind == "block":
            return (f"{level}.resnets.{layer}.{_BLOCK[module]}.{leaf}",)
        return tuple(f"{level}.attentions.{layer}.{there}.{leaf}" for there in _ATTENTION[module])

    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Fuse the projections, head by head."""
        return side_by_side(parts, len(parts[0]) // self.head_channels)
