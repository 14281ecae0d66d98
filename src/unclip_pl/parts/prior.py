"""The diffusion prior: z_i from a caption, by x0-prediction (§2.2 of the paper)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip_pl.diffusion import GaussianDiffusion
from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.nn.prior import PriorNetwork
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, NullText, Optimization
from unclip_pl.types import PriorBatch, TextFeatures


class Draws(NamedTuple):
    """Noised embeddings and the network's outputs, (B·K, d) each but t."""

    t: Tensor  # (B·K,)
    x0: Tensor
    x_t: Tensor
    F: Tensor  # the network's output
    target: Tensor  # of the regression of F


class DiffusionPriorPart(EmbeddingPart):
    """A :class:`~unclip_pl.nn.prior.PriorNetwork`: L = E ‖f(z_i^(t), t, y) − z_i‖² (§2.2).

    Args:
        net: causal transformer, or an MLP.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_i, see :class:`~unclip_pl.nn.space.EmbeddingSpace`.
        diffusion: forward process and parameterisation; None is the paper's: cosine, 1,000 steps, x0.
        text_drop: share of captions replaced by the empty one; z_i^(t) is never hidden.
        draws_per_caption: independent (t, noise) pairs attached to one encoded caption.
        optimization: settings of AdamW.
        null_text: condition in place of a dropped caption: CLIP's features of the ``empty`` one, or a ``learned``
            vector, which data without those features need.
    """

    net: PriorNetwork
    diffusion: GaussianDiffusion

    def __init__(
        self,
        net: PriorNetwork,
        statistics: str = "",
        scaling: Scaling = "unit",
        diffusion: GaussianDiffusion | None = None,
        text_drop: float = 0.1,
        draws_per_caption: int = 1,
        optimization: Optimization | None = None,
        null_text: NullText = "empty",
    ) -> None:
        learned = net.text_embed_dim if null_text == "learned" else 0
        super().__init__(statistics, scaling, text_drop, optimization, learned_null=learned)
        self.net = net
        self.diffusion = diffusion or GaussianDiffusion(prediction="x0")
        self.draws_per_caption = draws_per_caption

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean squared error over ``draws_per_caption`` times and noises of each caption."""
        text = self.drop_text(batch.text, generator)
        draws = self.denoise_batch(batch.image_embed, text, generator)
        return simple_loss(draws.F, draws.target).mean()

    def denoise_batch(self, image_embed: Tensor, text: TextFeatures, generator: torch.Generator | None = None) -> Draws:
        """Run the network at K = ``draws_per_caption`` times and noises of each of B embeddings.

        Args:
            image_embed: raw z_i, (B, d).
            text: scaled captions of the B embeddings.
            generator: source of times and noise; torch's global one when None.
        """
        draws = self.draws_per_caption
        z_i = self.space.scale(image_embed)[:, None].expand(-1, draws, -1)  # (B, K, d)
        t = self.share(lambda n: self.diffusion.draw_t(n, z_i.device, generator), len(z_i) * draws)
        x0 = z_i.flatten(0, 1)  # (B·K, d)
        eps = self.noise(x0, generator)
        x_t = self.diffusion.add_noise(x0, t, eps)
        noised, index = x_t.view_as(z_i), self.diffusion.index(t).view(-1, draws)
        F = self.net.predict(noised, index, text)
        return Draws(t, x0, x_t, F.flatten(0, 1), self.diffusion.target(x0, eps, t))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back ``posterior_mse``, which is stored beside the weights."""
        super().on_load_checkpoint(checkpoint)
        self.diffusion.posterior_mse = checkpoint.get("posterior_mse")
