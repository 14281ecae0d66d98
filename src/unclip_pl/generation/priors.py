"""Ways from caption to image embedding: four trained priors, a linear one, and three references.

A spec is what a config names: settings, checked when they are given, without touching a file. ``spec.load(root)`` reads
the weights and returns a prior that is complete.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import (
    Ancestral,
    Denoise,
    Denoised,
    Sampler,
    autoguided,
    check_guidance,
    check_interval,
    clip_x0,
    guided,
    in_interval,
    within,
)
from unclip_pl.diffusion.process import noise_like
from unclip_pl.errors import InputError
from unclip_pl.files import read_tensors
from unclip_pl.generation.guide import GuideSpec
from unclip_pl.nn.ar_prior import check_draws
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.kernels import packed, recorded
from unclip_pl.parts import (
    ARPriorPart,
    DiffusionPriorPart,
    EmbeddingPart,
    MixturePriorPart,
    RegressionPriorPart,
    TrainingRecord,
    count_parameters,
    load_part,
)
from unclip_pl.streams import Streams
from unclip_pl.types import PriorBatch, TextFeatures


@dataclass(frozen=True)
class PriorSpec(ABC):
    """The settings of a prior, as configs and ``run.json`` name them.

    Subclass it to add a prior of your own; ``examples/noisy_linear.py`` is a complete one.
    """

    @abstractmethod
    def load(self, root: Path, device: str = "cpu") -> "Prior":
        """Read the weights.

        Args:
            root: folder that the spec's files are named relative to.
            device: where to compute.

        Raises:
            InputError: a file is missing, damaged, or does not fit the settings.
        """


@dataclass(frozen=True)
class TrainedPriorSpec(PriorSpec):
    """The settings of a prior that a Task trains. The Task names its spec, and so validation can score the prior.

    Args:
        checkpoint: file of the trained Task, relative to the run.
    """

    #: Part that the checkpoint holds.
    part: ClassVar[type[EmbeddingPart]]

    checkpoint: str

    def load(self, root: Path, device: str = "cpu") -> "Prior":
        """Read the checkpoint."""
        return self.of(load_part(root / self.checkpoint, self.part).to(device))

    @abstractmethod
    def of(self, part: Any) -> "Prior":
        """Return the prior of a loaded part, or of its Task in training."""


class Prior(ABC):
    """P(z_i | y), loaded from a spec and ready to draw from."""

    #: Number of the network's parameters; 0 for what was not trained.
    num_parameters: int = 0
    #: Steps and seconds of the training.
    record: TrainingRecord = TrainingRecord()
    #: Whether the embeddings have CLIP's own norm, which a decoder of raw embeddings needs.
    keeps_norm: bool = False
    #: Fingerprint of the CLIP whose embeddings it draws; empty if it works with any CLIP.
    fingerprint: str = ""
    #: Whether it looks at the truth, and so contends with no other prior.
    reference: bool = False
    #: Whether it needs the true embedding itself, so that a caption alone has no sample.
    needs_image: bool = False
    #: The codec that its embeddings pass through, if there is one.
    codec: EmbeddingCodec | None = None
    #: The solver that draws it, if there is one.
    sampler: Sampler | None = None
    #: The trained part behind it, if there is one.
    part: EmbeddingPart | None = None

    def __init__(self, spec: PriorSpec) -> None:
        self.spec = spec

    @property
    def evaluations(self) -> int:
        """Number of network evaluations that one embedding takes."""
        return 0

    @abstractmethod
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw one z_i for each caption: (B, d), of unit norm, or raw where ``keeps_norm``.

        Args:
            text: raw CLIP features of B captions.
            generator: source of every draw. Give one generator for each caption where a draw must not depend on the
                batch around it.
        """

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """Draw one z_i for each pair of a batch, (B, d). A reference may look at the true embedding here."""
        return self.embed(batch.text, generator=generator)

    def obedience(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor | None:
        """Return how far z_i·z_t of samples follows the dot-product token, (B,); None for a prior without that token.

        1 follows it fully, 0 not at all.
        """
        return None

    def nats(self, batch: PriorBatch) -> Tensor | None:
        """Return −log p(z_i | caption) of true embeddings in nats, (B,); None where there is no likelihood.

        It is that of the codec's coordinates at unit variance, without guidance and at temperature 1.
        """
        return None

    def adjusted(
        self, *, guidance: float | None = None, candidates: int | None = None, sampler: Sampler | None = None
    ) -> Self:
        """Return a prior with the same weights and other settings.

        Args:
            guidance: new guidance scale; None keeps the present one.
            candidates: new number of embeddings to draw per caption, of which the best by z_i·z_t is kept; None keeps
                the present one.
            sampler: new solver; None keeps the present one.

        Raises:
            InputError: a value is out of range, or this prior has no such setting.
        """
        settings = {"guidance": guidance, "candidates": candidates, "sampler": sampler}
        given = {name: x for name, x in settings.items() if x is not None}
        missing = given.keys() - {field.name for field in fields(self.spec)}
        if missing:
            raise InputError(
                f"Expected a prior with {' and '.join(sorted(missing))}, such as DiffusionPrior. Got "
                f"{type(self).__name__}: choose another prior, or leave the option out."
            )
        other = copy.copy(self)
        other.spec = replace(self.spec, **given)
        return other


class TrainedPrior(Prior):
    """A prior whose network a Task has trained.

    Args:
        spec: its settings.
        part: the network, loaded or in training, and the space that it lives in.
    """

    def __init__(self, spec: TrainedPriorSpec, part: EmbeddingPart) -> None:
        super().__init__(spec)
        self.part = part
        self.num_parameters = count_parameters(part.net)
        self.record = part.record or TrainingRecord()
        self.fingerprint = part.space.fingerprint


def best_of(candidates: Tensor, text: TextFeatures) -> Tensor:
    """Keep each caption's candidate with the largest z_i·z_t, both of unit norm (§2.2): (B, N, d) → (B, d).

    Raises:
        InputError: there are several, and z_i and z_t have different widths.
    """
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    if candidates.shape[2] != text.embed.shape[1]:
        raise InputError(
            f"Expected z_i and z_t of one width, to choose among {candidates.shape[1]} candidates by z_i·z_t. Got "
            f"{candidates.shape[2]} and {text.embed.shape[1]}: set candidates to 1."
        )
    score = torch.einsum("bnd,bd->bn", F.normalize(candidates, dim=-1), F.normalize(text.embed, dim=-1))
    return candidates[torch.arange(len(candidates), device=score.device), score.argmax(dim=1)]


@dataclass(frozen=True)
class DiffusionPriorSpec(TrainedPriorSpec):
    """Samples a :class:`~unclip_pl.parts.DiffusionPriorPart`.

    Args:
        checkpoint: file of the trained Task, relative to the run.
        sampler: solver and number of steps; None is 64 ancestral steps on the paper's strided grid. The paper's
            analytic variance (``Ancestral(variance="analytic")``) needs a checkpoint written after a validation.
        guidance: guidance scale; 1 is off. Its unconditional side sees no text, but still z_i^(t).
        guidance_interval: lowest and highest noise level σ/α at which there is guidance; elsewhere the network is asked
            once (Kynkäänniemi et al. 2024). None is all levels.
        guide: weaker prior that guidance leads away from (autoguidance, Karras et al. 2024); None leads away from the
            empty caption.
        candidates: embeddings drawn per caption, of which the one with the largest z_i·z_t is kept (paper: 2).
        x0_bound: bound on the absolute values of the scaled estimate of z_i, for every parameterisation alike (Karlo:
            10); None sets no bound. At t = 1 the estimate of a network that predicts noise has its error times 20,000:
            without a bound such samples stray. Estimates of networks that predict z_i lie inside.
        keep_norm: keep CLIP's own norm, for a decoder of raw embeddings (Karlo); the prior must have learned it.
    """

    part = DiffusionPriorPart

    sampler: Sampler | None = None
    guidance: float = 1.0
    candidates: int = 2
    x0_bound: float | None = 10.0
    keep_norm: bool = False
    guidance_interval: tuple[float, float] | None = None
    guide: GuideSpec | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance)
        check_interval(self.guidance_interval)
        if self.candidates < 1:
            raise InputError(f"Expected candidates >= 1. Got {self.candidates}: draw at least one embedding.")

    def load(self, root: Path, device: str = "cpu") -> "DiffusionPrior":
        """Read the checkpoint."""
        part = load_part(root / self.checkpoint, DiffusionPriorPart).to(device)
        return DiffusionPrior(self, part, self.guide.load(root, device, part) if self.guide else None)

    def of(self, part: DiffusionPriorPart) -> "DiffusionPrior":
        """Return the prior of a part, without guide."""
        return DiffusionPrior(self, part)


