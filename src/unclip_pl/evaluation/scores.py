"""Turn features and readings into numbers for each caption. Pure functions over tensors on the CPU: no files.

Legend: N captions, S sampling seeds, K images of one caption, d embedding dimension, F width of the judge's features,
A attributes that the oracle reads (0 without an oracle).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.metrics.attributes import attribute_accuracy, captions_right, stated_match
from unclip_pl.metrics.clip_score import clip_scores, retrieval_ranks
from unclip_pl.metrics.diversity import diversity_gap, intra_caption_cosine, vendi
from unclip_pl.metrics.embedding import calibration
from unclip_pl.shapes.captions import conditional, parse
from unclip_pl.shapes.oracle import Oracle, ShapesOracle
from unclip_pl.shapes.render import ATTRIBUTES, HELD_OUT, VALUES, encode
from unclip_pl.types import TextFeatures


class View(NamedTuple):
    """What is kept of N pictures."""

    judge: Tensor  # (N, F) unit-norm features
    read: Tensor  # (N, A) what the oracle read, as indices
    residual: Tensor  # (N,) RMS to the nearest picture that the renderer can draw; NaN without an oracle
    images: Tensor  # (n, 3, H, H) in [-1, 1], those that are shown


class Heldout(NamedTuple):
    """N held-out captions with their pictures, on the CPU."""

    image_embed: Tensor  # (N, d) raw z_i
    text: TextFeatures
    captions: list[str]
    metadata: list[dict[str, Any]]
    judge_image: Tensor  # (N, F) unit-norm features of the real pictures
    judge_text: Tensor  # (N, F) unit-norm features of the captions
    images: Tensor  # (n, 3, H, H), the first n pictures


def join_heldout(parts: Iterable[Heldout]) -> Heldout:
    """Return batches as one."""
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


def stated_indices(captions: Sequence[str], oracle: type[Oracle] | Oracle = ShapesOracle) -> Tensor:
    """Return (N, A) what captions state of what an oracle reads; -1 where they say nothing."""
    stated, values = [oracle.parse(caption) for caption in captions], oracle.values
    rows = [[own.index(s[name]) if name in s else -1 for name, own in values.items()] for s in stated]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(values))


def true_attributes(metadata: list[dict[str, Any]], oracle: type[Oracle] | Oracle = ShapesOracle) -> Tensor:
    """Return (N, A) of what an oracle reads, from the json of the samples.

    Raises:
        InputError: they have none, or others.
    """
    names = list(oracle.values)
    if any(set(sample.get("attributes", ())) != set(names) for sample in metadata):
        raise InputError(
            f"The oracle reads shapes, but samples of this data have no `attributes` in their json, or others than "
            f"{', '.join(names)}: leave it out, or pack the shapes with `unclip pack shapes`."
        )
    return encode([tuple(sample["attributes"][name] for name in names) for sample in metadata], oracle.values)


def accuracy_by_attribute(read: Tensor, truth: Tensor, names: Iterable[str] = ATTRIBUTES) -> dict[str, float]:
    """Return the accuracy of (N, A) readings, by name; where the truth is -1 it does not count."""
    return dict(zip(names, attribute_accuracy(read, truth).tolist(), strict=True)) if read.shape[1] else {}


class Binding(NamedTuple):
    """Which of N pictures have what their captions state, and which of these bind it otherwise, (N,) bool each."""

    parts: Tensor  # both shapes, both colours and the arrangement
    swapped: Tensor  # of these: colours, shapes or whole objects have changed places
    colors: Tensor  # both colours and the arrangement, of any shape
    colors_swapped: Tensor  # of these: the colours have changed places


def binding(read: Tensor, stated: Tensor) -> Binding:
    """Compare what pictures of two objects show with what their captions bind.

    A model that draws colours and cannot draw shapes yet has hardly a picture with all parts. So colours are asked
    alone as well.

    Args:
        read: (N, 6) what a :class:`~unclip_pl.shapes.oracle.SceneOracle` read.
        stated: (N, 6) what the captions state.
    """
    arranged = read[:, 4] == stated[:, 4]
    shapes, colors = (
        arranged & (read[:, own].sort(1).values == stated[:, own].sort(1).values).all(1) for own in ([0, 2], [1, 3])
    )
    elsewhere = read[:, :4] != stated[:, :4]
    parts = shapes & colors
    return Binding(parts, parts & elsewhere.any(1), colors, colors & elsewhere[:, [1, 3]].any(1))


def caption_scores(view: View, real: Tensor, judge_text: Tensor, stated: Tensor) -> dict[str, Tensor]:
    """Score one picture for each caption, (N,) for each measure.

    Args:
        view: the N pictures.
        real: (N, F) the judge's features of the captions' true pictures.
        judge_text: (N, F) the judge's features of the captions.
        stated: (N, A) from :func:`stated_indices`.
    """
    ranks = retrieval_ranks(view.judge, real)
    scores = {
        "clip_score": clip_scores(view.judge, judge_text),
        **{f"retrieval_r{k}": (ranks < k).float() for k in (1, 5, 10)},
    }
    if view.read.shape[1]:
        scores["stated_match"] = stated_match(view.read, stated)
        scores["captions_right"] = captions_right(view.read, stated).float()
        scores["residual"] = view.residual
    return scores


def states_unseen_pair(stated: Tensor) -> Tensor:
    """Return (N,) bool: whether captions, (N, A) of :func:`stated_indices`, state a pair that training never shows."""
    pairs = torch.tensor([[VALUES["shape"].index(s), VALUES["color"].index(c)] for s, c in sorted(HELD_OUT)])
    places = [ATTRIBUTES.index("shape"), ATTRIBUTES.index("color")]
    return (stated[:, None, places] == pairs).all(-1).any(-1)


def diversity_scores(view: View, captions: Sequence[str], samples: int) -> dict[str, Tensor]:
    """Score how different the pictures of one caption are, (N,) for each measure.

    The true distribution of what a caption leaves open is that of the training split, which a prior could learn.

    Args:
        view: N · K pictures, each caption's in a row.
        captions: the N captions.
        samples: number K of pictures for each caption.
    """
    features = view.judge.unflatten(0, (len(captions), samples))
    scores = {"vendi": vendi(features), "intra_distance": 1 - intra_caption_cosine(features)}
    if view.read.shape[1] == len(ATTRIBUTES):  # of scenes, what captions leave open is not asked
        read = view.read.unflatten(0, (len(captions), samples))
        gaps = [caption_gap(rows, parse(caption)) for rows, caption in zip(read, captions, strict=True)]
        scores["diversity_gap"] = torch.tensor(gaps, dtype=torch.float64)
    return scores


def caption_gap(read: Tensor, stated: Mapping[str, str]) -> float:
    """Return the mean ``diversity_gap`` of the attributes that a caption leaves open; NaN where it leaves none.

    Args:
        read: (K, A) indices read from K pictures of the caption.
        stated: attributes that the caption states, by name.
    """
    gaps = []
    for column, name in zip(read.T, ATTRIBUTES, strict=True):
        if name not in stated:
            p = torch.from_numpy(conditional(stated, name, "train"))
            gaps.append(diversity_gap(torch.bincount(column, minlength=len(p)), p).item())
    return sum(gaps) / len(gaps) if gaps else math.nan


def open_captions(captions: Sequence[str], count: int, *, shapes: bool) -> list[int]:
    """Return the rows of the first ``count`` different captions; with ``shapes``, that leave something open."""
    rows: dict[str, int] = {}
    for row, caption in enumerate(captions):
        if len(rows) < count and not (shapes and len(parse(caption)) == len(ATTRIBUTES)):
            rows.setdefault(caption, row)
    return list(rows.values())


def embedding_values(samples: Tensor, true: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Score sampled embeddings without a decoder, (N,) for each measure.

    Args:
        samples: (S, N, d) sampled embeddings, S ≥ 2.
        true: (N, d) embeddings of the captions' pictures.
        text: (N, d) embeddings of the captions. Of another width they have no cosine to a sample.
    """
    cosines = calibration(samples.transpose(0, 1), true)
    found = {
        "cos_true": cosines.to_true,
        "cos_samples": cosines.between_samples,
        "mean_norm": cosines.mean_norm,
        "cos_mean": cosines.mean_to_true,
        "calibration_gap": cosines.gap,
    }
    if text.shape[-1] == samples.shape[-1]:  # imported embeddings of two encoders share no space
        found["text_cos"] = clip_scores(samples, text.expand_as(samples)).mean(0) / 100
    return found


def resampled_means(values: Tensor, resamples: int, *, generator: torch.Generator) -> Tensor:
    """Return (1 + R,): the mean of (N,) values of captions, then the means of R bootstrap resamples of these.

    A fresh generator of the same seed draws what :func:`~unclip_pl.metrics.frechet.frechet_resamples` draws.
    """
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return torch.cat([values.double().mean()[None], values.double()[index].mean(1)])


def resampler() -> torch.Generator:
    """Return a generator that draws the same captions for every cell, choice and report, so that these are paired."""
    return torch.Generator().manual_seed(0)


def spectrum(image_embed: Tensor) -> dict[str, float]:
    """Return how many directions (N, d) embeddings use: axes for 99 % of the variance, and the effective rank.

    The effective rank is exp of the entropy of the axes' shares (Roy & Vetterli 2007).
    """
    unit = F.normalize(image_embed.double(), dim=-1)
    shares = torch.linalg.svdvals(unit - unit.mean(0)).square()
    shares = shares / shares.sum()
    return {
        "embed_dim": unit.shape[1],
        "axes_for_99": int((shares.cumsum(0) < 0.99).sum()) + 1,
        "effective_rank": (-torch.xlogy(shares, shares).sum()).exp().item(),
    }
