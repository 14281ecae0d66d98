"""Five ways from caption to image embedding, behind one ABC: the paper's two, a baseline, a floor, a ceiling."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import Ancestral, Denoised, Sampler, check_guidance, clip_x0, guided
from unclip_pl.diffusion.process import noise_like
from unclip_pl.diffusion.sampling import Denoise
from unclip_pl.errors import InputError
from unclip_pl.files import read_tensors
from unclip_pl.nn.ar_prior import check_draws
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.packed import packed
from unclip_pl.nn.recorded import recorded
from unclip_pl.streams import Streams
from unclip_pl.tasks import ARPriorTask, DiffusionPriorTask, EmbeddingTask, load_task
from unclip_pl.tasks.base import TrainingRecord, count_parameters
from unclip_pl.types import PriorBatch, TextFeatures


class Prior(ABC):
    """P(z_i | y). Constructed without touching a file, so that configs parse at once; :meth:`load` reads weights."""

    #: Parameters of the network, 0 for what was not trained.
    num_parameters: int = 0
    #: Network evaluations per embedding.
    evaluations: int = 0
    #: What training took.
    record: TrainingRecord = TrainingRecord(0, 0.0)
    #: Whether its embeddings have CLIP's own norm: what a decoder of raw embeddings needs.
    keeps_norm: bool = False
    #: Of the CLIP whose embeddings it draws; empty for any.
    fingerprint: str = ""

    @abstractmethod
    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the weights, named relative to a run's folder; returns itself."""

    @abstractmethod
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """One z_i per caption, (B, d), unit norm, or raw where ``keeps_norm``.

        Args:
            text: raw features of B captions.
            generator: of every draw; one for each caption where a draw must not depend on the batch around it
                (:func:`~unclip_pl.diffusion.process.noise_like` takes either).
        """

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """As :meth:`embed`, for those who may look at the true embedding."""
        return self.embed(batch.text, generator=generator)

    def adjusted(self, *, guidance: float | None = None, candidates: int | None = None) -> Self:
        """The same weights, sampled otherwise.

        Args:
            guidance: scale; None keeps its own.
            candidates: drawn per caption, the best by z_i·z_t kept; None keeps its own.

        Raises:
            ValueError: a value out of range, or a prior without such a setting.
        """
        other = copy.copy(self)
        checks: dict[str, Callable[..., float]] = {"guidance": check_guidance, "candidates": check_candidates}
        given = {name: x for name, x in {"guidance": guidance, "candidates": candidates}.items() if x is not None}
        for name, value in given.items():
            if not hasattr(self, name):
                raise InputError(f"Expected a prior with {name}, as the diffusion prior. Got {type(self).__name__}.")
            setattr(other, name, checks[name](value))
        return other


def check_candidates(candidates: int) -> int:
    """The number itself.

    Raises:
        ValueError: it is below 1.
    """
    if candidates < 1:
        raise InputError(f"Expected candidates >= 1. Got {candidates}.")
    return candidates


def best_of(candidates: Tensor, text: TextFeatures) -> Tensor:
    """The candidate with the largest z_i·z_t, both unit-norm, of each caption (§2.2): (B, N, d) → (B, d)."""
    score = torch.einsum("bnd,bd->bn", F.normalize(candidates, dim=-1), F.normalize(text.embed, dim=-1))
    return candidates[torch.arange(len(candidates), device=score.device), score.argmax(dim=1)]


