"""A prior of one's own: what the linear prior answers, and noise about it. noisy_linear.yaml names it."""

from pathlib import Path
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion.process import noise_like
from unclip_pl.generation.priors import LinearPrior, Prior
from unclip_pl.streams import Streams
from unclip_pl.types import TextFeatures


class NoisyLinear(Prior):
    """The conditional mean by ridge regression, then as much isotropic noise as it takes not to be the mean.

    Args:
        checkpoint: made by ``unclip linear``, relative to the run.
        noise: its expected length, beside the answer's 1.
    """

    def __init__(self, checkpoint: str, noise: float = 0.5) -> None:
        self.linear = LinearPrior(checkpoint)
        self.noise = noise
        self.evaluations = 1

    def load(self, root: Path, device: str = "cpu") -> Self:
        """Read the regression, and what the report says of it."""
        self.linear.load(root, device)
        self.num_parameters, self.record = self.linear.num_parameters, self.linear.record
        self.fingerprint = self.linear.fingerprint  # a CLIP that it was not fitted on is refused
        return self

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """(B, d), unit norm. All noise comes from the generator: a comparison can be drawn again."""
        mean = self.linear.embed(text)
        noise = noise_like(mean, generator=generator) * self.noise / mean.shape[-1] ** 0.5
        return F.normalize(mean + noise, dim=-1)
