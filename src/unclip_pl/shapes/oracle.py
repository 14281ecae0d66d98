"""An oracle that reads a shapes picture back into its attributes: analysis by synthesis, without training.

For a mask m in [0, 1] the best foreground and background colours have a closed form, and with them the squared error.
With m̃ = m − mean(m) and x̃ = x − mean(x), per channel c,

    SSE(m) = Σ_c |x̃_c|² − Σ_c ⟨x̃_c, m̃⟩² / |m̃|²

so one product with a bank of unit-norm masks ranks every (shape, size, position) cell. The jitter of the best few cells
is then fitted by Gauss-Newton within the renderer's range, with the colours projected out (Golub & Pereyra, 1973). The
reading is the one of them that comes closest when painted in colours the renderer has: free colours alone would let a
blurred shape pass for a larger, paler one.

Two objects of a scene lie in halves of the picture, so their errors add up: each is fitted by itself in its half, and
the reading is the best of all pairs of places, shapes and colours on one background.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.errors import InputError
from unclip_pl.shapes.captions import parse
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
    places,
)
from unclip_pl.shapes.scenes import ARRANGEMENTS, SCENE_VALUES, parse_scene
from unclip_pl.shapes.words import SIDE as WORDS_SIDE

_BANK_SIZE = 32  # pixels; larger pictures are ranked at this size and fitted at their own
_CANDIDATES = 4  # cells whose jitter is fitted
_STEPS = 2  # of Gauss-Newton, twice
_PROBE = 0.1  # of a jitter's range, for finite differences
_DAMPING = 0.1  # against a circle's rotation, which has no slope; a pixel's shift has 10 to 40
_NOISE = 0.01  # pixel error below which two readings are no longer told apart

Window = tuple[slice | Tensor, slice | Tensor]  # rows and columns


class Reading(NamedTuple):
    """Attributes that the oracle read from B pictures."""

    indices: Tensor
    """(B, A) long: into the oracle's `values`, in their order."""
    confidence: Tensor
    """(B,) in [0, 1]: share of the runner-up's squared error that the best reading explains. The runner-up is the best
    fit with another (shape, size, position), or no shape at all. 0: no better than that, as on a uniform picture."""
    residual: Tensor
    """(B,) RMS over pixels and channels, [0, 1] units, to the nearest picture that the renderer can draw."""


