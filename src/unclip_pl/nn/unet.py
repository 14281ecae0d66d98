"""The U-Net of GLIDE and ADM: unCLIP's decoder when conditional, its upsamplers when not (arXiv 2204.06125, §2.1).

Level by level it is Karlo's decoder and upsampler, so that their checkpoints fit in.
Legend: B batch, d CLIP embedding dimension, E time width, N context tokens, M context width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import Conv2d
from unclip_pl.nn.layers import sinusoidal, zeroed
from unclip_pl.nn.text import TextTransformer
from unclip_pl.nn.unet_blocks import (
    Blocks,
    Condition,
    DownLevel,
    ResBlock,
    SpatialAttention,
    TimeMode,
    UpLevel,
    norm_silu,
)
from unclip_pl.types import TextFeatures

#: A noise level of z_i from 0 to 1 is embedded as a time from 0 to this.
LEVELS = 1000.0

__all__ = ["Condition", "ConditionEncoder", "UNet", "UpsamplerUNet"]


class ConditionEncoder(nn.Module):
    """Projects z_i into the time embedding and into context tokens, and text states into further context tokens.

    A text transformer of its own also adds its last state to the time embedding, as in GLIDE.

    Args:
        embed_dim: d, the width of z_i and z_t.
        time_width: E, the width of the time embedding.
        context_width: M, the width of the context.
        image_tokens: number of tokens that z_i becomes (paper: 4).
        text_width: width of CLIP's text states; 0 leaves the caption out.
        text_encoder: text transformer that makes its own states from the token ids; None takes CLIP's states.
        text_embed_in_time: add a projection of z_t to the time embedding too (Karlo).
        map_channels: C, the channels of the map that z_i becomes.
        map_side: S, the side of that map; 0 leaves it out (paper).
        image_levels: add a projection of the level of noise on z_i to the time embedding (Stable unCLIP).
    """

    def __init__(
        self,
        embed_dim: int,
        time_width: int,
        context_width: int,
        image_tokens: int,
        text_width: int,
        text_encoder: TextTransformer | None,
        text_embed_in_time: bool,
        map_channels: int,
        map_side: int,
        image_levels: bool = False,
    ) -> None:
        super().__init__()
        text_width = text_width if text_encoder is None else text_encoder.width
        self.image_tokens = image_tokens
        self.map_shape = (map_channels, map_side, map_side)
        self.image_to_map = nn.Linear(embed_dim, map_channels * map_side**2) if map_side else None
        self.null_image_embed = nn.Parameter(torch.zeros(embed_dim))
        self.image_to_time = nn.Linear(embed_dim, time_width)
        self.image_to_context = nn.Linear(embed_dim, image_tokens * context_width)
        self.text_embed_to_time = nn.Linear(embed_dim, time_width) if text_embed_in_time else None
        self.text_encoder = text_encoder
        self.text_to_time = None if text_encoder is None else nn.Linear(text_width, time_width)
        self.text_to_context = (
            nn.Sequential(nn.Linear(text_width, context_width), nn.LayerNorm(context_width)) if text_width else None
        )
        self.level_to_time = nn.Linear(time_width, time_width) if image_levels else None

    def forward(
        self, image_embed: Tensor, text: TextFeatures, *, keep_image: Tensor, level: Tensor | None = None
    ) -> Condition:
        """Encode the condition, see :meth:`UNet.encode_condition`."""
        z_i = torch.where(keep_image[:, None], image_embed, self.null_image_embed)
        time_bias = self.image_to_time(z_i)
        if self.level_to_time is not None:
            told = torch.zeros_like(z_i[:, 0]) if level is None else level
            features = sinusoidal(LEVELS * told, self.level_to_time.in_features)
            # Where z_i is dropped there is no level: told 0, the network would take "no noise" for "no image".
            time_bias = time_bias + self.level_to_time(features.to(time_bias.dtype)).where(keep_image[:, None], 0.0)
        if self.text_embed_to_time is not None:
            time_bias = time_bias + self.text_embed_to_time(text.embed)
        states = text.states
        if self.text_encoder is not None and self.text_to_time is not None:
            states, last = self.text_encoder(text.tokens, text.mask)
            time_bias = time_bias + self.text_to_time(last)
        # The token is the fastest axis of the projection, as in Karlo.
        context = self.image_to_context(z_i).unflatten(-1, (-1, self.image_tokens)).mT  # (B, image_tokens, M)
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        if self.text_to_context is not None:
            context = torch.cat([context, self.text_to_context(states)], dim=1)
            mask = torch.cat([mask, text.mask], dim=1)
        if self.image_to_map is None:
            image_map = z_i.new_empty(len(z_i), self.map_shape[0], 0, 0)
        else:
            image_map = self.image_to_map(z_i).unflatten(-1, self.map_shape)
        return Condition(time_bias, context, mask, image_map)


def _down_path(
    blocks: Blocks, widths: Sequence[int], res_blocks: int, attention_levels: Sequence[int]
) -> tuple[nn.ModuleList, list[int]]:
    """Make the levels on the way down, and list the channels of every skip connection in order, from conv_in's on."""
    path, skips = nn.ModuleList(), [widths[0]]
    for i, c in enumerate(widths):
        ends = i == len(widths) - 1
        layers = [blocks.layer(skips[-1] if j == 0 else c, c, attend=i in attention_levels) for j in range(res_blocks)]
        path.append(DownLevel(layers, None if ends else blocks.resample(c, "down")))
        skips += [c] * (res_blocks if ends else res_blocks + 1)
    return path, skips


