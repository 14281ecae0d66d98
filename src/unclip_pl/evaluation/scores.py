"""From features and readings to numbers with intervals. Pure functions over tensors on the CPU: no network, no files.

Legend: N captions, S sampling seeds, K images of one caption, d embedding dimension, F width of the judge's features,
A attributes that the oracle reads (0 without an oracle).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.metrics.attributes import attribute_accuracy, captions_right, stated_match
from unclip_pl.metrics.clip_score import clip_scores, retrieval_ranks
from unclip_pl.metrics.diversity import diversity_gap, intra_caption_cosine, vendi
from unclip_pl.metrics.embedding import calibration
from unclip_pl.metrics.frechet import frechet_resamples
from unclip_pl.metrics.interval import Interval, mean_interval, recentred_interval, share_interval, win_rate
from unclip_pl.metrics.neighbours import precision_recall
from unclip_pl.shapes.captions import PHRASES, TEMPLATES, conditional, fill, parse
from unclip_pl.shapes.render import ATTRIBUTES, HELD_OUT, VALUES, Attributes, draw_attributes


class View(NamedTuple):
    """What is kept of N images."""

    judge: Tensor  # (N, F) unit-norm features
    read: Tensor  # (N, A) what the oracle read, as indices
    residual: Tensor  # (N,) RMS to the nearest picture that the renderer can draw; NaN without an oracle
    images: Tensor  # (n, 3, H, H) in [-1, 1], those that are shown


def stated_indices(captions: Sequence[str]) -> Tensor:
    """(N, A) what shapes captions state, -1 where nothing."""
    stated = [parse(caption) for caption in captions]
    rows = [[VALUES[name].index(s[name]) if name in s else -1 for name in ATTRIBUTES] for s in stated]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(ATTRIBUTES))


def accuracy_by_attribute(read: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy of (N, A) readings, by name; where the truth is -1 it does not count."""
    return dict(zip(ATTRIBUTES, attribute_accuracy(read, truth).tolist(), strict=True)) if read.shape[1] else {}


