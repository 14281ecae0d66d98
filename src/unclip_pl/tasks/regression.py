"""Training of the prior without noise: its loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.generation.priors import RegressionPriorSpec
from unclip_pl.parts.regression import RegressionPriorPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import PriorBatch


class RegressionPriorTask(RegressionPriorPart, EmbeddingTask):
    """Trains the prior without noise by L = E ‖g(y) − z_i‖² + λ·L_CLS (ECLIPSE, arXiv 2312.04655, eq. 3 to 5).

    L_CLS = −1/N Σ_i log(exp(⟨g(y_i), z_t,i⟩ / τ) / Σ_j exp(⟨g(y_i), z_t,j⟩ / τ)), with ⟨ , ⟩ the cosine: the answer is
    to lie nearer to its own caption than to the batch's others. The squared error is a mean over the dimensions of
    scaled embeddings, as in every loss here. Without L_CLS the optimum is the conditional mean E[z_i | y].
    """

    spec = RegressionPriorSpec
    batch_type = PriorBatch
    edges = ("net.out_proj",)

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean squared error, and the weighted contrastive loss beside it; nothing is drawn."""
        answer = self.answer(batch.text)
        loss = simple_loss(answer, self.space.scale(batch.image_embed)).mean()
        if self.weight:
            loss = loss + self.weight * self.contrast(self.space.unscale(answer), batch.text.embed)
        return loss

    def contrast(self, answer: Tensor, text_embed: Tensor) -> Tensor:
        """Return L_CLS of answers (B, d) among captions (B, d), in training among those of all processes."""
        captions, first = text_embed, 0
        if self.training and self._world_size > 1:  # captions have no gradient, so there is none to gather
            captions, first = self.gathered(text_embed), self._rank * len(text_embed)
        with torch.autocast(answer.device.type, enabled=False):  # over τ = 0.01, bfloat16 would be off by .2
            cosines = F.normalize(answer.float(), dim=-1) @ F.normalize(captions.float(), dim=-1).T
        own = torch.arange(len(answer), device=answer.device) + first
        return F.cross_entropy(cosines / self.temperature, own)