class DiffusionPrior(Prior):
    """Samples a :class:`~unclip_pl.tasks.DiffusionPriorTask`.

    Args:
        checkpoint: of the Task, relative to the run.
        sampler: None is 64 ancestral steps on the paper's strided grid. The paper's analytic variance (``Ancestral``'s
            ``variance: analytic``) is read from the checkpoint.
        guidance: scale; 1 is off. Drops the text and never z_i^(t).
        candidates: drawn per caption; the one with the largest z_i·z_t is kept (paper: 2).
        x0_bound: the scaled estimate of z_i is clamped to ± this (Karlo: 10); None is the paper's, no clamp.
        keep_norm: embeddings keep CLIP's own norm, for decoders of raw ones (Karlo); the prior must have learned it.
    """

    def __init__(
        self,
        checkpoint: str,
        sampler: Sampler | None = None,
        guidance: float = 1.0,
        candidates: int = 2,
        x0_bound: float | None = None,
        keep_norm: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.sampler = sampler or Ancestral(64)
        self.guidance = check_guidance(guidance)
        self.candidates = check_candidates(candidates)
        self.x0_bound = x0_bound
        self.keeps_norm = keep_norm
        self.evaluations = self.sampler.steps * candidates * (1 if guidance == 1 else 2)

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the checkpoint."""
        self.task = load_task(root / self.checkpoint, DiffusionPriorTask).to(device)
        _describe(self, self.task)
        if self.keeps_norm and self.task.space.scaling not in ("standardize", "raw"):
            raise InputError(
                f"{root / self.checkpoint} was trained on embeddings scaled {self.task.space.scaling!r}, without their "
                "norm: keep_norm needs 'standardize' or 'raw'."
            )
        if isinstance(self.sampler, Ancestral) and self.sampler.variance == "analytic":
            if self.task.posterior_mse is None:
                raise InputError(
                    f"{root / self.checkpoint} was saved before any validation, whose errors the analytic variance "
                    "needs: fit on data with a validation split, or sample with another variance."
                )
            self.sampler = self.sampler.with_posterior_mse(self.task.posterior_mse)
        self.sampler.check(self.task.diffusion)
        return self

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Best of ``candidates`` samples. The caption is encoded once for all steps and candidates."""
        space, n = self.task.space, len(text.embed)
        x_T = noise_like(text.embed.new_empty(n, self.candidates, space.embed_dim), generator=generator)
        with packed(self.task.net):
            z_i = self.sampler.sample(self._denoiser(text), x_T, generator=generator)
        z_i = space.unscale(z_i)
        return best_of(z_i if self.keeps_norm else F.normalize(z_i, dim=-1), text)

    def _denoiser(self, text: TextFeatures) -> Denoise:
        space, diffusion, net = self.task.space, self.task.diffusion, self.task.net
        prefix = net.encode_prefix(space.scale_text(text))
        if self.guidance != 1:
            null = net.encode_prefix(space.scale_text(space.null_text))
            prefix = prefix.cat(null.expand(len(text.embed)))
        prefix = prefix.pad(prefix.mask.shape[1] + 3 * self.candidates)
        step = recorded(partial(net, prefix=prefix, overwrite=True), text.embed.device)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:  # x_t (B or 2B, N, d), t of one value per caption
            index = diffusion.index(t)[:, None].expand(x_t.shape[:2])
            return Denoised(diffusion.to_x0(step(x_t, index), x_t, t))

        whole = guided(denoise, self.guidance) if self.guidance != 1 else denoise
        return whole if self.x0_bound is None else clip_x0(whole, self.x0_bound)


class ARPrior(Prior):
    """Samples an :class:`~unclip_pl.tasks.ARPriorTask` code by code.

    Args:
        checkpoint: of the Task, relative to the run.
        guidance: on the logits; 1 is off.
        temperature: of the codes.
        dot_quantile: the dot-product token is drawn above this quantile of its distribution (paper: the top half).
        candidates: drawn per caption, best z_i·z_t kept; the paper leaves that to the dot-product token.
    """

    def __init__(
        self,
        checkpoint: str,
        guidance: float = 1.0,
        temperature: float = 1.0,
        dot_quantile: float = 0.5,
        candidates: int = 1,
    ) -> None:
        check_draws(temperature, dot_quantile, candidates)
        self.checkpoint = checkpoint
        self.guidance = check_guidance(guidance)
        self.temperature = temperature
        self.dot_quantile = dot_quantile
        self.candidates = candidates

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the checkpoint."""
        self.task = load_task(root / self.checkpoint, ARPriorTask).to(device)
        _describe(self, self.task)
        self.evaluations = (self.task.codec.code_length + 1) * self.candidates * (1 if self.guidance == 1 else 2)
        return self

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Codes drawn one after another with cached keys and values, then decoded."""
        space, codec = self.task.space, self.task.codec
        with packed(self.task.net):
            codes = self.task.net.generate(
                space.scale_text(text),
                values_of=codec.value_table,
                unconditional=space.scale_text(space.null_text),
                guidance=self.guidance,
                temperature=self.temperature,
                dot_quantile=self.dot_quantile,
                candidates=self.candidates,
                generator=generator,
            )  # (B, N, n)
        z_i = codec.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)
        return best_of(z_i, text)