class DiffusionPrior(TrainedPrior):
    """The paper's better prior: diffusion over embeddings."""

    spec: DiffusionPriorSpec
    part: DiffusionPriorPart
    sampler: Sampler

    def __init__(
        self, spec: DiffusionPriorSpec, part: DiffusionPriorPart, guide: DiffusionPriorPart | None = None
    ) -> None:
        super().__init__(spec, part)
        self.guide = guide
        self.keeps_norm = spec.keep_norm
        self.sampler = spec.sampler or Ancestral(64)
        if spec.keep_norm and part.space.scaling not in ("standardize", "raw"):
            raise InputError(
                f"{spec.checkpoint} was trained on embeddings scaled {part.space.scaling!r}, without their norm. "
                "Leave keep_norm out, or train with scaling 'standardize' or 'raw'."
            )
        self.sampler.check(part.diffusion)

    def adjusted(
        self, *, guidance: float | None = None, candidates: int | None = None, sampler: Sampler | None = None
    ) -> Self:
        """Return a prior with the same weights and other settings, see :meth:`Prior.adjusted`."""
        other = super().adjusted(guidance=guidance, candidates=candidates, sampler=sampler)
        if sampler is not None:
            sampler.check(self.part.diffusion)
            other.sampler = sampler
        return other

    @property
    def evaluations(self) -> int:
        """Number of network evaluations that one embedding takes; guidance doubles those in its interval."""
        spec, diffusion = self.spec, self.part.diffusion
        looks = self.sampler.looks(diffusion)
        twice = sum(in_interval(spec.guidance_interval, diffusion.schedule, t) for t in looks)
        return (len(looks) + (0 if spec.guidance == 1 else twice)) * spec.candidates

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw the candidates and keep the best. The caption is encoded once for all steps and candidates."""
        space, n = self.part.space, len(text.embed)
        x_T = noise_like(text.embed.new_empty(n, self.spec.candidates, space.embed_dim), generator=generator)
        with packed(self.part.net):
            z_i = self.sampler.sample(self._denoiser(text), x_T, self.part.diffusion, generator=generator)
        z_i = space.unscale(z_i)
        return best_of(z_i if self.keeps_norm else F.normalize(z_i, dim=-1), text)

    def _denoiser(self, text: TextFeatures) -> Denoise:
        spec, alone = self.spec, partial(self._look, self.part, text)
        if spec.guidance == 1:
            whole = alone()
        elif self.guide is None:
            whole = guided(alone(unconditional=True), spec.guidance)
        else:
            whole = autoguided(alone(), self._look(self.guide, text), spec.guidance)
        if spec.guidance != 1 and spec.guidance_interval is not None:
            whole = within(spec.guidance_interval, self.part.diffusion.schedule, whole, alone())
        return whole if spec.x0_bound is None else clip_x0(whole, spec.x0_bound)

    def _look(self, part: DiffusionPriorPart, text: TextFeatures, *, unconditional: bool = False) -> Denoise:
        """Return a network's ``denoise(x_t, t)``; of 2B captions, the last B empty, if asked for."""
        diffusion, null = part.diffusion, part.null_text if unconditional else None
        step = part.net.under(part.space.scale_text(text), null, draws=self.spec.candidates)
        step = recorded(step, text.embed.device)

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:  # x_t (B or 2B, N, d), t of one value per caption
            index = diffusion.index(t)[:, None].expand(x_t.shape[:2])
            return Denoised(diffusion.to_x0(step(x_t, index), x_t, t))

        return denoise


