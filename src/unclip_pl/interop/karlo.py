"""Karlo's own names (github.com/kakaobrain/karlo): guided-diffusion's, with 1×1 convolutions for attention."""

from torch import Tensor

from unclip_pl.interop.layout import Layout, Weights

_UNET = {
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "condition_encoder.image_to_time": "clip_emb",
    "condition_encoder.image_to_context": "clip_tok_proj",
    "condition_encoder.text_embed_to_time": "text_feat_proj",
    "condition_encoder.text_to_context.0": "text_seq_proj.0",
    "condition_encoder.text_to_context.1": "text_seq_proj.1",
}
_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "context_kv": "encoder_kv", "proj_out": "proj_out"}


class KarloPrior(Layout):
    """Karlo's ``PriorTransformer``, whose names ours has taken over."""

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names there of our parameter."""
        return (name,)

    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Return the one tensor."""
        return parts[0]


class KarloUNet(Layout):
    """Karlo's ``PLMImUNet`` and ``SuperResUNetModel``: guided-diffusion's lists of input and output blocks.

    Args:
        res_blocks: number of residual blocks per level on the way down.
        attention_up: levels with attention, counted from the lowest one, in the order of the way up.
        middle_attention: whether the middle attends.
    """

    def __init__(self, res_blocks: int, attention_up: tuple[int, ...], *, middle_attention: bool) -> None:
        self.res_blocks = res_blocks
        self.attention_up = attention_up
        self.middle_attention = middle_attention

    @classmethod
    def of(cls, weights: Weights) -> "KarloUNet":
        """Find the layout of a checkpoint: the first block that ends in an upsampler shows how many a level has."""
        blocks = {key.split(".")[1] for key in weights if key.startswith("output_blocks.")}

        def has(block: int, part: int, module: str) -> bool:
            return f"output_blocks.{block}.{part}.{module}.weight" in weights

        ends = [i for i in range(len(blocks)) if has(i, 1, "in_layers.0") or has(i, 2, "in_layers.0")]
        res_blocks = ends[0] if ends else len(blocks) - 1
        levels = range(len(blocks) // (res_blocks + 1))
        attention_up = tuple(i for i in levels if has(i * (res_blocks + 1), 1, "norm"))
        return cls(res_blocks, attention_up, middle_attention="middle_block.1.norm.weight" in weights)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names there of our parameter."""
        if name == "condition_encoder.null_image_embed":
            return ("cf_param",)
        path, leaf = name.rsplit(".", 1)
        if path.startswith("time_embed."):
            return (name,)
        if path in _UNET:
            return (f"{_UNET[path]}.{leaf}",)
        way, number, *rest = path.split(".")
        if way == "mid":
            return (f"{self._middle(int(number), rest)}.{leaf}",)
        place = self._down if way == "down" else self._up
        return (f"{place(int(number), rest)}.{leaf}",)

    def _middle(self, layer: int, part: list[str]) -> str:
        kind, module = part
        if kind == "attention":
            return f"middle_block.1.{_ATTENTION[module]}"
        return f"middle_block.{layer * (2 if self.middle_attention else 1)}.{_BLOCK[module]}"

    def _down(self, level: int, part: list[str]) -> str:
        first = 1 + level * (self.res_blocks + 1)  # conv_in is the first input block; each level ends in a downsampler
        if part[0] == "resample":
            return f"input_blocks.{first + self.res_blocks}.0.{_BLOCK[part[1]]}"
        _, layer, kind, module = part
        return f"input_blocks.{first + int(layer)}.{self._inside(kind, module)}"

    def _up(self, level: int, part: list[str]) -> str:
        first = level * (self.res_blocks + 1)
        if part[0] == "resample":  # behind the last layer of its level, in the same output block
            position = 2 if level in self.attention_up else 1
            return f"output_blocks.{first + self.res_blocks}.{position}.{_BLOCK[part[1]]}"
        _, layer, kind, module = part
        return f"output_blocks.{first + int(layer)}.{self._inside(kind, module)}"

    @staticmethod
    def _inside(kind: str, module: str) -> str:
        return f"1.{_ATTENTION[module]}" if kind == "attention" else f"0.{_BLOCK[module]}"

    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Drop the axis of the 1×1 convolutions that project for attention."""
        (part,) = parts
        return part.squeeze(-1) if ".attention." in name and part.ndim == 3 else part
