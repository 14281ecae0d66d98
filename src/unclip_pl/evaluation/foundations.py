"""Measure what a comparison stands on: the oracle, the decoder alone, both CLIPs and the codec."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.evaluation.scores import Heldout, View, accuracy_by_attribute, true_attributes
from unclip_pl.metrics.clip_score import retrieval_ranks
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.shapes.captions import PHRASES, TEMPLATES, fill
from unclip_pl.shapes.render import ATTRIBUTES, VALUES, Attributes, draw_attributes


def foundations(
    heldout: Heldout,
    real: View,
    reconstruction: View,
    fd_judge: Tensor,
    clip: ClipEncoder,
    codec: EmbeddingCodec | None,
) -> dict[str, Any]:
    """Measure all foundations.

    Args:
        heldout: all held-out rows.
        real: the first n real pictures.
        reconstruction: pictures decoded from the n true embeddings, without a caption.
        fd_judge: (1 + R,) Fréchet distance of the reconstructions and its resamples.
        clip: the CLIP that conditions.
        codec: an AR prior's codec; None where no prior has one.

    Returns:
        Plain data and tensors. ``arms`` has numbers for each caption, in the form of a cell's arms.
    """
    n = len(real.judge)
    readable = real.read.shape[1] > 0
    truth = true_attributes(heldout.metadata[:n]) if readable else torch.empty(n, 0, dtype=torch.long)
    found = (retrieval_ranks(reconstruction.judge, heldout.judge_image[:n]) < 10).float()
    residuals = {"residual": reconstruction.residual} if readable else {}
    return {
        "oracle": accuracy_by_attribute(real.read, truth) or None,
        "reconstruction": accuracy_by_attribute(reconstruction.read, truth),
        "arms": {
            "real": {"values": {"residual": real.residual} if readable else {}, "resamples": {}},
            "reconstruction": {"values": {"retrieval_r10": found, **residuals}, "resamples": {"fd_judge": fd_judge}},
        },
        "clip": {
            "zero_shot": zero_shot(clip, heldout.image_embed[:n], truth) if readable else {},
            **retrieval(heldout.text.embed, heldout.image_embed),
        },
        "judge": retrieval(heldout.judge_text, heldout.judge_image),
        "codec": None if codec is None else codec_errors(codec, heldout.image_embed),
    }


def retrieval(text_embed: Tensor, image_embed: Tensor) -> dict[str, float]:
    """Return how often a CLIP finds the true picture of a caption among all held-out ones: first, and in ten."""
    ranks = retrieval_ranks(text_embed, image_embed)
    return {f"retrieval_r{k}": (ranks < k).float().mean().item() for k in (1, 10)}


def codec_errors(codec: EmbeddingCodec, image_embed: Tensor) -> dict[str, Any]:
    """Return what a codec keeps and loses of (N, d) embeddings."""
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
    """Return the fewest of (n, d) principal axes that hold this share of the variance of (N, d); None if n do not."""
    held = (centred @ components.T).square().sum(0).cumsum(0) / centred.square().sum()
    enough = (held >= share).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def zero_shot(clip: ClipEncoder, image_embed: Tensor, truth: Tensor, prompts: int = 64) -> dict[str, float]:
    """Return the accuracy of CLIP in classifying each attribute, from prompts that state all of them.

    A value's class embedding is the mean over captions that share this value. All values of an attribute see the same
    other attributes.

    Args:
        clip: the encoder.
        image_embed: (N, d) embeddings of pictures.
        truth: (N, A) attributes of the pictures.
        prompts: number of captions for each value.
    """
    images = F.normalize(image_embed.float(), dim=-1)
    classes = (F.normalize(class_embeddings(clip, name, prompts), dim=-1).cpu() for name in ATTRIBUTES)
    read = [(images @ own.T).argmax(-1) for own in classes]
    return accuracy_by_attribute(torch.stack(read, dim=1), truth)


def class_embeddings(clip: ClipEncoder, name: str, prompts: int = 64) -> Tensor:
    """Return the class embeddings of an attribute's values, (V, d), on the encoder's device.

    They are means of unit vectors: a picture's product with one is its mean cosine to the prompts.

    Args:
        clip: the encoder.
        name: name of the attribute.
        prompts: number of captions for each value.
    """
    drawn, classes = draw_attributes(prompts, split="train", rng=np.random.default_rng(0)), []
    for value in VALUES[name]:
        texts = [_say_all(attributes._replace(**{name: value})) for attributes in drawn]
        classes.append(F.normalize(clip.describe(texts).embed.float(), dim=-1).mean(0))
    return torch.stack(classes)


def _say_all(attributes: Attributes) -> str:
    phrases = {name: PHRASES.get(value, (value,))[0] for name, value in attributes._asdict().items()}
    return fill(TEMPLATES[1], phrases)  # the template that states everything
