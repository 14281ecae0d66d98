"""The embedding space of a model: how raw CLIP embeddings are scaled, and the features of the empty caption.

Embeddings are stored raw and scaled here. Statistics, null text and the CLIP's fingerprint are buffers, so they travel
in the checkpoint, and embeddings of another CLIP are noticed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.files import read_tensors, write_tensors
from unclip_pl.types import TextFeatures

Scaling = Literal["unit", "standardize", "whiten", "raw"]

#: RMS of an ImageNet pixel in [-1, 1]: 17.2 / sqrt(1024), the paper's factor at CLIP's own width (App. C).
PIXEL_RMS = 0.5375


class Moments(NamedTuple):
    """Streaming first and second moments of raw and of unit-norm embeddings, float64."""

    total: Tensor  # () number of embeddings
    raw_sum: Tensor  # (d,)
    raw_square: Tensor  # (d,) sum of squares
    unit_sum: Tensor  # (d,)
    unit_outer: Tensor  # (d, d) sum of outer products

    @classmethod
    def of(cls, embed: Tensor) -> Self:
        """Return the moments of raw embeddings (N, d)."""
        raw = embed.double()
        unit = F.normalize(raw, dim=-1)
        count = torch.tensor(float(len(raw)), dtype=torch.float64)
        return cls(count, raw.sum(0), raw.square().sum(0), unit.sum(0), unit.T @ unit)

    def plus(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


def write_statistics(path: Path, *, moments: Moments, null_text: TextFeatures, fingerprint: str) -> None:
    """Write mean, std and principal axes of a training set's embeddings, and CLIP's features of the empty caption.

    Args:
        path: safetensors file to write.
        moments: moments of the training split's embeddings.
        null_text: CLIP's features of ``""``, batch size 1.
        fingerprint: fingerprint of the CLIP that made both.
    """
    n = moments.total
    raw_mean = moments.raw_sum / n
    mean = moments.unit_sum / n
    covariance = (moments.unit_outer - n * torch.outer(mean, mean)) / (n - 1).clamp(min=1)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    tensors = {
        "raw_mean": raw_mean,
        "raw_std": ((moments.raw_square / n - raw_mean.square()).clamp(min=0) * n / (n - 1).clamp(min=1)).sqrt(),
        "mean": mean,
        "components": vectors.flip(-1).T,
        "eigenvalues": eigenvalues.flip(0).clamp(min=0),
    }
    _write(path, tensors, null_text, fingerprint)


def write_raw_statistics(path: Path, *, mean: Tensor, std: Tensor, null_text: TextFeatures, fingerprint: str) -> None:
    """Write what a stranger's checkpoint tells of its data: enough for ``standardize`` and ``raw``, not ``whiten``.

    Args:
        path: safetensors file to write.
        mean: mean of the raw embeddings, (d,).
        std: standard deviation of their coordinates, (d,).
        null_text: CLIP's features of ``""``, batch size 1.
        fingerprint: fingerprint of the CLIP.
    """
    unknown = {name: torch.empty(0) for name in ("mean", "components", "eigenvalues")}
    _write(path, {"raw_mean": mean, "raw_std": std} | unknown, null_text, fingerprint)


def _write(path: Path, tensors: dict[str, Tensor], null_text: TextFeatures, fingerprint: str) -> None:
    tensors = tensors | {"null_states": null_text.states, "null_embed": null_text.embed}
    tensors = {name: value.float() for name, value in tensors.items()}
    tensors["null_tokens"] = null_text.tokens.long()
    tensors["fingerprint_bytes"] = torch.tensor(list(fingerprint.encode()), dtype=torch.uint8)
    write_tensors(path, tensors)


class FileBuffers(nn.Module):
    """Buffers that a file fills, or a checkpoint, which then decides their shapes and does not need the file.

    Args:
        names: names of the buffers, which are the tensors' in the file.
        path: safetensors file; empty when a checkpoint is about to fill the buffers.
        what: noun for what the file holds, in errors.
        command: command that makes the file.
    """

    fingerprint_bytes: Tensor  # uint8

    def __init__(self, names: Iterable[str], path: str, *, what: str, command: str) -> None:
        super().__init__()
        tensors = read_tensors(path, list(names), what=what, command=command).tensors if path else {}
        for name in names:
            # Copies: empty tensors of a file share an address, and torch.save refuses those of different types.
            self.register_buffer(name, tensors.get(name, torch.empty(0)).clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and buffer.shape != saved.shape:
                self._buffers[name] = saved.new_empty(saved.shape, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the CLIP that the tensors belong to."""
        return bytes(self.fingerprint_bytes.tolist()).decode()