def _up_path(
    blocks: Blocks, widths: Sequence[int], res_blocks: int, attention_levels: Sequence[int], skips: list[int]
) -> nn.ModuleList:
    """Make the levels on the way up; every layer takes one skip connection, the last made first."""
    path, c_in = nn.ModuleList(), widths[-1]
    for i, c in reversed(list(enumerate(widths))):
        layers = [
            blocks.layer((c_in if j == 0 else c) + skips.pop(), c, attend=i in attention_levels)
            for j in range(res_blocks + 1)
        ]
        path.append(UpLevel(layers, blocks.resample(c, "up") if i > 0 else None))
        c_in = c
    return path


class UNet(nn.Module):
    """ADM's U-Net with GLIDE's context, from noisy images to the prediction of the task's parameterisation.

    The defaults are the paper's 64 px decoder without its condition.

    Args:
        in_channels: 3, or 6 with the low-resolution image beside x_t (upsamplers).
        out_channels: 6 to learn the variance beside the mean, 3 for the mean alone.
        channels: unit of width; the time embedding is four times as wide.
        channel_mult: width of every level as a multiple of ``channels``.
        res_blocks: residual blocks per level (one more on the way up).
        attention_levels: the levels that attend, 0 being the full resolution; the middle attends if the last one does.
        head_channels: channels of one attention head.
        dropout: dropout rate in every residual block.
        groups: GroupNorm groups; where they do not divide the channels, the greatest common divisor is taken.
        embed_dim: d, the width of z_i; 0 makes the network unconditional.
        text_width: width of CLIP's text states; 0 leaves captions out of the context.
        text_encoder: text transformer that reads token ids and is trained along (the paper's, GLIDE's 2048 × 24); None
            takes the states of frozen CLIP (Karlo).
        context_width: M, the width of the context; 0 takes the time width (Karlo: 1536).
        image_tokens: number of context tokens made of z_i.
        text_embed_in_time: add z_t to the time embedding too (Karlo).
        image_map: side of a map that z_i becomes, stretched over the lowest level's features and added to them; 0
            leaves it out (paper). The paper's two ways in are blind to position. A small network with only a few
            thousand steps learns sooner with the map.
        time_mode: how the time enters a residual block; see :class:`~unclip_pl.nn.unet_blocks.ResBlock`.
        resample_with_blocks: change the resolution inside residual blocks; false takes one convolution.
        patch: side of the squares of pixels that become the channels of one position, and pixels again at the end.
        image_levels: tell the network the level of noise on z_i (Stable unCLIP), as ``image_noise`` of a decoder needs.

    Raises:
        InputError: a condition is to be used without ``embed_dim``.
    """

    #: Whether feature maps are laid out channels last, for networks whose norms are compiled.
    channels_last = False

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 6,
        channels: int = 512,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        res_blocks: int = 3,
        attention_levels: Sequence[int] = (1, 2, 3),
        head_channels: int = 64,
        dropout: float = 0.1,
        groups: int = 32,
        embed_dim: int = 0,
        text_width: int = 0,
        text_encoder: TextTransformer | None = None,
        context_width: int = 0,
        image_tokens: int = 4,
        text_embed_in_time: bool = False,
        image_map: int = 0,
        time_mode: TimeMode = "scale_shift",
        resample_with_blocks: bool = True,
        patch: int = 1,
        image_levels: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim == 0 and (text_width or text_encoder or text_embed_in_time or image_map or image_levels):
            raise InputError(
                "Expected embed_dim > 0 with text_width, text_encoder, text_embed_in_time, image_map or image_levels. "
                "Got 0: set it."
            )
        time_width = 4 * channels
        context_width = context_width or time_width
        widths = [channels * m for m in channel_mult]
        self.channels = channels
        self.out_channels = out_channels
        self.patch = patch
        self.image_levels = image_levels
        self.stride = patch * 2 ** (len(widths) - 1)
        self.skips_per_level = res_blocks + 1
        context = context_width if embed_dim else 0
        block = partial(ResBlock, embed_width=time_width, dropout=dropout, groups=groups, time_mode=time_mode)
        attention = partial(SpatialAttention, head_channels=head_channels, context_width=context, groups=groups)
        blocks = Blocks(block, attention, resample_with_blocks)
        self.time_embed = nn.Sequential(nn.Linear(channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        reads = (image_tokens, text_width, text_encoder, text_embed_in_time, widths[-1], image_map, image_levels)
        encoder = ConditionEncoder(embed_dim, time_width, context_width, *reads) if embed_dim else None
        self.condition_encoder = encoder
        self.conv_in = Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.down, skips = _down_path(blocks, widths, res_blocks, attention_levels)
        attend = len(widths) - 1 in attention_levels
        self.mid = nn.ModuleList(blocks.layer(widths[-1], widths[-1], attend=a) for a in (attend, False))
        self.up = _up_path(blocks, widths, res_blocks, attention_levels, skips)
        self.norm_out = norm_silu(groups, widths[0])
        self.conv_out = zeroed(Conv2d(widths[0], out_channels * patch**2, 3, padding=1))

    def encode_condition(
        self, image_embed: Tensor, text: TextFeatures, keep_image: Tensor, level: Tensor | None = None
    ) -> Condition:
        """Encode what does not depend on t, once for a whole sampling run.

        Args:
            image_embed: scaled z_i, (B, d).
            text: B captions; the null caption where it is dropped (:func:`unclip_pl.nn.text.mix_text`).
            keep_image: (B,) bool; False puts the learned null embedding in the place of z_i.
            level: (B,) noise level of z_i in [0, 1], for a network that is told it; None is no noise.

        Raises:
            InputError: the network is unconditional.
        """
        if self.condition_encoder is None:
            raise InputError(
                "Expected a U-Net with embed_dim > 0. Got an unconditional one: build it with the width of CLIP's "
                "embeddings."
            )
        return self.condition_encoder(image_embed, text, keep_image=keep_image, level=level)

    def forward(self, x: Tensor, index: Tensor, condition: Condition | None = None) -> Tensor:
        """Return F(x_t, t).

        Args:
            x: (B, in_channels, H, W) in [-1, 1] plus noise; H and W are multiples of ``stride``.
            index: 0-based time index t·T − 1, float (B,).
            condition: result of :meth:`encode_condition`; None if and only if the network is unconditional.

        Returns:
            (B, out_channels, H, W).

        Raises:
            InputError: the sides do not fit the levels, or the condition does not fit the network.
        """
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise InputError(f"Expected sides to be multiples of {self.stride}. Got {tuple(x.shape[-2:])}: resize.")
        if (condition is None) != (self.condition_encoder is None):
            raise InputError("Expected a condition exactly when embed_dim > 0: give one, or none.")
        time = self.time_embed(sinusoidal(index, self.channels).to(x.dtype))
        if condition is not None:
            time = time + condition.time_bias
        time = F.silu(time)  # what every residual block would start with

        x = F.pixel_unshuffle(x, self.patch)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], time, condition)
        x = skips[-1]
        if condition is not None and condition.image_map.numel():
            x = x + F.interpolate(condition.image_map, size=x.shape[-2:], mode="bilinear", align_corners=False)
        for layer in self.mid:
            x = layer(x, time, condition)
        for level in self.up:
            x = level(x, time, condition, [skips.pop() for _ in range(self.skips_per_level)])
        return F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.patch)


class UpsamplerUNet(UNet):
    """The upsamplers' U-Net: convolutions only, unconditional, the low-resolution image beside x_t (§2.1).

    The defaults are the paper's 64 → 256 px upsampler. It takes images of any side, not only its training crops'.

    Args:
        channels: unit of width (paper: 320, then 192).
        channel_mult: width of every level as a multiple of ``channels``.
        res_blocks: residual blocks per level (paper: 3, then 2).
        dropout: dropout rate in every residual block.
        groups: GroupNorm groups.
        time_mode: how the time enters a residual block.
        resample_with_blocks: change the resolution inside residual blocks; false takes one convolution.
        patch: side of the squares of pixels that become the channels of one position, and pixels again at the end.
    """

    def __init__(
        self,
        channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        res_blocks: int = 3,
        dropout: float = 0.1,
        groups: int = 32,
        time_mode: TimeMode = "scale_shift",
        resample_with_blocks: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__(
            in_channels=6,
            out_channels=3,
            channels=channels,
            channel_mult=channel_mult,
            res_blocks=res_blocks,
            attention_levels=(),
            dropout=dropout,
            groups=groups,
            time_mode=time_mode,
            resample_with_blocks=resample_with_blocks,
            patch=patch,
        )
