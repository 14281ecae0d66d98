"""A prior of your own: the linear prior's answer with noise. noisy_linear.yaml names it."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion.process import noise_like
from unclip_pl.generation.priors import LinearPrior, LinearPriorSpec, Prior, PriorSpec
from unclip_pl.streams import Streams
from unclip_pl.types import TextFeatures


@dataclass(frozen=True)
class NoisyLinearSpec(PriorSpec):
    """The settings, as configs name them. Nothing is read until ``load``.

    Args:
        checkpoint: file of ``unclip linear``, relative to the run.
        noise: expected length of the noise; the answer itself has length 1.
    """

    checkpoint: str
    noise: float = 0.5

    def load(self, root: Path, device: str = "cpu") -> "NoisyLinear":
        """Read the regression."""
        return NoisyLinear(self, LinearPriorSpec(self.checkpoint).load(root, device))


class NoisyLinear(Prior):
    """The conditional mean by ridge regression, and enough isotropic noise that samples of a caption differ.

    Args:
        spec: settings that it was loaded from.
        linear: the regression.
    """

    spec: NoisyLinearSpec

    def __init__(self, spec: NoisyLinearSpec, linear: LinearPrior) -> None:
        super().__init__(spec)
        self.linear = linear
        self.num_parameters, self.record = linear.num_parameters, linear.record  # for the report
        self.fingerprint = linear.fingerprint  # a CLIP that it was not fitted on is refused

    @property
    def evaluations(self) -> int:
        """One product with the matrix."""
        return 1

    def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
        """Draw (B, d) embeddings of unit norm. All noise comes from the generator, so that it can be drawn again."""
        mean = self.linear.embed(text)
        noise = noise_like(mean, generator=generator) * self.spec.noise / mean.shape[-1] ** 0.5
        return F.normalize(mean + noise, dim=-1)