class Oracle(nn.Module, ABC):
    """Reader of pictures: exact on rendered ones, and on drawn ones the nearest reading, never NaN.

    Args:
        size: side of the pictures in pixels.
    """

    #: What it reads: attributes, and the values of each.
    values: Mapping[str, Sequence[str]]
    #: What a caption states of them, by name.
    parse: Callable[[str], dict[str, str]]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

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

    @abstractmethod
    def _read(self, pixels: Tensor) -> Reading:
        """Read pictures (B, 3, size, size) in [0, 1]."""

    def _trust(self, pixels: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return confidence and residual of pictures from the squared errors (B,) of two readings."""
        values = 3 * self.size**2
        floor = values * _NOISE**2
        shapeless = _centred(pixels.flatten(2)).square().sum((1, 2))  # a flat picture of any colour
        confidence = (1 - (first + floor) / (torch.minimum(second, shapeless) + floor)).clamp(min=0)
        return confidence, (first / values).sqrt()


class ShapesOracle(Oracle):
    """Reader of one shape in a picture.

    Args:
        size: side of the pictures in pixels.
    """

    values = VALUES
    parse = staticmethod(parse)

    def __init__(self, size: int = 32) -> None:
        super().__init__(size)
        cells = torch.cartesian_prod(*(torch.arange(len(names)) for names in (SHAPES, SIZES, POSITIONS)))
        self.fits = nn.ModuleList(self._fitters(cells))

    def _fitters(self, cells: Tensor) -> Iterable["_Fitter"]:
        """Yield fitters which together know all cells."""
        yield _Fitter(self.size, cells, _whole)

    def _read(self, pixels: Tensor) -> Reading:
        cells, error, free = (
            torch.cat(parts, dim=1) for parts in zip(*(fit(pixels) for fit in self.fits), strict=True)
        )
        error, pair = error.flatten(2).min(-1)
        error, color, background = error + free, pair // len(BACKGROUNDS), pair % len(BACKGROUNDS)
        (first, second), (best, _) = (part.unbind(1) for part in error.topk(2, largest=False))
        cells = cells.to(best.device)
        shape, size, position, color, background = (
            choices.gather(1, best[:, None]).squeeze(1) for choices in (*cells.unbind(2), color, background)
        )
        indices = torch.stack((shape, color, size, position, background), dim=1)
        return Reading(indices, *self._trust(pixels, first, second))


class WordsOracle(ShapesOracle):
    """Reader of one shape under a word, see :mod:`unclip_pl.shapes.words`: it leaves out the rows that a word covers.

    Args:
        size: side of the pictures in pixels.
    """

    def __init__(self, size: int = 64) -> None:
        super().__init__(size)

    def _fitters(self, cells: Tensor) -> Iterable["_Fitter"]:
        heights = places(cells)[1][:, 1]
        for height in heights.unique():  # a word stands at the height of its shape
            yield _Fitter(self.size, cells[heights == height], partial(_without_word, height=height.item()))


class SceneOracle(Oracle):
    """Reader of two small shapes in a picture, see :mod:`unclip_pl.shapes.scenes`.

    Args:
        size: side of the pictures in pixels, even and at least 32.
    """

    values = SCENE_VALUES
    parse = staticmethod(parse_scene)

    def __init__(self, size: int = 64) -> None:
        super().__init__(size)
        if size < _BANK_SIZE or size % 2:
            raise InputError(f"Expected an even size of at least {_BANK_SIZE} for scenes. Got {size}: resize them.")
        shapes, small = torch.arange(len(SHAPES)), torch.tensor([list(SIZES).index("small")])
        own = [place for pair in ARRANGEMENTS.values() for place in pair]
        self.fits = nn.ModuleList(
            _Fitter(
                size,
                torch.cartesian_prod(shapes, small, torch.tensor([list(POSITIONS).index(place)])),
                partial(_half, place=place),
            )
            for place in own
        )

    def _read(self, pixels: Tensor) -> Reading:
        cells, errors, free = zip(*(fit(pixels) for fit in self.fits), strict=True)
        error, color = torch.stack(errors, 1).unflatten(1, (-1, 2)).min(4)  # (B, arrangements, 2, K, backgrounds)
        error = error + torch.stack(free, 1).unflatten(1, (-1, 2))[..., None]
        pairs = (error[:, :, 0, :, None] + error[:, :, 1, None]) / 2  # (B, arrangements, K, K, backgrounds)
        pairs, background = pairs.min(-1)
        (first, second), (best, _) = (part.unbind(1) for part in pairs.flatten(1).topk(2, largest=False))
        background = background.flatten(1).gather(1, best[:, None]).squeeze(1)
        ranks = torch.unravel_index(best, pairs.shape[1:])  # arrangement, then the cell of either object
        shapes = torch.stack(cells, 1).unflatten(1, (-1, 2))[..., 0].to(best.device)
        row, arrangement, own = torch.arange(len(pixels), device=best.device), ranks[0], []
        for place, cell in enumerate(ranks[1:]):
            own += [shapes[row, arrangement, place, cell], color[row, arrangement, place, cell, background]]
        return Reading(torch.stack((*own, arrangement, background), dim=1), *self._trust(pixels, first, second))


class _Fit(NamedTuple):
    """The K best cells of B pictures, painted in every pair of the palettes' colours."""

    cells: Tensor  # (B, K, 3) on the CPU
    error: Tensor  # (B, K, colours, backgrounds) squared, beyond that of free colours
    free: Tensor  # (B, K) squared, in free colours


class _Fitter(nn.Module):
    """Fitter of one shape to pictures, or to a part of them.

    Args:
        size: side of the pictures in pixels.
        cells: (C, 3) long: shapes, sizes and positions that are possible.
        window: returns the rows and columns that count, for a side in pixels.
    """

    starts: Tensor  # (S, 4) of a cell's jitter
    bank: Tensor  # (cells · S, pixels) unit masks, the starts of a cell in a row
    colors: Tensor
    backgrounds: Tensor

    def __init__(self, size: int, cells: Tensor, window: Callable[[int], Window]) -> None:
        super().__init__()
        self.cells, self.window = cells, window
        side = min(size, _BANK_SIZE)
        thirds, halves = torch.tensor([-2 / 3, 0, 2 / 3]), torch.tensor([-0.5, 0.5])
        starts = torch.cartesian_prod(thirds, thirds, halves, halves)
        masks = self._masks(cells.repeat_interleave(len(starts), 0), starts.repeat(len(cells), 1), side)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("bank", F.normalize(_centred(masks), dim=1), persistent=False)
        self.register_buffer("colors", torch.tensor(list(COLORS.values())), persistent=False)
        self.register_buffer("backgrounds", torch.tensor(list(BACKGROUNDS.values())), persistent=False)

    def forward(self, pixels: Tensor) -> _Fit:
        """Fit the best cells to pictures (B, 3, H, H) in [0, 1]."""
        side = pixels.shape[-1]
        small = F.interpolate(pixels, size=_BANK_SIZE, mode="area") if side > _BANK_SIZE else pixels
        part, whole = self._part(small), self._part(pixels)
        cells, jitter = self._rank(part)
        jitter = self._fit(part, small.shape[-1], cells, jitter)
        jitter = self._fit(whole, side, cells, jitter)
        return self._paint(whole, side, cells, jitter)

    def _part(self, images: Tensor) -> Tensor:
        """Cut the window out of images (..., H, H): (..., pixels)."""
        rows, columns = self.window(images.shape[-1])
        return images[..., rows, :][..., columns].flatten(-2)

    def _masks(self, cells: Tensor, jitter: Tensor, side: int) -> Tensor:
        """Render N masks, (N, pixels)."""
        return coverage(cells, jitter, side, *self.window(side)).flatten(1)

    def _rank(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best K cells of the bank, (B, K, 3) on the CPU, and a start in their jitter, (B, K, 4)."""
        channels = _centred(pixels.flatten(0, 1))  # (B · 3, pixels): one plain product, 14× a batched one
        explained = (channels @ self.bank.T).square().unflatten(0, (-1, 3)).sum(1)  # (B, cells · S)
        best, start = explained.unflatten(1, (len(self.cells), -1)).max(-1)
        top = best.topk(_CANDIDATES).indices
        return self.cells[top.cpu()], self.starts[start.gather(1, top)]

    def _fit(self, pixels: Tensor, side: int, cells: Tensor, jitter: Tensor) -> Tensor:
        """Fit the jitter (B, K, 4) of K cells to pictures (B, 3, pixels) in free colours."""
        x = _centred(pixels)
        probes = torch.cat((torch.zeros(1, 4), _PROBE * torch.eye(4))).to(jitter)  # (5, 4)
        copies = cells.reshape(-1, 3).repeat_interleave(len(probes), 0)
        for _ in range(_STEPS):
            masks = self._masks(copies, (jitter[:, :, None] + probes).reshape(-1, 4), side)
            masks = _centred(masks.unflatten(0, (*jitter.shape[:2], len(probes))))  # (B, K, 5, P)
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

    def _paint(self, x: Tensor, side: int, cells: Tensor, jitter: Tensor) -> _Fit:
        """Compute the squared errors of fitted cells on pictures (B, 3, pixels)."""
        masks = self._masks(cells.reshape(-1, 3), jitter.reshape(-1, 4), side).unflatten(0, cells.shape[:2])
        slope = _slopes(_centred(x), _centred(masks))
        ground = x.mean(-1)[:, None] - slope * masks.mean(-1, keepdim=True)  # (B, K, 3)
        free = x[:, None] - ground[..., None] - slope[..., None] * masks[:, :, None]
        front, back = _within(ground + slope, self.colors), _within(ground, self.backgrounds)  # (B, K, colours, 3)
        # |x − b − (f − b) m|² around the free fit is a quadratic in u = Δb and v = Δ(f − b) alone.
        u = (back - ground[:, :, None])[:, :, None]  # (B, K, 1, backgrounds, 3)
        v = front[:, :, :, None] - back[:, :, None] - slope[:, :, None, None]  # (B, K, colours, backgrounds, 3)
        total, energy = masks.sum(-1)[..., None, None, None], masks.square().sum(-1)[..., None, None, None]
        error = (x.shape[-1] * u * u + 2 * total * u * v + energy * v * v).sum(-1)
        share = x.shape[-1] / side**2  # of the pixels: errors of windows of other sizes are compared
        return _Fit(cells, error / share, free.square().sum((2, 3)) / share)


def attributes(reading: Reading) -> list[Attributes]:
    """Return the names of the attributes that were read."""
    names = [VALUES[name] for name in ATTRIBUTES]
    return [Attributes(*(n[i] for n, i in zip(names, row, strict=True))) for row in reading.indices.tolist()]


def _whole(side: int) -> Window:
    return slice(side), slice(side)


def _half(side: int, place: str) -> Window:
    """Return the half of a picture at a place such as left."""
    x, y = POSITIONS[place]
    rows, columns = (slice(max(0, toward) * side // 2, (side + min(0, toward) * side // 2)) for toward in (y, x))
    return rows, columns


def _without_word(side: int, height: float) -> Window:
    """Return the rows that no word covers which stands at a height, in image sides."""
    rows = (torch.arange(side) + 0.5) / side - height
    return (rows.abs() > 5.5 / WORDS_SIDE + 0.5 / side).nonzero().squeeze(1), slice(side)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _slopes(x: Tensor, masks: Tensor) -> Tensor:
    """Fit changes of colour (B, K, 3) by least squares, of centred pictures (B, 3, P) to centred masks (B, K, P)."""
    return masks @ x.mT / masks.square().sum(-1, keepdim=True)


def _within(fitted: Tensor, palette: Tensor) -> Tensor:
    """Return for every palette colour the nearest one to `fitted` (B, K, 3) within its jitter: (B, K, colours, 3)."""
    return palette + (fitted[:, :, None] - palette).clamp(-COLOR_JITTER, COLOR_JITTER)
