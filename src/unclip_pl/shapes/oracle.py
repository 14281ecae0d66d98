"""An oracle that reads a shapes picture back into its attributes: analysis by synthesis, without training.

For a mask m in [0, 1] the best foreground and background colours have a closed form, and with them the squared error.
With m̃ = m − mean(m) and x̃ = x − mean(x), per channel c,

    SSE(m) = Σ_c |x̃_c|² − Σ_c ⟨x̃_c, m̃⟩² / |m̃|²

so one product with a bank of unit-norm masks ranks every (shape, size, position) cell. The jitter of the best few cells
is then fitted by Gauss-Newton within the renderer's range, with the colours projected out (Golub & Pereyra, 1973). The
reading is the one of them that comes closest when painted in colours the renderer has: free colours alone would let a
blurred shape pass for a larger, paler one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.errors import InputError
from unclip_pl.shapes.render import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOR_JITTER,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    VALUES,
    Attributes,
    coverage,
)

_BANK_SIZE = 32  # pixels; larger pictures are ranked at this size and fitted at their own
_CANDIDATES = 4  # cells whose jitter is fitted
_STEPS = 2  # of Gauss-Newton, twice
_PROBE = 0.1  # of a jitter's range, for finite differences
_DAMPING = 0.1  # against a circle's rotation, which has no slope; a pixel's shift has 10 to 40
_NOISE = 0.01  # pixel error below which two readings are no longer told apart


class Reading(NamedTuple):
    """Attributes that the oracle read from B pictures."""

    indices: Tensor
    """(B, 5) long: into `VALUES`, in the order of `ATTRIBUTES`."""
    confidence: Tensor
    """(B,) in [0, 1]: share of the runner-up's squared error that the best reading explains. The runner-up is the best
    fit with another (shape, size, position), or no shape at all. 0: no better than that, as on a uniform picture."""
    residual: Tensor
    """(B,) RMS over pixels and channels, [0, 1] units, to the nearest picture that the renderer can draw."""


class ShapesOracle(nn.Module):
    """Reader of pictures: exact on rendered ones, and on drawn ones the nearest reading, never NaN.

    Args:
        size: side of the pictures in pixels.
    """

    starts: Tensor  # (S, 4) of a cell's jitter
    bank: Tensor  # (cells · S, side²) unit masks, the starts of a cell in a row
    colors: Tensor
    backgrounds: Tensor

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size
        side = min(size, _BANK_SIZE)
        self.cells = torch.cartesian_prod(*(torch.arange(len(names)) for names in (SHAPES, SIZES, POSITIONS)))
        thirds, halves = torch.tensor([-2 / 3, 0, 2 / 3]), torch.tensor([-0.5, 0.5])
        starts = torch.cartesian_prod(thirds, thirds, halves, halves)
        masks = coverage(self.cells.repeat_interleave(len(starts), 0), starts.repeat(len(self.cells), 1), side)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("bank", F.normalize(_centred(masks.flatten(1)), dim=1), persistent=False)
        self.register_buffer("colors", torch.tensor(list(COLORS.values())), persistent=False)
        self.register_buffer("backgrounds", torch.tensor(list(BACKGROUNDS.values())), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Reading:
        """Read pictures.

        Args:
            images: (B, 3, size, size) in [-1, 1]; values outside are clipped. A picture with values that are not
                finite gets confidence 0 and residual 1.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise InputError(
                f"Expected images of shape (B, 3, {self.size}, {self.size}). Got {tuple(images.shape)}: resize them."
            )
        pixels = (images.float().nan_to_num(0).clamp(-1, 1) + 1) / 2
        chunk = max(1, 2**15 // self.size**2)  # stays in cache
        readings = [self._read(part) for part in pixels.split(chunk)]
        indices, confidence, residual = (torch.cat(parts) for parts in zip(*readings, strict=True))
        broken = ~images.isfinite().all(dim=(1, 2, 3))
        return Reading(indices, confidence.masked_fill(broken, 0), residual.masked_fill(broken, 1))

    def _read(self, pixels: Tensor) -> Reading:
        small = F.interpolate(pixels, size=_BANK_SIZE, mode="area") if self.size > _BANK_SIZE else pixels
        cells, jitter = self._rank(small)
        jitter = self._fit(small, cells, jitter)
        jitter = self._fit(pixels, cells, jitter)
        error, color, background = self._paint(pixels, cells, jitter)

        (first, second), (best, _) = (part.unbind(1) for part in error.topk(2, largest=False))
        values = 3 * self.size**2
        floor = values * _NOISE**2
        shapeless = _centred(pixels.flatten(2)).square().sum((1, 2))  # a flat picture of any colour
        confidence = (1 - (first + floor) / (torch.minimum(second, shapeless) + floor)).clamp(min=0)
        cells = cells.to(best.device)
        shape, size, position, color, background = (
            choices.gather(1, best[:, None]).squeeze(1) for choices in (*cells.unbind(2), color, background)
        )
        indices = torch.stack((shape, color, size, position, background), dim=1)
        return Reading(indices, confidence, (first / values).sqrt())

    def _rank(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best K cells of the bank, (B, K, 3) on the CPU, and a start in their jitter, (B, K, 4)."""
        channels = _centred(
            pixels.reshape(-1, self.bank.shape[1])
        )  # (B · 3, side²): one plain product, 14× a batched one
        explained = (channels @ self.bank.T).square().unflatten(0, (-1, 3)).sum(1)  # (B, cells · S)
        best, start = explained.unflatten(1, (len(self.cells), -1)).max(-1)
        top = best.topk(_CANDIDATES).indices
        return self.cells[top.cpu()], self.starts[start.gather(1, top)]

    def _fit(self, pixels: Tensor, cells: Tensor, jitter: Tensor) -> Tensor:
        """Fit the jitter (B, K, 4) of K cells to pictures in free colours."""
        x = _centred(pixels.flatten(2))
        probes = torch.cat((torch.zeros(1, 4), _PROBE * torch.eye(4))).to(jitter)  # (5, 4)
        copies = cells.reshape(-1, 3).repeat_interleave(len(probes), 0)
        for _ in range(_STEPS):
            masks = coverage(copies, (jitter[:, :, None] + probes).reshape(-1, 4), pixels.shape[-1])
            masks = _centred(masks.flatten(1).unflatten(0, (*jitter.shape[:2], len(probes))))  # (B, K, 5, P)
            mask, change = masks[:, :, 0], (masks[:, :, 1:] - masks[:, :, :1]) / _PROBE
            slope, energy = _slopes(x, mask), mask.square().sum(-1)  # (B, K, 3), (B, K)
            # The least-squares mask under these colours is the channels' mean, weighted by their contrast.
            weight = slope / slope.square().sum(-1, keepdim=True).clamp(min=1e-12)
            missing = weight @ x - mask  # (B, K, P)
            overlap = torch.einsum("bkjp,bkp->bkj", change, mask) / energy[..., None]
            change = change - overlap[..., None] * mask[:, :, None]
            normal = change @ change.mT + _DAMPING * torch.eye(4, device=x.device)
            update = torch.linalg.solve_ex(normal, change @ missing[..., None]).result.squeeze(-1)
            jitter = (jitter + update).clamp(-1, 1)
        return jitter

    def _paint(self, pixels: Tensor, cells: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the squared error (B, K) of fitted cells in the palettes' best colours, and the colours' indices."""
        x = pixels.flatten(2)
        masks = (
            coverage(cells.reshape(-1, 3), jitter.reshape(-1, 4), self.size).flatten(1).unflatten(0, cells.shape[:2])
        )
        slope = _slopes(_centred(x), _centred(masks))
        ground = x.mean(-1)[:, None] - slope * masks.mean(-1, keepdim=True)  # (B, K, 3)
        free = x[:, None] - ground[..., None] - slope[..., None] * masks[:, :, None]
        front, back = _within(ground + slope, self.colors), _within(ground, self.backgrounds)  # (B, K, colours, 3)
        # |x − b − (f − b) m|² around the free fit is a quadratic in u = Δb and v = Δ(f − b) alone.
        u = (back - ground[:, :, None])[:, :, None]  # (B, K, 1, backgrounds, 3)
        v = front[:, :, :, None] - back[:, :, None] - slope[:, :, None, None]  # (B, K, colours, backgrounds, 3)
        total, energy = masks.sum(-1)[..., None, None, None], masks.square().sum(-1)[..., None, None, None]
        error = (x.shape[-1] * u * u + 2 * total * u * v + energy * v * v).sum(-1)
        error, pair = error.flatten(2).min(-1)
        return error + free.square().sum((2, 3)), pair // len(self.backgrounds), pair % len(self.backgrounds)


def attributes(reading: Reading) -> list[Attributes]:
    """Return the names of the attributes that were read."""
    names = [VALUES[name] for name in ATTRIBUTES]
    return [Attributes(*(n[i] for n, i in zip(names, row, strict=True))) for row in reading.indices.tolist()]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _slopes(x: Tensor, masks: Tensor) -> Tensor:
    """Fit changes of colour (B, K, 3) by least squares, of centred pictures (B, 3, P) to centred masks (B, K, P)."""
    return masks @ x.mT / masks.square().sum(-1, keepdim=True)


def _within(fitted: Tensor, palette: Tensor) -> Tensor:
    """Return for every palette colour the nearest one to `fitted` (B, K, 3) within its jitter: (B, K, colours, 3)."""
    return palette + (fitted[:, :, None] - palette).clamp(-COLOR_JITTER, COLOR_JITTER)
