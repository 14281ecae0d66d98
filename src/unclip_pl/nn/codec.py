"""The codec between CLIP embeddings and the AR prior's tokens: PCA, then one scalar quantiser per axis (§2.2)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.files import write_tensors
from unclip_pl.nn.space import FileBuffers, Moments

#: Function that is called once per pass over the training set and yields raw (image_embed (B, d), text_embed (B, d)).
Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
Spacing = Literal["uniform", "quantile"]

#: Every tenth embedding is held out of the PCA, to choose how many axes to keep.
HOLD_OUT = 10
#: Rows from which bucket edges are read: 256 per bucket at the paper's 1,024.
EDGE_SAMPLE = 2**18


class Axes(NamedTuple):
    """Centred PCA of unit-norm embeddings, by decreasing eigenvalue."""

    mean: Tensor  # (d,)
    components: Tensor  # (n, d) orthonormal rows
    std: Tensor  # (n,) of the coordinates along them

    def project(self, embed: Tensor) -> Tensor:
        """Return the coordinates (B, n) of raw embeddings (B, d)."""
        return (F.normalize(embed.to(self.mean), dim=-1) - self.mean) @ self.components.T


class Buckets(NamedTuple):
    """Quantisers of n axes."""

    edges: Tensor  # (n, buckets − 1) inner edges, ascending
    low: Tensor  # (n,) outer edges, where an end bucket without data is taken to end
    high: Tensor  # (n,)

    def midpoints(self) -> Tensor:
        """Return the middle of every bucket, (n, buckets)."""
        edges = torch.cat([self.low[:, None], self.edges, self.high[:, None]], dim=1)
        return (edges[:, 1:] + edges[:, :-1]) / 2


class EmbeddingCodec(FileBuffers):
    """Code of z_i as n numbers, and back. It works on unit-norm embeddings: norms in are ignored, norms out are 1.

    z_i is centred and projected on its first n principal axes. Each coordinate falls into one of ``buckets`` and is
    decoded as the mean of the training data there. Everything is a buffer, so it travels in the checkpoint.

    Args:
        path: file made by :meth:`save`; empty when a checkpoint is about to fill the buffers.

    Raises:
        MissingFileError: no codec there.
    """

    mean: Tensor  # (d,)
    components: Tensor  # (n, d)
    std: Tensor  # (n,)
    edges: Tensor  # (n, buckets − 1)
    levels: Tensor  # (n, buckets) what a code decodes to
    dot_edges: Tensor  # (1, dot_buckets − 1)
    fingerprint_bytes: Tensor  # uint8

    def __init__(self, path: str = "") -> None:
        super().__init__(EmbeddingCodec.__annotations__, path, what="codec", command="unclip codec")

    @classmethod
    def fit(
        cls,
        chunks: Chunks,
        *,
        fingerprint: str = "",
        code_length: int | None = None,
        buckets: int = 1024,
        dot_buckets: int = 256,
        spacing: Spacing = "quantile",
    ) -> Self:
        """Fit a codec in three passes over the data, with memory for one chunk and 2^18 projected rows.

        Args:
            chunks: function that yields the training set's raw (image_embed, text_embed) at every call.
            fingerprint: fingerprint of the CLIP that made them.
            code_length: n, the number of axes. None is the paper's rule: the fewest that lose less than 1 % of the
                variance of held-out embeddings.
            buckets: number of buckets per axis.
            dot_buckets: number of buckets of z_i·z_t, always with equal counts; 1 never looks at it.
            spacing: edges of the axes' buckets: ``quantile`` (equal counts) or ``uniform`` (equal widths).

        Raises:
            InputError: fewer than 20 embeddings, more axes asked for than there are dimensions, or two widths, which
                have no dot product.
        """
        count, axes = _principal_axes(chunks, code_length)
        y, dots = _sample(chunks, axes, stride=-(-count // EDGE_SAMPLE), with_dots=dot_buckets > 1)
        quantisers = _buckets(y, buckets, spacing)
        codec = cls()
        codec.mean, codec.components, codec.std = (x.float() for x in axes)
        codec.edges = quantisers.edges.float()
        codec.levels = _conditional_means(chunks, axes, quantisers).float()
        codec.dot_edges = _buckets(dots, dot_buckets, "quantile").edges.float()
        codec.fingerprint_bytes = torch.tensor(list(fingerprint.encode()), dtype=torch.uint8)
        return codec

    def save(self, path: str | Path) -> None:
        """Write the codec as safetensors, whole or not at all."""
        write_tensors(Path(path), self.state_dict(), {"fingerprint": self.fingerprint})

    @property
    def embed_dim(self) -> int:
        """d, the width of the embeddings."""
        return self.mean.shape[0]

    @property
    def code_length(self) -> int:
        """n, the number of codes per embedding."""
        return self.levels.shape[0]

    @property
    def buckets(self) -> int:
        """Number of values of a code."""
        return self.levels.shape[1]

    @property
    def dot_buckets(self) -> int:
        """Number of values of the dot-product token."""
        return self.dot_edges.shape[1] + 1

    @property
    def value_table(self) -> Tensor:
        """Coordinates that each code decodes to, (n, buckets), each axis at unit variance."""
        return self.levels / self.std.clamp(min=1e-6)[:, None]

    def encode(self, embed: Tensor) -> Tensor:
        """Turn raw embeddings (B, d) into codes (B, n) int64."""
        return _codes(self.edges, self._project(embed))

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes (B, n) into embeddings (B, d) of unit norm."""
        return self._embed(self._levels_at(codes))

    def coordinates(self, embed: Tensor) -> Tensor:
        """Return the coordinates (B, n) of raw embeddings (B, d), each axis at unit variance: no bucket, no loss."""
        return self._project(embed) / self.std.clamp(min=1e-6)

    def place(self, coordinates: Tensor) -> Tensor:
        """Turn coordinates (B, n) at unit variance into embeddings (B, d) of unit norm."""
        return self._embed(coordinates * self.std)

    def log_density(self, embed: Tensor) -> Tensor:
        """Return log p(y | its bucket), (B, n), of the coordinates y at unit variance: codes' nats plus these are y's.

        A coordinate is uniform inside its bucket. Beyond the last edge it falls off exponentially, by the mean distance
        that the codec knows there.

        Args:
            embed: (B, d) raw embeddings.
        """
        std = self.std.clamp(min=1e-6)
        y, edges, levels = (x / std[:, None] for x in (self._project(embed).T, self.edges, self.levels))  # (n, …)
        width = edges.diff(dim=1).clamp(min=1e-6)
        below, above = (
            (edges[:, end] - levels[:, end]).abs()[:, None].clamp(min=1e-6) for end in (0, -1)
        )  # mean distance from the edge
        code = torch.searchsorted(edges, y.contiguous())
        inside = -F.pad(width, (1, 1), value=1.0).log().gather(1, code)
        low, high = -below.log() - (edges[:, :1] - y) / below, -above.log() - (y - edges[:, -1:]) / above
        return torch.where(code == 0, low, torch.where(code == edges.shape[1], high, inside)).T

    def values(self, codes: Tensor) -> Tensor:
        """Return the coordinates (B, n) of codes (B, n), each axis at unit variance: a network's input beside them."""
        return self._levels_at(codes) / self.std.clamp(min=1e-6)

    def encode_dot(self, cosine: Tensor) -> Tensor:
        """Turn z_i·z_t of unit-norm embeddings, (B,), into tokens (B,) int64."""
        return torch.searchsorted(self.dot_edges[0], cosine.float().contiguous())

    def pca_error(self, embed: Tensor) -> Tensor:
        """Return the share of the variance of embeddings (B, d) about the training mean that lies off the n axes.

        With :meth:`quantisation_error` it adds up to the codec's whole squared error (before normalisation).
        """
        return 1 - self._project(embed).square().sum() / self._variance(embed)

    def quantisation_error(self, embed: Tensor) -> Tensor:
        """Return the squared error of the buckets on embeddings (B, d), as a share of the same variance."""
        y = self._project(embed)
        return (y - self._levels_at(self.encode(embed))).square().sum() / self._variance(embed)

    def roundtrip_cosine(self, embed: Tensor) -> Tensor:
        """Return the cosine (B,) between embeddings (B, d) and their round trip."""
        return F.cosine_similarity(embed.float(), self.decode(self.encode(embed)), dim=-1)

    def _project(self, embed: Tensor) -> Tensor:
        with _full_precision(embed):
            return Axes(self.mean, self.components, self.std).project(embed)

    def _embed(self, y: Tensor) -> Tensor:
        with _full_precision(y):
            return F.normalize(y @ self.components + self.mean, dim=-1)

    def _levels_at(self, codes: Tensor) -> Tensor:
        return self.levels.T.gather(0, codes)

    def _variance(self, embed: Tensor) -> Tensor:
        return (F.normalize(embed.float(), dim=-1) - self.mean).square().sum()


