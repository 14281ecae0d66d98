"""Everything that a comparison measured, as the plain data of ``report.json``."""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.errors import InputError
from unclip_pl.evaluation.claims import claims
from unclip_pl.evaluation.scores import (
    View,
    accuracy_by_attribute,
    caption_scores,
    diversity_scores,
    embedding_scores,
    frechet_scores,
    neighbour_scores,
    stated_indices,
    states_unseen_pair,
    win_rates,
    zero_shot,
)
from unclip_pl.generation.priors import Prior
from unclip_pl.metrics.clip_score import retrieval_ranks
from unclip_pl.metrics.interval import Interval, mean_interval
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.shapes.render import Attributes, encode
from unclip_pl.types import TextFeatures


class Cost(NamedTuple):
    """What a prior's embeddings took on this machine."""

    seconds: float = 0.0
    embeddings: int = 0
    flops: int = 0  # per embedding

    def plus(self, seconds: float, embeddings: int) -> "Cost":
        """With more of them."""
        return Cost(self.seconds + seconds, self.embeddings + embeddings, self.flops)


class Heldout(NamedTuple):
    """N held-out rows, on the CPU. Legend as in :mod:`unclip_pl.evaluation.scores`."""

    image_embed: Tensor  # (N, d) raw z_i
    text: TextFeatures
    captions: list[str]
    metadata: list[dict[str, Any]]
    judge_image: Tensor  # (N, F) unit norm, of the real images
    judge_text: Tensor  # (N, F) unit norm, of the captions
    images: Tensor  # (n, 3, H, H), the first n


def join_heldout(parts: Iterable[Heldout]) -> Heldout:
    """Batches as one."""
    image_embed, text, captions, metadata, judge_image, judge_text, images = zip(*parts, strict=True)
    return Heldout(
        torch.cat(image_embed),
        TextFeatures.cat(text),
        list(chain.from_iterable(captions)),
        list(chain.from_iterable(metadata)),
        torch.cat(judge_image),
        torch.cat(judge_text),
        torch.cat(images),
    )


def true_attributes(metadata: list[dict[str, Any]]) -> Tensor:
    """(N, A) of shapes, by the json of their samples.

    Raises:
        ValueError: they have none.
    """
    if any("attributes" not in sample for sample in metadata):
        raise InputError(
            "The oracle reads shapes, but samples of this data have no `attributes` in their json: leave `oracle` out "
            "of the comparison, or pack the shapes with `unclip pack shapes`."
        )
    return encode([Attributes(**sample["attributes"]) for sample in metadata])


class Material(NamedTuple):
    """All that was drawn, before it is scored."""

    heldout: Heldout
    samples: dict[str, Tensor]  # prior → (S, N, d)
    costs: dict[str, Cost]
    real: View  # of the first n rows
    reconstruction: View  # decoded from their own embeddings, without a caption
    views: dict[str, View]  # prior → images of the first n captions
    many: dict[str, View]  # prior → K images of each of some captions
    many_captions: list[str]
    shown: list[int]  # rows whose images the views keep

    @property
    def has_oracle(self) -> bool:
        """Whether the images were read back into attributes."""
        return self.real.read.shape[1] > 0

    def truth(self) -> Tensor:
        """(n, A) true attributes of the decoded rows."""
        return true_attributes(self.heldout.metadata[: len(self.real.judge)])

    def counts(self) -> dict[str, int]:
        """How many of everything, for the reader."""
        samples, captions = next(iter(self.samples.values())), len(self.many_captions) if self.many else 0
        images_each = len(next(iter(self.many.values())).judge) // captions if captions else 0
        return {
            "heldout_rows": len(self.heldout.captions),
            "seeds": len(samples),
            "decoded_captions": len(self.real.judge),
            "diversity_captions": captions,
            "diversity_samples": images_each,
        }


