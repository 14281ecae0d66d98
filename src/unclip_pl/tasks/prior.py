"""Training of the diffusion prior: its loss, and its errors at each time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from unclip_pl.diffusion import PosteriorMSE
from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.parts.prior import DiffusionPriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch, TextFeatures


class Draws(NamedTuple):
    """Noised embeddings and the network's outputs, (B·K, d) each but t."""

    t: Tensor  # (B·K,)
    x0: Tensor
    x_t: Tensor
    F: Tensor  # the network's output
    target: Tensor  # of the regression of F


class DiffusionPriorTask(DiffusionPriorPart, EmbeddingTask):
    """Trains the diffusion prior by L = E ‖f(z_i^(t), t, y) − z_i‖² (§2.2), and measures its errors at each time.

    A diffusion that predicts eps, v or a velocity has that in the place of z_i.
    """

    spec = DiffusionPriorSpec
    batch_type = PriorBatch
    edges = ("net.out_proj",)

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

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of older weights."""
        self._errors = PosteriorMSE(self.diffusion.steps)
        self._quarters = torch.zeros(2, 4)  # sum and number of the errors in each quarter of t

    def validation_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Log the loss with every caption kept, over the whole epoch also by quarter of t.

        A prior that is good near t = 0 alone has learned nothing of the caption.
        """
        text = self.space.scale_text(batch.text)
        t, x0, x_t, F, target = self.denoise_batch(batch.image_embed, text, self._fixed_noise(batch_idx))
        self._errors.update(t, simple_loss(self.diffusion.to_x0(F, x_t, t), x0))
        errors = simple_loss(F, target)
        self.log("val/loss", errors.mean(), prog_bar=True, batch_size=len(errors), sync_dist=True)
        quarter = one_hot((t * 4).ceil().long() - 1, 4).T.to(errors)  # (4, B·K)
        self._quarters = self._quarters.to(errors) + torch.stack([quarter @ errors, quarter.sum(1)])

    def on_validation_epoch_end(self) -> None:
        """Log the quarters, and keep what a sampler's analytic variance needs (Analytic-DPM, Bao et al. 2022)."""
        if self.trainer.sanity_checking:
            return
        reduce = self.trainer.strategy.reduce
        for q, (total, count) in enumerate(reduce(self._quarters, reduce_op="sum").T):
            if count > 0:
                self.log(f"val/loss_t{q / 4:.2f}-{(q + 1) / 4:.2f}", total / count, sync_dist=True)
        self._errors.sums = reduce(self._errors.sums, reduce_op="sum")
        self.diffusion.posterior_mse = self._errors.compute(bound=self._variance())

    def _variance(self) -> float | None:
        """Return the data's variance per dimension, which no posterior exceeds; None if the scaling is not ``unit``."""
        if self.space.scaling != "unit":
            return None
        return self.space.unit_scale**2 * (1 - self.space.mean.square().sum().item()) / self.space.embed_dim

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store ``posterior_mse`` beside the weights: as a buffer, EMA would put an older one back."""
        super().on_save_checkpoint(checkpoint)
        if self.diffusion.posterior_mse is not None:
            checkpoint["posterior_mse"] = self.diffusion.posterior_mse