class EmbeddingSpace(FileBuffers):
    """Scaling of CLIP's embeddings for a network, with the null text and the fingerprint that belong to them.

    Args:
        statistics: file made by ``unclip precompute``; empty when a checkpoint is about to fill the buffers.
        scaling: scale of the embeddings. ``unit``: unit norm × 0.5375·√d (the paper's 17.2 at d = 1,024).
            ``standardize``: raw coordinates with mean 0 and std 1 (Karlo's prior). ``whiten``: unit norm, centred, each
            principal axis at unit variance. ``raw``: unchanged (Karlo's decoder).

    Raises:
        MissingFileError: no statistics there.
    """

    raw_mean: Tensor
    raw_std: Tensor
    mean: Tensor
    components: Tensor
    eigenvalues: Tensor
    null_states: Tensor
    null_embed: Tensor
    null_tokens: Tensor
    fingerprint_bytes: Tensor

    #: Axes below this share of the first eigenvalue are noise: whitening must not blow them up.
    FLOOR = 1e-2

    def __init__(self, statistics: str = "", scaling: Scaling = "unit") -> None:
        super().__init__(
            EmbeddingSpace.__annotations__, statistics, what="embedding statistics", command="unclip precompute"
        )
        self.scaling = scaling

    @property
    def embed_dim(self) -> int:
        """d, the width of the embeddings."""
        return self.raw_mean.shape[0]

    @property
    def null_text(self) -> TextFeatures:
        """CLIP's features of the empty caption, batch size 1, raw; z_t of width 0 where the data have none."""
        mask = torch.ones(self.null_states.shape[:2], dtype=torch.bool, device=self.null_states.device)
        return TextFeatures(self.null_tokens, self.null_states, mask, self.null_embed)

    @property
    def unit_scale(self) -> float:
        """Factor of a unit vector under ``unit``, 0.5375·√d."""
        return PIXEL_RMS * self.embed_dim**0.5

    @property
    def _spread(self) -> Tensor:
        """Standard deviation of each raw coordinate; a little above 0 where one never changes."""
        return self.raw_std.clamp(min=1e-6 * self.raw_std.max())

    def scale(self, embed: Tensor) -> Tensor:
        """Scale raw image embeddings (…, d) for the network."""
        if self.scaling == "raw":
            return embed
        if self.scaling == "standardize":
            return (embed - self.raw_mean) / self._spread
        unit = F.normalize(embed, dim=-1)
        if self.scaling == "unit":
            return unit * self.unit_scale
        floor = self.FLOOR * self.eigenvalues[0]
        return (unit - self.mean) @ self.components.T / self.eigenvalues.clamp(min=floor).sqrt()

    def unscale(self, z: Tensor) -> Tensor:
        """Undo :meth:`scale`; from ``unit`` and ``whiten`` it returns to embeddings of unit norm."""
        if self.scaling == "raw":
            return z
        if self.scaling == "standardize":
            return z * self._spread + self.raw_mean
        if self.scaling == "unit":
            return z / self.unit_scale
        floor = self.FLOOR * self.eigenvalues[0]
        return (z * self.eigenvalues.clamp(min=floor).sqrt()) @ self.components + self.mean

    def scale_text(self, text: TextFeatures) -> TextFeatures:
        """Scale z_t for the network: like z_i under ``unit``; otherwise it stays raw (Karlo)."""
        if self.scaling != "unit":
            return text
        scale = PIXEL_RMS * text.embed.shape[-1] ** 0.5  # z_t may be of another width than z_i
        return text._replace(embed=F.normalize(text.embed, dim=-1) * scale)
