"""The pieces of the ADM U-Net: residual block, attention with concatenated context, and the levels made of them.

Legend: B batch, C channels, H, W sides of the feature map, E time width, N context tokens, M their width.
Every block keeps the memory format of its input, so a network in ``channels_last`` stays there.
"""

from collections.abc import Callable
from math import gcd
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import Conv2d, GroupNorm, NormSiLU, Resample, attend, resample
from unclip_pl.nn.layers import zeroed

TimeMode = Literal["scale_shift", "additive"]


class Condition(NamedTuple):
    """Caption and image embedding as the U-Net reads them. They do not depend on t: encode once, sample often."""

    time_bias: Tensor  # (B, E) added to the time embedding
    context: Tensor  # (B, N, M) extra keys and values for every attention
    mask: Tensor  # (B, N) bool, False on padding
    image_map: Tensor  # (B, C, S, S) added at the lowest level; of S = 0 where the network has none


def group_norm(groups: int, channels: int) -> GroupNorm:
    """Return a GroupNorm with the greatest common divisor of ``groups`` and ``channels``."""
    return GroupNorm(gcd(groups, channels), channels)


def norm_silu(groups: int, channels: int) -> NormSiLU:
    """Return a NormSiLU with the greatest common divisor of ``groups`` and ``channels``."""
    return NormSiLU(gcd(groups, channels), channels)


class ResBlock(nn.Module):
    """BigGAN residual block as in ADM (Dhariwal & Nichol, 2021).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embed_width: E, the width of the time embedding.
        dropout: dropout rate before the last convolution.
        groups: number of GroupNorm groups.
        time_mode: "scale_shift" lets the time embedding scale and shift the second norm's output; "additive" adds it
            before that norm (Karlo's upsampler).
        mode: "down" or "up" changes the resolution between the first norm and the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embed_width: int,
        dropout: float = 0.0,
        groups: int = 32,
        time_mode: TimeMode = "scale_shift",
        mode: Resample = "none",
    ) -> None:
        super().__init__()
        self.time_mode: TimeMode = time_mode
        self.mode: Resample = mode
        self.norm1 = norm_silu(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embed_width, out_channels * (2 if time_mode == "scale_shift" else 1))
        self.norm2 = norm_silu(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map x (B, C, H, W) and SiLU of the time embedding (B, E) to (B, C_out, H', W')."""
        h = self.conv1(resample(self.norm1(x), self.mode))
        bias = self.time(time)  # (B, C_out or 2·C_out)
        if self.time_mode == "scale_shift":
            h = self.norm2(h, *bias.chunk(2, dim=1))
        else:
            h = self.norm2(h + bias[..., None, None])
        h = self.conv2(self.dropout(h))
        return self.skip(resample(x, self.mode)) + h


class ConvResample(nn.Module):
    """One convolution that changes the resolution (``resample_with_blocks: false``): strided, or nearest and 3×3."""

    def __init__(self, channels: int, mode: Literal["down", "up"]) -> None:
        super().__init__()
        self.mode: Literal["down", "up"] = mode
        self.conv = Conv2d(channels, channels, 3, stride=2 if mode == "down" else 1, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W'). ``time`` is not used: the signature is ResBlock's."""
        return self.conv(x if self.mode == "down" else resample(x, "up"))


class SpatialAttention(nn.Module):
    """Self-attention over positions whose keys and values are preceded by projected context (GLIDE).

    Args:
        channels: C, a multiple of ``head_channels``.
        head_channels: width of a head.
        context_width: M, the width of the context; 0 leaves the context out.
        groups: number of GroupNorm groups.

    Raises:
        InputError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, *, head_channels: int, context_width: int = 0, groups: int = 32) -> None:
        super().__init__()
        if channels % head_channels:
            raise InputError(f"Expected head_channels={head_channels} to divide channels. Got {channels}: change one.")
        self.heads = channels // head_channels
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels) if context_width else None
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        """Map (B, C, H, W) to the same. The context comes first among the keys, then the positions."""
        tokens = self.norm(x).flatten(2).mT  # (B, HW, C), a view in channels_last
        q, k, v = self._heads(self.qkv(tokens), 3)  # (B, heads, HW, head_channels) each
        mask = None
        if self.context_kv is not None and condition is not None:
            context_k, context_v = self._heads(self.context_kv(condition.context), 2)
            k = torch.cat([context_k, k], dim=2)
            v = torch.cat([context_v, v], dim=2)
            mask = F.pad(condition.mask, (0, tokens.shape[1]), value=True)[:, None, None]  # (B, 1, 1, N + HW)
        h = attend(q, k, v, mask)
        h = self.proj_out(h.transpose(1, 2).flatten(2))  # (B, HW, C)
        return x + h.mT.unflatten(2, x.shape[2:])

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split (B, L, parts·C) into ``parts`` tensors (B, heads, L, head_channels), side by side in a head (Karlo)."""
        return tuple(part.transpose(1, 2) for part in x.unflatten(-1, (self.heads, -1)).chunk(parts, dim=-1))


class Layer(nn.Module):
    """A residual block, then attention where the level has it."""

    def __init__(self, block: ResBlock, attention: SpatialAttention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        """Map x (B, C, H, W), SiLU of the time embedding (B, E) and the condition to (B, C_out, H, W)."""
        x = self.block(x, time)
        return x if self.attention is None else self.attention(x, condition)


class DownLevel(nn.Module):
    """The layers at one resolution on the way down, then the way to the next one (None at the last)."""

    def __init__(self, layers: list[Layer], resample: ResBlock | ConvResample | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> list[Tensor]:
        """Return every output in order, for the skip connections; the last one goes on down."""
        outputs = []
        for layer in self.layers:
            x = layer(x, time, condition)
            outputs.append(x)
        if self.resample is not None:
            outputs.append(self.resample(x, time))
        return outputs


class UpLevel(nn.Module):
    """The layers at one resolution on the way up, then the way to the next one (None at full resolution)."""

    def __init__(self, layers: list[Layer], resample: ResBlock | ConvResample | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None, skips: list[Tensor]) -> Tensor:
        """Run the layers, each of which reads one of ``skips`` too, in their order."""
        for layer, skip in zip(self.layers, skips, strict=True):
            x = layer(torch.cat([x, skip], dim=1), time, condition)
        return x if self.resample is None else self.resample(x, time)


class Blocks(NamedTuple):
    """Factory of one network's parts, which differ in their channels only."""

    block: Callable[..., ResBlock]  # of channels in and out
    attention: Callable[[int], SpatialAttention]  # of channels
    resample_with_blocks: bool

    def layer(self, in_channels: int, out_channels: int, *, attend: bool) -> Layer:
        """Make a residual block, with attention behind it if ``attend``."""
        attention = self.attention(out_channels) if attend else None
        return Layer(self.block(in_channels, out_channels), attention)

    def resample(self, channels: int, mode: Literal["down", "up"]) -> ResBlock | ConvResample:
        """Make the way to the next resolution."""
        return self.block(channels, channels, mode=mode) if self.resample_with_blocks else ConvResample(channels, mode)
