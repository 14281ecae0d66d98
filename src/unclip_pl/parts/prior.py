"""The diffusion prior: z_i from a caption, by x0-prediction (§2.2 of the paper)."""

from typing import Any

from unclip_pl.diffusion import GaussianDiffusion
from unclip_pl.nn.prior import PriorNetwork
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, NullText, Optimization


class DiffusionPriorPart(EmbeddingPart):
    """A :class:`~unclip_pl.nn.prior.PriorNetwork` that estimates z_i from z_i^(t), t and the caption.

    Args:
        net: causal transformer, or an MLP.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_i, see :class:`~unclip_pl.nn.space.EmbeddingSpace`.
        diffusion: forward process and parameterisation; None is the paper's: cosine, 1,000 steps, x0.
        text_drop: share of captions replaced by the empty one; z_i^(t) is never hidden.
        draws_per_caption: independent (t, noise) pairs attached to one encoded caption.
        optimization: settings of the optimizer.
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back ``posterior_mse``, which is stored beside the weights."""
        super().on_load_checkpoint(checkpoint)
        self.diffusion.posterior_mse = checkpoint.get("posterior_mse")