@dataclass(frozen=True)
class ARPriorSpec(TrainedPriorSpec):
    """Samples an :class:`~unclip_pl.parts.ARPriorPart` code by code.

    Args:
        checkpoint: file of the trained Task, relative to the run.
        guidance: guidance scale on the logits; 1 is off.
        temperature: divisor of all logits, those of the dot-product token too; below 1 samples are surer and less
            diverse.
        dot_quantile: share of the dot-product token's distribution, from its lower end, that is not drawn (paper: 0.5).
        candidates: embeddings drawn per caption, of which the one with the largest z_i·z_t is kept. The paper draws
            one, and leaves the choice to the dot-product token.
    """

    part = ARPriorPart

    guidance: float = 1.0
    temperature: float = 1.0
    dot_quantile: float = 0.5
    candidates: int = 1

    def __post_init__(self) -> None:
        check_draws(self.temperature, self.dot_quantile, self.candidates)
        check_guidance(self.guidance)

    def of(self, part: ARPriorPart) -> "ARPrior":
        """Return the prior of a part."""
        return ARPrior(self, part)


class ARPrior(TrainedPrior):
    """The paper's other prior: a language model over the codes of an embedding."""

    spec: ARPriorSpec
    part: ARPriorPart
    codec: EmbeddingCodec

    def __init__(self, spec: ARPriorSpec, part: ARPriorPart) -> None:
        super().__init__(spec, part)
        self.codec = part.codec

    @property
    def evaluations(self) -> int:
        """Number of network evaluations that one embedding takes; guidance doubles it."""
        return (self.codec.code_length + 1) * self.spec.candidates * (1 if self.spec.guidance == 1 else 2)

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw the codes one after another, with cached keys and values, and decode them."""
        space, codec, spec = self.part.space, self.codec, self.spec
        with packed(self.part.net):
            codes = self.part.net.generate(
                space.scale_text(text),
                values_of=codec.value_table,
                unconditional=self.part.null_text,
                guidance=spec.guidance,
                temperature=spec.temperature,
                dot_quantile=spec.dot_quantile,
                candidates=spec.candidates,
                generator=generator,
            )  # (B, N, n)
        z_i = codec.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)
        return best_of(z_i, text)

    @torch.no_grad()
    def nats(self, batch: PriorBatch) -> Tensor | None:
        """Return the nats of true embeddings, see :meth:`Prior.nats`; those of the dot-product token are among them."""
        return self.part.nats(batch)

    def obedience(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor | None:
        """Force the dot-product token low, then high: the change of z_i·z_t, over what the tokens ask for."""
        edges = self.codec.dot_edges[0]
        low = len(edges) // 8 + 1  # neither of the outer buckets, which have one edge alone
        high = len(edges) - low
        if high <= low:
            return None
        states = [stream.get_state() for stream in _streams(generator)]
        alone, cosines = self.adjusted(candidates=1), []
        for bucket in (low, high):
            for stream, state in zip(_streams(generator), states, strict=True):
                stream.set_state(state)  # both see the same noise
            forced = F.one_hot(torch.tensor(bucket, device=edges.device), len(edges) + 1) * 1e4
            handle = self.part.net.dot_head.register_forward_hook(lambda *args, forced=forced: args[2] * 0 + forced)
            try:
                cosines.append(F.cosine_similarity(alone.embed(text, generator=generator), text.embed, dim=-1))
            finally:
                handle.remove()
        asked = (edges[high - 1 : high + 1].mean() - edges[low - 1 : low + 1].mean()).item()
        return (cosines[1] - cosines[0]) / asked


def _streams(generator: Streams | None) -> Sequence[torch.Generator]:
    if generator is None:
        return [torch.default_generator]
    return [generator] if isinstance(generator, torch.Generator) else generator


@dataclass(frozen=True)
class MixturePriorSpec(TrainedPriorSpec):
    """Samples a :class:`~unclip_pl.parts.MixturePriorPart` coordinate by coordinate.

    Args:
        checkpoint: file of the trained Task, relative to the run.
        guidance: guidance scale on the log-density; 1 is off.
        temperature: divisor of the log-density; below 1 samples are surer and less diverse.
        candidates: embeddings drawn per caption, of which the one with the largest z_i·z_t is kept.
    """

    part = MixturePriorPart

    guidance: float = 1.0
    temperature: float = 1.0
    candidates: int = 1

    def __post_init__(self) -> None:
        check_draws(self.temperature, 0.0, self.candidates)
        check_guidance(self.guidance)

    def of(self, part: MixturePriorPart) -> "MixturePrior":
        """Return the prior of a part."""
        return MixturePrior(self, part)


class MixturePrior(TrainedPrior):
    """An autoregressive prior with a density: a mixture of Gaussians for each coordinate of an embedding."""

    spec: MixturePriorSpec
    part: MixturePriorPart

    @property
    def evaluations(self) -> int:
        """Number of network evaluations that one embedding takes; guidance doubles it."""
        return self.part.codec.code_length * self.spec.candidates * (1 if self.spec.guidance == 1 else 2)

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw the coordinates one after another, with cached keys and values, and place them."""
        part, spec = self.part, self.spec
        with packed(part.net):
            y = part.net.generate(
                part.space.scale_text(text),
                unconditional=part.null_text,
                guidance=spec.guidance,
                temperature=spec.temperature,
                candidates=spec.candidates,
                generator=generator,
            )  # (B, N, n)
        return best_of(part.codec.place(y.flatten(0, 1)).unflatten(0, y.shape[:2]), text)

    @torch.no_grad()
    def nats(self, batch: PriorBatch) -> Tensor | None:
        """Return the nats of true embeddings, see :meth:`Prior.nats`."""
        return self.part.nats(batch)


