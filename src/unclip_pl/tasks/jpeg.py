"""The losses of JPEG on the picture's own device: they lie in the quantisation, which needs no file."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

#: ITU-T T.81, tables K.1 and K.2: quantisation steps of luminance and chrominance at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
#: JFIF: red, green, blue to Y, Cb, Cr, and back.
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))

Table = tuple[tuple[float, ...], ...]

#: Orthonormal DCT-II of 8 values; rows are frequencies.
DCT: Table = tuple(
    tuple(math.cos(math.pi / 8 * (x + 0.5) * k) * (math.sqrt(1 / 8) if k == 0 else 0.5) for x in range(8))
    for k in range(8)
)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Return images (B, 3, h, w) in [0, 1] as a JPEG file of 4:2:0 chroma (libjpeg's default) would give them back.

    Args:
        image: images of any size; they are rounded to 8 bits first, as for a file.
        quality: libjpeg's quality, 1 to 100.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image.float(), (0, -width % 16, 0, -height % 16), mode="replicate")
    levels = (padded * 255).round()
    ycbcr = torch.einsum("ij,bjhw->bihw", _tensor(TO_YCBCR, image.device), levels).round()  # Cb and Cr about 0
    luma = _quantised(ycbcr[:, :1] - 128, LUMINANCE, quality) + 128
    chroma = _quantised(F.avg_pool2d(ycbcr[:, 1:], 2).round(), CHROMINANCE, quality)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)  # libjpeg's "fancy" way up
    rgb = torch.einsum("ij,bjhw->bihw", _tensor(TO_RGB, image.device), torch.cat([luma, chroma], dim=1))
    return (rgb.round().clamp(0, 255) / 255)[..., :height, :width].to(image.dtype)


@cache
def _tensor(table: Table, device: torch.device) -> Tensor:
    """Return a table on a device, sent once: each copy from the host would make the host wait."""
    return torch.tensor(table, device=device)


def _quantised(plane: Tensor, table: Table, quality: int) -> Tensor:
    """Round the cosine transform of each 8 × 8 block of planes (B, C, h, w) about 0 to the table's steps."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    step = ((_tensor(table, plane.device) * scale + 50) / 100).floor().clamp(1, 255)
    dct = _tensor(DCT, plane.device)
    blocks = plane.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)  # (B, C, h/8, w/8, 8, 8)
    blocks = dct.T @ ((dct @ blocks @ dct.T / step).round() * step) @ dct
    return blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2).round().clamp(-128, 127)
