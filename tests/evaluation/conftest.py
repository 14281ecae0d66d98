"""Stand-ins with known scores: a decoder that shows the real image of the nearest embedding, a prior of pure chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.diffusion.process import noise_like
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.shapes.captions import caption
from unclip_pl.shapes.render import draw_attributes, render
from unclip_pl.streams import Streams
from unclip_pl.types import EvaluationBatch, TextFeatures


@dataclass(frozen=True)
class LookupSpec(DecoderSpec):
    _batches: Sequence[EvaluationBatch] = ()

    def load(self, root: Path, device: str = "cpu") -> "Lookup":
        return Lookup(self, self._batches)


class Lookup(Decoder):
    """Perfect on true embeddings, and blind to captions."""

    needs_norm = False
    fingerprint = ""

    def __init__(self, spec: LookupSpec, batches: Sequence[EvaluationBatch]) -> None:
        self.spec = spec
        self._images = torch.cat([batch.image for batch in batches])
        self._embeds = F.normalize(torch.cat([batch.image_embed for batch in batches]), dim=-1)
        self._null = batches[0].text.rows(slice(1))

    def null_text(self, n: int) -> TextFeatures:
        return self._null.repeat(n)

    def decode(self, image_embed: Tensor, text: TextFeatures, **options: Any) -> Tensor:
        return self._images[(F.normalize(image_embed, dim=-1) @ self._embeds.T).argmax(-1)]


@dataclass(frozen=True)
class ChanceSpec(PriorSpec):
    fingerprint: str = ""

    def load(self, root: Path, device: str = "cpu") -> "Chance":
        return Chance(self)


class Chance(Prior):
    """Random directions."""

    def __init__(self, spec: ChanceSpec) -> None:
        super().__init__(spec)
        self.fingerprint = spec.fingerprint

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        return F.normalize(noise_like(text.embed, generator=generator), dim=-1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These matrices are small: threads would wait for each other, on a busy machine for a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def batches() -> list[EvaluationBatch]:
    """48 held-out shapes in three batches, with the features of a random CLIP."""
    torch.manual_seed(0)
    encoder = ClipSpec("tiny-rn").load()
    rng = np.random.default_rng(0)
    attributes = draw_attributes(48, split="heldout", rng=rng)
    images = torch.from_numpy(render(attributes, rng=rng)).permute(0, 3, 1, 2).div(127.5).sub(1)
    captions = [caption(names, rng)[0] for names in attributes]
    metadata = [{"attributes": names._asdict()} for names in attributes]
    embeds = encoder.encode_image(images)
    found = []
    for start in (0, 16, 32):
        rows = slice(start, start + 16)
        text = encoder.describe(captions[rows])
        found.append(EvaluationBatch(images[rows], embeds[rows], text, captions[rows], metadata[rows]))
    return found


@pytest.fixture(scope="session")
def lookup(batches: list[EvaluationBatch]) -> LookupSpec:
    return LookupSpec("none", 32, _batches=batches)


@pytest.fixture(scope="module")
def chance() -> ChanceSpec:
    return ChanceSpec()