@dataclass(frozen=True)
class RegressionPriorSpec(TrainedPriorSpec):
    """Asks a :class:`~unclip_pl.parts.RegressionPriorPart` once.

    Args:
        checkpoint: file of the trained Task, relative to the run.
    """

    part = RegressionPriorPart

    def of(self, part: RegressionPriorPart) -> "RegressionPrior":
        """Return the prior of a part."""
        return RegressionPrior(self, part)


class RegressionPrior(TrainedPrior):
    """A network's one answer to a caption: the conditional mean, or what ECLIPSE makes of it."""

    part: RegressionPriorPart

    @property
    def evaluations(self) -> int:
        """Number of network evaluations that one embedding takes: one."""
        return 1

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Return the network's answer, (B, d) of unit norm; nothing is drawn."""
        with packed(self.part.net):
            return F.normalize(self.part.space.unscale(self.part.answer(text)), dim=-1)


@dataclass(frozen=True)
class LinearPriorSpec(PriorSpec):
    """Predicts z_i from z_t by ridge regression in closed form, which ``unclip linear`` fits (after Kandinsky).

    Args:
        checkpoint: safetensors file with ``weight`` (d, d) and ``bias`` (d,), relative to the run.
    """

    checkpoint: str

    def load(self, root: Path, device: str = "cpu") -> "LinearPrior":
        """Read weight and bias."""
        path, names = root / self.checkpoint, ("weight", "bias")
        return LinearPrior(
            self, *read_tensors(path, names, what="linear prior", command="unclip linear", device=device)
        )