def require_dot(image_width: int, text_width: int) -> None:
    """Raise InputError where the widths of z_i and z_t differ, so that they have no dot product."""
    if image_width != text_width:
        raise InputError(
            f"Expected z_i and z_t of one width for the dot-product token. Got {image_width} and {text_width}: set "
            "dot_buckets to 1 for codec and network, which leaves the token out."
        )


def _codes(edges: Tensor, y: Tensor) -> Tensor:
    """Turn coordinates (B, n) into codes; bucket i holds edge i−1 < y ≤ edge i, the end buckets all beyond."""
    return torch.searchsorted(edges, y.T.contiguous()).T


def _full_precision(x: Tensor) -> torch.autocast:
    """Turn autocast off: bfloat16 has 3 digits, too few to tell 1,024 buckets apart."""
    return torch.autocast(x.device.type, enabled=False)


def _principal_axes(chunks: Chunks, code_length: int | None) -> tuple[int, Axes]:
    """Run the first pass: count the embeddings and find the axes to keep."""
    train, held_out, count = None, None, 0
    for embed, _ in chunks():
        out = (torch.arange(len(embed)) + count) % HOLD_OUT == HOLD_OUT - 1
        count += len(embed)
        a, b = Moments.of(embed[~out]), Moments.of(embed[out])
        train, held_out = (train.plus(a), held_out.plus(b)) if train and held_out else (a, b)
    if train is None or held_out is None or count < 2 * HOLD_OUT:
        raise InputError(f"Expected at least {2 * HOLD_OUT} embeddings to fit a codec. Got {count}: give more data.")
    mean, covariance = _about(train, train.unit_sum / train.total)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues, components = eigenvalues.flip(0), vectors.flip(-1).T
    if code_length is None:
        seen = torch.einsum("nd,de,ne->n", components, _about(held_out, mean)[1], components)
        lost = 1 - seen.cumsum(0) / seen.sum()
        code_length = int((lost >= 0.01).sum()) + 1  # decreasing: the first axis count below 1 %
    if not 0 < code_length <= len(mean):
        raise InputError(f"Expected a code_length from 1 to embed_dim = {len(mean)}. Got {code_length}: change it.")
    return count, Axes(mean, components[:code_length], eigenvalues[:code_length].clamp(min=0).sqrt())


