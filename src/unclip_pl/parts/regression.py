"""A prior without noise: the network answers with one z_i for a caption (ECLIPSE, Patel et al. 2023)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion.loss import simple_loss
from unclip_pl.errors import InputError
from unclip_pl.nn.prior import PriorNetwork
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, Optimization
from unclip_pl.types import PriorBatch, TextFeatures

#: 0-based index of the last of the paper's 1,000 times, at which a diffusion prior sees noise alone.
LAST = 999.0


class RegressionPriorPart(EmbeddingPart):
    """A network that answers with z_i: L = E ‖g(y) − z_i‖² + λ·L_CLS (ECLIPSE, arXiv 2312.04655, eq. 3 to 5).

    L_CLS = −1/N Σ_i log(exp(⟨g(y_i), z_t,i⟩ / τ) / Σ_j exp(⟨g(y_i), z_t,j⟩ / τ)), with ⟨ , ⟩ the cosine: the answer is
    to lie nearer to its own caption than to the batch's others. The squared error is a mean over the dimensions of
    scaled embeddings, as in every loss here. Without L_CLS the optimum is the conditional mean E[z_i | y].

    The network is asked as a diffusion prior's is at its last time, with zeros in the place of the noise. ECLIPSE draws
    noise there, of which the optimum makes no use.

    Args:
        net: causal transformer, or an MLP.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_i, see :class:`~unclip_pl.nn.space.EmbeddingSpace`.
        contrastive: weight λ of L_CLS (ECLIPSE: 0.2); 0 leaves it out.
        temperature: τ of L_CLS. The paper gives none; 0.01 is where CLIP's ends.
        optimization: settings of AdamW.

    Raises:
        InputError: a negative weight, a temperature that is not positive, or L_CLS of z_i and z_t of different widths.
    """

    net: PriorNetwork

    def __init__(
        self,
        net: PriorNetwork,
        statistics: str = "",
        scaling: Scaling = "unit",
        contrastive: float = 0.0,
        temperature: float = 0.01,
        optimization: Optimization | None = None,
    ) -> None:
        if not (contrastive >= 0 and temperature > 0):
            raise InputError(
                f"Expected contrastive >= 0 and temperature > 0. Got {contrastive} and {temperature}: change them."
            )
        if contrastive and net.embed_dim != net.text_embed_dim:
            raise InputError(
                f"Expected z_i and z_t of one width for the contrastive loss. Got {net.embed_dim} and "
                f"{net.text_embed_dim}: set contrastive to 0."
            )
        super().__init__(statistics, scaling, 0.0, optimization, learned_null=None)
        self.net = net
        self.weight = contrastive
        self.temperature = temperature

    def loss(self, batch: PriorBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean squared error, and the weighted contrastive loss beside it; nothing is drawn."""
        answer = self.answer(batch.text)
        loss = simple_loss(answer, self.space.scale(batch.image_embed)).mean()
        if self.weight:
            loss = loss + self.weight * self.contrast(self.space.unscale(answer), batch.text.embed)
        return loss

    def answer(self, text: TextFeatures) -> Tensor:
        """Return one scaled z_i, (B, d), for each of B raw captions."""
        nothing = text.embed.new_zeros(len(text.embed), 1, self.net.embed_dim)
        index = text.embed.new_full(nothing.shape[:2], LAST)
        return self.net.predict(nothing, index, self.space.scale_text(text))[:, 0]

    def contrast(self, answer: Tensor, text_embed: Tensor) -> Tensor:
        """Return L_CLS of answers (B, d) among captions (B, d), in training among those of all processes."""
        captions, first = text_embed, 0
        if self.training and self._world_size > 1:  # captions have no gradient, so there is none to gather
            captions, first = self.gathered(text_embed), self._rank * len(text_embed)
        cosines = F.normalize(answer, dim=-1) @ F.normalize(captions, dim=-1).T
        own = torch.arange(len(answer), device=answer.device) + first
        return F.cross_entropy(cosines / self.temperature, own)