class LinearPrior(Prior):
    """The conditional mean, which the cosine to the truth rewards and diversity does not."""

    def __init__(self, spec: LinearPriorSpec, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        super().__init__(spec)
        self.weight, self.bias = tensors["weight"], tensors["bias"]
        self.num_parameters = self.weight.numel() + self.bias.numel()
        self.record = TrainingRecord(seconds=float(metadata.get("seconds", 0)))
        self.fingerprint = metadata.get("fingerprint", "")

    @property
    def evaluations(self) -> int:
        """One product with the matrix."""
        return 1

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Return the regression's answer, (B, d) of unit norm; nothing is drawn."""
        return F.normalize(F.normalize(text.embed, dim=-1) @ self.weight.T + self.bias, dim=-1)


@dataclass(frozen=True)
class TextEmbeddingSpec(PriorSpec):
    """Uses no prior: z_t takes the place of z_i (§5.1)."""

    def load(self, root: Path, device: str = "cpu") -> "TextEmbedding":
        """Return the prior; there is no file to read."""
        return TextEmbedding(self)


class TextEmbedding(Prior):
    """z_t in place of z_i."""

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Return z_t, (B, d) of unit norm."""
        return F.normalize(text.embed, dim=-1)


@dataclass(frozen=True)
class TrueEmbeddingSpec(PriorSpec):
    """Uses the image's own z_i: what the decoder draws of the truth, which no prior can know.

    Args:
        keep_norm: keep CLIP's own norm, for a decoder of raw embeddings.
    """

    keep_norm: bool = False

    def load(self, root: Path, device: str = "cpu") -> "TrueEmbedding":
        """Return the prior; there is no file to read."""
        return TrueEmbedding(self, keeps_norm=self.keep_norm)


class TrueEmbedding(Prior):
    """The image's own z_i."""

    reference = True
    needs_image = True

    def __init__(self, spec: PriorSpec, *, keeps_norm: bool = False) -> None:
        super().__init__(spec)
        self.keeps_norm = keeps_norm

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Refuse: a caption alone has no true embedding.

        Raises:
            InputError: always.
        """
        raise InputError(f"{type(self).__name__} needs the image: use it in a comparison, or choose another prior.")

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """Return the batch's image embeddings, (B, d)."""
        return batch.image_embed if self.keeps_norm else F.normalize(batch.image_embed, dim=-1)


@dataclass(frozen=True)
class RoundTripSpec(PriorSpec):
    """Sends the image's own z_i through a codec, cut after some principal axes: the best of an AR prior of them.

    Args:
        codec: file made by ``unclip codec``, relative to the run.
        axes: number of the codec's axes to keep, the first ones.
    """

    codec: str
    axes: int

    def load(self, root: Path, device: str = "cpu") -> "RoundTrip":
        """Read the codec."""
        return RoundTrip(self, EmbeddingCodec(str(root / self.codec)).to(device))


class RoundTrip(TrueEmbedding):
    """The image's own z_i through a codec."""

    spec: RoundTripSpec
    codec: EmbeddingCodec

    def __init__(self, spec: RoundTripSpec, codec: EmbeddingCodec) -> None:
        super().__init__(spec)
        if not 1 <= spec.axes <= codec.code_length:
            raise InputError(
                f"Expected axes from 1 to the {codec.code_length} of {spec.codec}. Got {spec.axes}: keep fewer axes, "
                "or fit a longer codec."
            )
        self.codec = codec
        self.fingerprint = codec.fingerprint

    def embed_batch(self, batch: PriorBatch, *, generator: Streams | None = None) -> Tensor:
        """Return what the codes of the first axes decode to, (B, d) of unit norm."""
        codec, axes = self.codec, self.spec.axes
        y = codec.values(codec.encode(batch.image_embed)) * codec.std
        return F.normalize(y[:, :axes] @ codec.components[:axes] + codec.mean, dim=-1)