def _about(moments: Moments, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre, and the second moment (d, d) about it."""
    cross = torch.outer(moments.unit_sum / moments.total, centre)
    return centre, moments.unit_outer / moments.total - cross - cross.T + torch.outer(centre, centre)


def _sample(chunks: Chunks, axes: Axes, stride: int, *, with_dots: bool) -> tuple[Tensor, Tensor]:
    """Run the second pass: coordinates (S, n) and dot products (S, 1), or zeros, of every ``stride``-th row."""
    rows, dots, count = [], [], 0
    for embed, text in chunks():
        chosen = (torch.arange(len(embed)) + count) % stride == 0
        count += len(embed)
        rows.append(axes.project(embed[chosen]))
        if with_dots:
            require_dot(embed.shape[1], text.shape[1])
            dots.append(F.cosine_similarity(embed[chosen].double(), text[chosen].double(), dim=-1)[:, None])
    y = torch.cat(rows)
    return y, torch.cat(dots) if with_dots else y.new_zeros(len(y), 1)


def _buckets(y: Tensor, buckets: int, spacing: Spacing) -> Buckets:
    """Return quantisers for samples (S, n)."""
    ordered = y.sort(dim=0).values
    low, high = ordered[0], ordered[-1]
    inner = torch.arange(1, buckets, dtype=y.dtype) / buckets
    if spacing == "uniform":
        return Buckets(low[:, None] + (high - low)[:, None] * inner, low, high)
    rank = (inner * len(y)).round().long().clamp(1, len(y) - 1)
    return Buckets(((ordered[rank - 1] + ordered[rank]) / 2).T.contiguous(), low, high)


def _conditional_means(chunks: Chunks, axes: Axes, quantisers: Buckets) -> Tensor:
    """Run the third pass: the mean (n, buckets) of the data in each bucket; its midpoint where there are none."""
    midpoints = quantisers.midpoints()
    offset = torch.arange(len(midpoints)) * midpoints.shape[1]
    total = torch.zeros(midpoints.numel(), dtype=torch.float64)
    count = torch.zeros(midpoints.numel(), dtype=torch.int64)
    for embed, _ in chunks():
        y = axes.project(embed)
        index = (_codes(quantisers.edges, y) + offset).flatten()
        total += torch.bincount(index, weights=y.flatten(), minlength=midpoints.numel())
        count += torch.bincount(index, minlength=midpoints.numel())
    means = total / count.clamp(min=1)
    return torch.where(count > 0, means, midpoints.flatten()).view_as(midpoints)
