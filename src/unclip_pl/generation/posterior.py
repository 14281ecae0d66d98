"""The perfect prior of the built-in shapes: the renderer's own posterior over pictures of a caption."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.shapes.captions import parse
from unclip_pl.shapes.render import HELD_OUT, VALUES, Attributes, Split, pairs, render
from unclip_pl.streams import Streams, fill_like
from unclip_pl.types import TextFeatures


@dataclass(frozen=True)
class TruePosteriorSpec(PriorSpec):
    """Draws what a caption leaves open from its true distribution, renders the picture and embeds it.

    No prior can know more, or have a smaller expected distance from the data.

    Args:
        clip: the CLIP that embeds; its weights are named relative to the run.
        size: side of the rendered pictures in pixels, as in the data.
        split: split whose distribution is drawn from; ``train`` draws a pair that training does not show only where the
            caption names it.
    """

    clip: ClipSpec
    size: int = 32
    split: Split = "heldout"

    def load(self, root: Path, device: str = "cpu") -> "TruePosterior":
        """Load the CLIP."""
        return TruePosterior(self, self.clip.within(root).load().to(device))


class TruePosterior(Prior):
    """P(z_i | y) itself, on shapes."""

    reference = True
    spec: TruePosteriorSpec

    def __init__(self, spec: TruePosteriorSpec, clip: ClipEncoder) -> None:
        super().__init__(spec)
        self.clip = clip
        self.fingerprint = clip.fingerprint

    @torch.no_grad()
    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw one true embedding for each caption, (B, d) of unit norm.

        Raises:
            InputError: a caption states no attribute of a shape.
        """
        numbers = torch.empty(len(text.embed), dtype=torch.long)
        seeds = fill_like(numbers, lambda rows, stream: rows.random_(0, 2**62, generator=stream), generator)
        pictures = []
        for tokens, mask, seed in zip(text.tokens, text.mask, seeds.tolist(), strict=True):
            rng = np.random.default_rng(seed)
            stated = self._stated(tokens[mask].tolist())
            named = (stated.get("shape"), stated.get("color")) in HELD_OUT
            drawn = draw_open(stated, split="heldout" if named else self.spec.split, rng=rng)
            pictures.append(render([drawn], size=self.spec.size, rng=rng))
        images = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).div(127.5).sub(1)
        return F.normalize(self.clip.encode_image(images.to(text.embed.device)).float(), dim=-1)

    def _stated(self, tokens: list[int]) -> dict[str, str]:
        caption = self.clip.tokenizer.decode(tokens[1:-1])  # between CLIP's marks of start and end
        stated = parse(caption)
        if not stated:
            raise InputError(f"Expected captions of the built-in shapes. Got {caption!r}: leave this reference out.")
        return stated


def draw_open(stated: Mapping[str, str], *, split: Split, rng: np.random.Generator) -> Attributes:
    """Draw a picture's attributes given those that its caption states.

    A split draws (shape, colour) pairs uniformly, and the rest uniformly and independently.

    Args:
        stated: attributes by name, see :func:`unclip_pl.shapes.captions.parse`.
        split: split of the picture.
        rng: source of the draw.

    Raises:
        InputError: the split has no such picture.
    """
    wanted = stated.get("shape"), stated.get("color")
    possible = [pair for pair in pairs(split) if all(w in (None, v) for w, v in zip(wanted, pair, strict=True))]
    if not possible:
        raise InputError(f"No picture of split {split!r} is a {' '.join(map(str, wanted))}. Give another caption.")
    shape, color = possible[rng.integers(len(possible))]
    size, position, background = (
        stated.get(name) or VALUES[name][rng.integers(len(VALUES[name]))] for name in ("size", "position", "background")
    )
    return Attributes(shape, color, size, position, background)
