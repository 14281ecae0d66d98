"""Autoguidance (Karras et al. 2024): a weaker network that a network is led away from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from unclip_pl.diffusion.process import same_levels
from unclip_pl.errors import InputError
from unclip_pl.parts import DecoderPart, DiffusionPriorPart, UpsamplerPart, load_part

Diffused = TypeVar("Diffused", DiffusionPriorPart, DecoderPart, UpsamplerPart)


@dataclass(frozen=True)
class GuideSpec:
    """Names a weaker network of the same kind, such as a smaller one, or the same one after fewer steps.

    Args:
        checkpoint: file of its Task, relative to the run.
    """

    checkpoint: str

    def load(self, root: Path, device: str, guided: Diffused) -> Diffused:
        """Read the checkpoint, which is named relative to ``root``, onto a device.

        Args:
            root: folder that the checkpoint is named relative to.
            device: where to compute.
            guided: network that is led away from this one.

        Raises:
            InputError: the two were not trained on the same noise levels, embeddings or enlargement.
        """
        guide = load_part(root / self.checkpoint, type(guided)).to(device)
        self._check(guide, guided)
        return guide

    def _check(self, guide: Diffused, guided: Diffused) -> None:
        what, other = f"The guide {self.checkpoint}", "give a weaker network of the same kind and data"
        if not same_levels(guide.diffusion, guided.diffusion):
            raise InputError(f"{what} was trained on other noise levels than the network that it guides: {other}.")
        if isinstance(guide, UpsamplerPart) and isinstance(guided, UpsamplerPart):
            if guide.factor != guided.factor:
                raise InputError(f"{what} enlarges {guide.factor} times, and the other {guided.factor}: {other}.")
            return
        assert not isinstance(guide, UpsamplerPart)
        assert not isinstance(guided, UpsamplerPart)
        if guide.space.fingerprint != guided.space.fingerprint:
            raise InputError(
                f"{what} was trained on embeddings of CLIP {guide.space.fingerprint!r}, and the network that it guides "
                f"on those of {guided.space.fingerprint!r}: {other}."
            )
        probe = torch.ones(1, guided.space.embed_dim, device=guided.space.raw_mean.device)
        if not torch.allclose(guide.space.scale(probe), guided.space.scale(probe)):
            raise InputError(f"{what} was trained on embeddings of another scale: {other}.")
