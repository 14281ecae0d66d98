"""Reads a shapes picture back into its attributes: analysis by synthesis, nothing trained.

For a mask m in [0, 1] the best foreground and background colours have a closed form, and with them the squared error.
With m̃ = m − mean(m) and x̃ = x − mean(x), per channel c,

    SSE(m) = Σ_c |x̃_c|² − Σ_c ⟨x̃_c, m̃⟩² / |m̃|²

so one product with a bank of unit-norm masks ranks every (shape, size, position) cell. The jitter of the best few cells
is then fitted by Gauss-Newton within the renderer's range, with the colours projected out (Golub & Pereyra, 1973).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
_STEPS = 4  # of Gauss-Newton
_PROBE = 0.1  # of a jitter's range, for finite differences
_DAMPING = 0.1  # against a circle's rotation, which has no slope; a pixel's shift has 10 to 40
_NOISE = 0.01  # pixel error below which two readings are no longer told apart


class Reading(NamedTuple):
    """What the oracle saw in B pictures."""

    indices: Tensor
    """(B, 5) long: into `VALUES`, in the order of `ATTRIBUTES`."""
    confidence: Tensor
    """(B,) in [0, 1]: share of the runner-up's squared error that the best reading explains, where the runner-up is
    the best fit with another (shape, size, position). 0: as good as each other, as on a uniform picture."""
    residual: Tensor
    """(B,) RMS over pixels and channels, [0, 1] units, to the nearest picture that the renderer can draw."""


class ShapesOracle(nn.Module):
    """Exact on rendered pictures; on drawn ones the nearest reading, never NaN.

    Args:
        size: side of the pictures in pixels.
    """

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size
        side = min(size, _BANK_SIZE)
        self.cells = torch.cartesian_prod(*(torch.arange(len(names)) for names in (SHAPES, SIZES, POSITIONS)))
        thirds, halves = torch.tensor([-2 / 3, 0, 2 / 3]), torch.tensor([-0.5, 0.5])
        starts = torch.cartesian_prod(thirds, thirds, halves, halves)
        masks = coverage(self.cells.repeat_interleave(len(starts), 0), starts.repeat(len(self.cells), 1), side)
        bank = F.normalize(_centred(masks.flatten(1)), dim=1)
        self.register_buffer("starts", starts, persistent=False)  # (S, 4)
        self.register_buffer("bank", bank, persistent=False)  # (cells · S, side²), S starts of a cell in a row
        self.register_buffer("colors", torch.tensor(list(COLORS.values())), persistent=False)
        self.register_buffer("backgrounds", torch.tensor(list(BACKGROUNDS.values())), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Reading:
        """Read pictures.

        Args:
            images: (B, 3, size, size) in [-1, 1]. Values outside are clipped; NaN counts as mid-gray.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"Expected images of shape (B, 3, {self.size}, {self.size}). Got {tuple(images.shape)}.")
        pixels = (images.float().nan_to_num(0).clamp(-1, 1) + 1) / 2
        chunk = max(1, 2**16 // self.size**2)
        readings = [self._read(part) for part in pixels.split(chunk)]
        return Reading(*(torch.cat(parts) for parts in zip(*readings, strict=True)))

    def _read(self, pixels: Tensor) -> Reading:
        cells, jitter = self._rank(pixels)
        x = pixels.flatten(2)
        jitter, error = self._fit(_centred(x), cells, jitter)

        error, order = error.topk(2, largest=False)  # (B, 2)
        floor = x[0].numel() * _NOISE**2 if len(x) else 1.0
        confidence = 1 - (error[:, 0] + floor) / (error[:, 1] + floor)
        rows = torch.arange(len(x), device=x.device)
        cell, jitter = cells[rows, order[:, 0]], jitter[rows, order[:, 0]]

        mask = coverage(cell.cpu(), jitter, self.size).flatten(1)
        slope = _slopes(_centred(x), _centred(mask)[:, None]).squeeze(1)  # (B, 3): foreground − background
        ground = x.mean(-1) - slope * mask.mean(-1, keepdim=True)
        color, foreground = _nearest(ground + slope, self.colors)
        background, ground = _nearest(ground, self.backgrounds)
        drawn = torch.lerp(ground[..., None], foreground[..., None], mask[:, None])
        residual = (x - drawn).square().mean((1, 2)).sqrt()
        indices = torch.stack((cell[:, 0], color, cell[:, 1], cell[:, 2], background), dim=1)
        return Reading(indices, confidence, residual)

    def _rank(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The best cells of the bank, (B, K, 3), and where in their jitter to start, (B, K, 4)."""
        if self.size > _BANK_SIZE:
            pixels = F.interpolate(pixels, size=_BANK_SIZE, mode="area")
        explained = (_centred(pixels.flatten(2)) @ self.bank.T).square().sum(1)  # (B, cells · S)
        best, start = explained.unflatten(1, (len(self.cells), -1)).max(-1)
        top = best.topk(_CANDIDATES).indices
        return self.cells.to(top.device)[top], self.starts[start.gather(1, top)]

    def _fit(self, x: Tensor, cells: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the jitter (B, K, 4) of K cells to centred pictures x (B, 3, P). Returns it with its error (B, K)."""
        total = x.square().sum((1, 2))[:, None]
        best, error = jitter, total.expand(jitter.shape[:2])
        probes = torch.cat((torch.zeros(1, 4), _PROBE * torch.eye(4))).to(jitter)  # (5, 4)
        copies = cells.cpu().reshape(-1, 3).repeat_interleave(len(probes), 0)
        for _ in range(_STEPS):
            masks = coverage(copies, (jitter[:, :, None] + probes).reshape(-1, 4), self.size)
            masks = _centred(masks.reshape(*jitter.shape[:2], len(probes), -1))  # (B, K, 5, P)
            mask, change = masks[:, :, 0], (masks[:, :, 1:] - masks[:, :, :1]) / _PROBE
            slope = _slopes(x, mask)  # (B, K, 3)
            energy = mask.square().sum(-1)
            current = (total - slope.square().sum(-1) * energy).clamp(min=0)
            best = torch.where((current < error)[..., None], jitter, best)
            error = torch.minimum(current, error)

            # The least-squares mask under these colours is the channels' mean, weighted by their contrast.
            weight = slope / slope.square().sum(-1, keepdim=True).clamp(min=1e-12)
            missing = weight @ x - mask  # (B, K, P)
            overlap = torch.einsum("bkjp,bkp->bkj", change, mask) / energy[..., None]
            change = change - overlap[..., None] * mask[:, :, None]
            normal = change @ change.mT + _DAMPING * torch.eye(4, device=x.device)
            step = torch.linalg.solve_ex(normal, change @ missing[..., None]).result.squeeze(-1)
            jitter = (jitter + step).clamp(-1, 1)
        return best, error


def attributes(reading: Reading) -> list[Attributes]:
    """The names of what was read."""
    names = [VALUES[name] for name in ATTRIBUTES]
    return [Attributes(*(n[i] for n, i in zip(names, row, strict=True))) for row in reading.indices.tolist()]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _slopes(x: Tensor, masks: Tensor) -> Tensor:
    """Least-squares change of colour (B, K, 3) from centred pictures (B, 3, P) and centred masks (B, K, P)."""
    return masks @ x.mT / masks.square().sum(-1, keepdim=True)


def _nearest(fitted: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest palette colour (B,), and the nearest colour to `fitted` within its jitter (B, 3)."""
    index = torch.cdist(fitted, palette).argmin(-1)
    centre = palette[index]
    return index, centre + (fitted - centre).clamp(-COLOR_JITTER, COLOR_JITTER)