def caption_scores(view: View, real: Tensor, judge_text: Tensor, stated: Tensor) -> dict[str, Tensor]:
    """What can be said of one image per caption, (N,) each.

    Args:
        view: of the N images.
        real: (N, F) the judge's features of the captions' true images.
        judge_text: (N, F) of the captions.
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
    """(N,) bool: do captions, as (N, A) of :func:`stated_indices`, state a pair that training never shows?"""
    pairs = torch.tensor([[VALUES["shape"].index(s), VALUES["color"].index(c)] for s, c in sorted(HELD_OUT)])
    places = [ATTRIBUTES.index("shape"), ATTRIBUTES.index("color")]
    return (stated[:, None, places] == pairs).all(-1).any(-1)


def neighbour_scores(real: Tensor, fake: Tensor) -> dict[str, Interval]:
    """Precision, recall, density and coverage of (N, F) features, as if the balls were given.

    Shares have binomial intervals; density, which is none, has no interval.
    """
    scores = precision_recall(real, fake)
    shares = {
        name: share_interval(float(getattr(scores, name)), len(fake)) for name in ("precision", "recall", "coverage")
    }
    return shares | {"density": Interval(float(scores.density), math.nan, math.nan)}


def diversity_scores(view: View, captions: Sequence[str], samples: int) -> dict[str, Tensor]:
    """How different the images of one caption are, (N,) each.

    The true distribution of what a caption leaves open is train's, the one that a prior could learn.

    Args:
        view: of N · K images, each caption's in a row.
        captions: N.
        samples: K.
    """
    features = view.judge.unflatten(0, (len(captions), samples))
    scores = {"vendi": vendi(features), "intra_distance": 1 - intra_caption_cosine(features)}
    if view.read.shape[1]:
        read = view.read.unflatten(0, (len(captions), samples))
        gaps = [caption_gap(rows, parse(caption)) for rows, caption in zip(read, captions, strict=True)]
        scores["diversity_gap"] = torch.tensor(gaps, dtype=torch.float64)
    return scores


def caption_gap(read: Tensor, stated: Mapping[str, str]) -> float:
    """Mean :func:`diversity_gap` over the attributes that a caption leaves open; NaN where it leaves none.

    Args:
        read: (K, A) indices read from K images of the caption.
        stated: what it says.
    """
    gaps = []
    for column, name in zip(read.T, ATTRIBUTES, strict=True):
        if name not in stated:
            p = torch.from_numpy(conditional(stated, name, "train"))
            gaps.append(diversity_gap(torch.bincount(column, minlength=len(p)), p).item())
    return sum(gaps) / len(gaps) if gaps else math.nan


def open_captions(captions: Sequence[str], count: int, *, shapes: bool) -> list[int]:
    """Rows of the first ``count`` different captions; with ``shapes``, of those that leave an attribute open."""
    rows: dict[str, int] = {}
    for row, caption in enumerate(captions):
        if len(rows) < count and not (shapes and len(parse(caption)) == len(ATTRIBUTES)):
            rows.setdefault(caption, row)
    return list(rows.values())


def embedding_scores(samples: Tensor, true: Tensor) -> dict[str, Interval]:
    """Cosines of (S, N, d) sampled and (N, d) true embeddings, S ≥ 2."""
    per_caption = calibration(samples.transpose(0, 1), true)
    return {
        "cos_true": mean_interval(per_caption.to_true),
        "cos_samples": mean_interval(per_caption.between_samples),
        "cos_mean": mean_interval(per_caption.mean_to_true),
        "calibration_gap": mean_interval(per_caption.gap),
    }


def resampled_means(values: Tensor, resamples: int, *, generator: torch.Generator) -> Tensor:
    """(1 + R,): the mean of (N,) values of captions, then the means of R bootstrap resamples of these.

    A fresh generator of the same seed draws what :func:`~unclip_pl.metrics.frechet.frechet_resamples` draws.
    """
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return torch.cat([values.double().mean()[None], values.double()[index].mean(1)])


class Distances(NamedTuple):
    """Fréchet distances by name, and the paired differences of every two names."""

    by_name: dict[str, Interval]
    differences: dict[tuple[str, str], Interval]  # (a, b): distance of a less that of b


def frechet_scores(real: Tensor, fakes: dict[str, Tensor], resamples: int, generator: torch.Generator) -> Distances:
    """Distances of unit-norm features with intervals over captions; all names see the same resamples.

    Args:
        real: (N, F).
        fakes: name → (N, F) or (S, N, F).
        resamples: of the captions.
        generator: of the resamples.
    """
    fakes = {name: _different(F.normalize(fake.float(), dim=-1)) for name, fake in fakes.items()}
    values = frechet_resamples(F.normalize(real.float(), dim=-1), fakes, resamples, generator=generator)
    by_name = {name: recentred_interval(value[0].item(), value[1:]) for name, value in values.items()}
    differences = {}
    for a, b in combinations(values, 2):
        difference = values[a] - values[b]
        differences[a, b] = recentred_interval(difference[0].item(), difference[1:])
        differences[b, a] = recentred_interval(-difference[0].item(), -difference[1:])
    return Distances(by_name, differences)


def _different(fake: Tensor) -> Tensor:
    """One seed is enough of a prior that gives the same at every one."""
    same = fake.ndim == 3 and bool((fake == fake[:1]).all())
    return fake[0] if same else fake


def win_rates(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Interval]:
    """Share of captions on which we are better, ties half a win each, for every measure with a direction."""
    rates = {}
    for name, values in ours.items():
        better = MEASURES[name].better
        if better != "neither":
            sign = 1 if better == "higher" else -1
            rates[name] = win_rate(sign * values, sign * theirs[name])
    return rates


def zero_shot(clip: ClipEncoder, image_embed: Tensor, truth: Tensor, prompts: int = 64) -> dict[str, float]:
    """Accuracy of CLIP as a classifier of each attribute, from prompts that state all of them.

    A value's class embedding is the mean over ``prompts`` captions that share this value; all values of an attribute
    see the same other attributes.

    Args:
        clip: the encoder.
        image_embed: (N, d).
        truth: (N, A).
        prompts: captions of each value.
    """
    drawn = draw_attributes(prompts, split="train", rng=np.random.default_rng(0))
    images = F.normalize(image_embed.float(), dim=-1)
    read = []
    for name in ATTRIBUTES:
        classes = []
        for value in VALUES[name]:
            texts = [_say_all(attributes._replace(**{name: value})) for attributes in drawn]
            classes.append(F.normalize(clip.describe(texts).embed.float(), dim=-1).mean(0))
        read.append((images @ F.normalize(torch.stack(classes), dim=-1).cpu().T).argmax(-1))
    return accuracy_by_attribute(torch.stack(read, dim=1), truth)


def _say_all(attributes: Attributes) -> str:
    phrases = {name: PHRASES.get(value, (value,))[0] for name, value in attributes._asdict().items()}
    return fill(TEMPLATES[1], phrases)  # the one that states everything
