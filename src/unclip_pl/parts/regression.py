"""A prior without noise: the network answers with one z_i for a caption (ECLIPSE, Patel et al. 2023)."""

from torch import Tensor

from unclip_pl.errors import InputError
from unclip_pl.nn.prior import PriorNetwork
from unclip_pl.nn.space import Scaling
from unclip_pl.parts.base import EmbeddingPart, Optimization
from unclip_pl.types import TextFeatures

#: 0-based index of the last of the paper's 1,000 times, at which a diffusion prior sees noise alone.
LAST = 999.0


class RegressionPriorPart(EmbeddingPart):
    """A network that answers with one z_i.

    The network is asked as a diffusion prior's is at its last time, with zeros in the place of the noise. ECLIPSE draws
    noise there, of which the optimum makes no use.

    Args:
        net: causal transformer, or an MLP.
        statistics: file of the embedding store (linked from the data).
        scaling: scale of z_i, see :class:`~unclip_pl.nn.space.EmbeddingSpace`.
        contrastive: weight λ of L_CLS (ECLIPSE: 0.2); 0 leaves it out.
        temperature: τ of L_CLS. The paper gives none; 0.01 is where CLIP's ends.
        optimization: settings of the optimizer.

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

    def answer(self, text: TextFeatures) -> Tensor:
        """Return one scaled z_i, (B, d), for each of B raw captions."""
        nothing = text.embed.new_zeros(len(text.embed), 1, self.net.embed_dim)
        index = text.embed.new_full(nothing.shape[:2], LAST)
        return self.net.predict(nothing, index, self.space.scale_text(text))[:, 0]