def assemble(
    material: Material,
    priors: dict[str, Prior],
    rivals: tuple[str, str],
    resamples: int,
    clip: ClipEncoder,
    seed: int,
) -> dict[str, Any]:
    """``report.json`` without its ``meta``.

    Args:
        material: of the comparison.
        priors: loaded, by name.
        rivals: names for the head to head; left out where one is missing.
        resamples: for the intervals of Fréchet distances.
        clip: the CLIP that conditions, for its own scores.
        seed: of the resamples.
    """
    heldout, real = material.heldout, material.real
    n = len(real.judge)
    stated = stated_indices(heldout.captions[:n])
    views = {**material.views, "reconstruction": material.reconstruction}
    singles = {name: caption_scores(view, real.judge, heldout.judge_text[:n], stated) for name, view in views.items()}
    many = {
        name: diversity_scores(view, material.many_captions, material.counts()["diversity_samples"])
        for name, view in material.many.items()
    }
    generator = torch.Generator().manual_seed(seed)
    embed_fd = frechet_scores(heldout.image_embed, material.samples, resamples, generator)
    fd_judge = frechet_scores(real.judge, {name: view.judge for name, view in views.items()}, resamples, generator)

    unseen = states_unseen_pair(stated)
    entries: dict[str, Any] = {}
    for name, prior in priors.items():
        values = {**singles[name], **many.get(name, {})}
        metrics = {key: mean_interval(value) for key, value in values.items()}
        if material.has_oracle and unseen.sum() > 1:
            metrics["unseen_match"] = mean_interval(singles[name]["stated_match"][unseen])
        metrics |= {"embed_fd": embed_fd.by_name[name], "fd_judge": fd_judge.by_name[name]}
        metrics |= neighbour_scores(real.judge, views[name].judge)
        metrics |= embedding_scores(material.samples[name], heldout.image_embed)
        entries[name] = {
            "class": type(prior).__name__,
            "reference": prior.reference,
            "metrics": {key: plain(value) for key, value in metrics.items()},
            "attributes": accuracy_by_attribute(views[name].read, stated),
            **_costs(prior, material.costs[name]),
        }
    report: dict[str, Any] = {
        "oracle": _oracle(material),
        "decoder": _decoder(material, singles["reconstruction"], fd_judge.by_name["reconstruction"]),
        "clip": _clip(material, clip),
        "judge": _retrieval(heldout.judge_text, heldout.judge_image),
        "codec": next((_codec(p.codec, heldout.image_embed) for p in priors.values() if p.codec and p.task), None),
        "priors": entries,
        "head_to_head": None,
        "differences": {
            measure: {f"{a} - {b}": plain(value) for (a, b), value in distances.differences.items()}
            for measure, distances in (("embed_fd", embed_fd), ("fd_judge", fd_judge))
        },
    }
    if all(name in entries for name in rivals):
        ours, theirs = ({**singles[name], **many.get(name, {})} for name in rivals)
        rates = {key: plain(value) for key, value in win_rates(ours, theirs).items()}
        report["head_to_head"] = {"first": rivals[0], "second": rivals[1], "win_rates": rates}
    report["paper"] = claims(report)
    return report


def plain(interval: Interval) -> dict[str, float | None]:
    """For JSON, which knows no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}


def _costs(prior: Prior, cost: Cost) -> dict[str, float]:
    return {
        "parameters": prior.num_parameters,
        "training_steps": prior.record.steps,
        "training_seconds": prior.record.seconds,
        "evaluations": prior.evaluations,
        "flops_per_embedding": cost.flops,
        "seconds_per_embedding": cost.seconds / max(1, cost.embeddings),
    }


def _oracle(material: Material) -> dict[str, Any] | None:
    """How well the oracle reads real images: what every number of its own rests on."""
    if not material.has_oracle:
        return None
    real = material.real
    return {"real": accuracy_by_attribute(real.read, material.truth()), "residual": plain(mean_interval(real.residual))}


def _decoder(material: Material, scores: dict[str, Tensor], fd_judge: Interval) -> dict[str, Any]:
    """Decoding the true embedding without a caption: what passes through z_i and the decoder."""
    read = material.reconstruction.read
    metrics = {"fd_judge": fd_judge, "judge_r10": mean_interval(scores["retrieval_r10"])}
    if material.has_oracle:
        metrics["residual"] = mean_interval(scores["residual"])
    return {
        "reconstruction": accuracy_by_attribute(read, material.truth()) if material.has_oracle else {},
        **{name: plain(value) for name, value in metrics.items()},
    }


def _clip(material: Material, clip: ClipEncoder) -> dict[str, Any]:
    heldout, n = material.heldout, len(material.real.judge)
    classes = zero_shot(clip, heldout.image_embed[:n], material.truth()) if material.has_oracle else {}
    return {"zero_shot": classes, **_retrieval(heldout.text.embed, heldout.image_embed)}


def _retrieval(text_embed: Tensor, image_embed: Tensor) -> dict[str, float]:
    """How often a CLIP finds the true image of a caption among all held-out ones."""
    ranks = retrieval_ranks(text_embed, image_embed)
    return {f"retrieval_r{k}": (ranks < k).float().mean().item() for k in (1, 10)}


def _codec(codec: EmbeddingCodec, image_embed: Tensor) -> dict[str, Any]:
    embed = image_embed.to(codec.mean.device)
    return {
        "roundtrip_cosine": codec.roundtrip_cosine(embed).mean().item(),
        "pca_error": codec.pca_error(embed).item(),
        "quantisation_error": codec.quantisation_error(embed).item(),
        "code_length": codec.code_length,
        "axes_for_99": axes_for(0.99, F.normalize(embed, dim=-1) - codec.mean, codec.components),
        "embed_dim": codec.embed_dim,
        "buckets": codec.buckets,
    }


def axes_for(share: float, centred: Tensor, components: Tensor) -> int | None:
    """The fewest of (n, d) principal axes that hold this share of the variance of (N, d); None if all n do not."""
    held = (centred @ components.T).square().sum(0).cumsum(0) / centred.square().sum()
    enough = (held >= share).nonzero()
    return int(enough[0]) + 1 if len(enough) else None