def _describe(prior: Prior, task: EmbeddingTask) -> None:
    prior.num_parameters = count_parameters(task.net)
    prior.record = task.record or TrainingRecord(0, 0.0)
    prior.fingerprint = task.space.fingerprint


class LinearPrior(Prior):
    """Ridge regression z_t → z_i in closed form: Kandinsky's surprise (`unclip linear` fits it).

    It answers with the conditional mean, which cosine to the truth rewards and diversity does not.

    Args:
        checkpoint: safetensors file with ``weight`` (d, d) and ``bias`` (d,), relative to the run.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.evaluations = 1

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read weight and bias."""
        path, names = root / self.checkpoint, ("weight", "bias")
        tensors, metadata = read_tensors(path, names, what="linear prior", command="unclip linear", device=device)
        self.weight, self.bias = (tensors[name] for name in names)
        self.num_parameters = self.weight.numel() + self.bias.numel()
        self.record = TrainingRecord(0, float(metadata.get("seconds", 0)))
        self.fingerprint = metadata.get("fingerprint", "")
        return self

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """The regression's answer, renormalised; nothing is drawn."""
        return F.normalize(F.normalize(text.embed, dim=-1) @ self.weight.T + self.bias, dim=-1)


class TextEmbedding(Prior):
    """No prior: z_t put in place of z_i (§5.1). The floor."""

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Nothing to read."""
        return self

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """z_t itself."""
        return F.normalize(text.embed, dim=-1)


class TrueEmbedding(Prior):
    """The image's own z_i. The ceiling: what the decoder does when the prior makes no mistake.

    Args:
        keep_norm: embeddings keep CLIP's own norm, for decoders of raw ones.
    """

    def __init__(self, keep_norm: bool = False) -> None:
        self.keeps_norm = keep_norm

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Nothing to read."""
        return self

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """A caption alone has no true embedding.

        Raises:
            ValueError: always.
        """
        raise InputError("TrueEmbedding needs the image: use it in a comparison, or pick another prior.")

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """The batch's image embeddings."""
        return batch.image_embed if self.keeps_norm else F.normalize(batch.image_embed, dim=-1)


class RoundTrip(TrueEmbedding):
    """The image's own z_i through a codec, cut after some principal axes: the most that an AR prior of them can give.

    Args:
        codec: file made by ``unclip codec``, relative to the run.
        axes: to keep, of the codec's.
    """

    def __init__(self, codec: str, axes: int) -> None:
        super().__init__()
        self.path = codec
        self.axes = axes

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the codec.

        Raises:
            ValueError: it has fewer axes.
        """
        self.codec = EmbeddingCodec(str(root / self.path)).to(device)
        self.fingerprint = self.codec.fingerprint
        if not 1 <= self.axes <= self.codec.code_length:
            raise InputError(f"Expected axes from 1 to the {self.codec.code_length} of {self.path}. Got {self.axes}.")
        return self

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """What the codes of the first axes decode to, unit norm."""
        codec = self.codec
        y = codec.values(codec.encode(batch.image_embed)) * codec.std
        return F.normalize(y[:, : self.axes] @ codec.components[: self.axes] + codec.mean, dim=-1)
