"""An autoregressive prior without a quantiser: a mixture of Gaussians a coordinate (GIVT, Tschannen et al. 2023)."""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.nn.ar_prior import FourierCodeEmbedding, SequencePrior, check_draws, draw, guided_probability
from unclip_pl.nn.kernels import recorded
from unclip_pl.nn.layers import zeroed
from unclip_pl.streams import Streams, fill_like
from unclip_pl.types import TextFeatures

#: Least standard deviation of a component; data have 1. A likelihood without a bound would be fitted to single points.
FLOOR = 0.01
#: Points at which a density is drawn from that is no mixture, and how many standard deviations they go out.
POINTS, REACH = 1024, 5.0
#: Guidance above 1 is not followed where the log-density with the caption lies further than this below its peak.
TAIL = 12.0


class Mixture(NamedTuple):
    """Mixtures of k Gaussians, one for each number."""

    logits: Tensor  # (…, k)
    mean: Tensor  # (…, k)
    std: Tensor  # (…, k)

    @classmethod
    def of(cls, outputs: Tensor) -> Self:
        """Read a network's outputs (…, 3k); in float32 at least."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        logits, mean, spread = outputs.chunk(3, dim=-1)
        return cls(logits, mean, FLOOR + F.softplus(spread))

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the log-density (…) at numbers (…)."""
        off = (y[..., None] - self.mean) / self.std
        each = self.logits.log_softmax(-1) - 0.5 * off.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return each.logsumexp(-1)

    def sample(self, *, generator: Streams | None = None) -> Tensor:
        """Draw one number from each mixture, (…): a component, then from it."""
        chosen = draw(self.logits.softmax(-1), generator=generator)[..., None]
        mean, std = (x.gather(-1, chosen)[..., 0] for x in (self.mean, self.std))
        return mean + std * fill_like(mean, lambda rows, stream: rows.normal_(generator=stream), generator)


def sample(mixture: Mixture, guidance: float, temperature: float, *, generator: Streams | None = None) -> Tensor:
    """Draw (rows,) numbers from p ∝ (u · (c / u)^g)^(1/T), with c and u the densities with and without the caption.

    This is what guidance g and temperature T do to the logits of an AR prior's buckets. Where both are 1 it is c, and
    exact. Else the density is no mixture. In one dimension it is drawn from at 1,024 even points, 5 standard deviations
    beyond all components, and evenly around the point that is drawn. With guidance above 1, points are left out where c
    is less than e^-12 of its peak: where u falls faster than c, the density would grow without end there.

    Args:
        mixture: mixtures (rows, k); with guidance (2·rows, k), the second half without the caption.
        guidance: scale g; 1 is off, 0 ignores the caption.
        temperature: T; below 1 samples are surer and less diverse.
        generator: source of the draws.
    """
    if guidance == 1 and temperature == 1:
        return mixture.sample(generator=generator)
    halves = 1 if guidance == 1 else 2
    low = (mixture.mean - REACH * mixture.std).amin(-1).view(halves, -1).amin(0)  # (rows,)
    step = ((mixture.mean + REACH * mixture.std).amax(-1).view(halves, -1).amax(0) - low) / POINTS
    place = torch.arange(POINTS, device=low.device) + 0.5
    points = (low[:, None] + step[:, None] * place).repeat(halves, 1)  # (rows or 2·rows, POINTS)
    wide = Mixture(*(part[:, None] for part in mixture))
    log_density = wide.log_prob(points)
    if guidance > 1:
        given, free = log_density.chunk(2)
        far = given < given.amax(-1, keepdim=True) - TAIL
        log_density = torch.cat([given.masked_fill(far, float("-inf")), free])
    chosen = draw(guided_probability(log_density, guidance, temperature), generator=generator)
    return low + step * (chosen + fill_like(low, lambda rows, stream: rows.uniform_(generator=stream), generator))


class MixturePriorTransformer(SequencePrior):
    """Causal transformer over [text states …, z_t, y_0 … y_{n−2}], whose outputs are mixtures of the next coordinate.

    y are an embedding's principal coordinates at unit variance, of an :class:`~unclip_pl.nn.codec.EmbeddingCodec`
    without its buckets. p(y | caption) = Π_j Σ_k w_jk N(y_j; μ_jk, σ_jk²) is a density, and exact (GIVT, arXiv
    2312.02116, whose tokens are vectors). y_0 is said at z_t: there is no dot-product token. Numbers enter as Fourier
    features. A fresh network says a mixture of mean 0 and variance 1 for every coordinate, as the data have.

    Args:
        embed_dim: d, the width of CLIP's embeddings.
        text_width: W, the width of CLIP's text tower.
        context_length: number of tokens of the longest text.
        code_length: n, the number of coordinates.
        components: k, the number of Gaussians of a coordinate (GIVT: 16).
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads.
        text_states: read the caption's token states; false leaves z_t alone.
        text_embed_dim: width of z_t; 0 is ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        code_length: int,
        components: int = 16,
        width: int = 1664,
        layers: int = 24,
        heads: int = 26,
        text_states: bool = True,
        text_embed_dim: int = 0,
    ) -> None:
        sizes = (embed_dim, text_width, context_length, code_length - 1, width, layers, heads)
        super().__init__(*sizes, text_states=text_states, text_embed_dim=text_embed_dim)
        self.code_length = code_length
        self.code_embedding = FourierCodeEmbedding(width, code_length, 0)
        self.head = zeroed(nn.Linear(width, 3 * components))
        rank = (torch.arange(components, dtype=torch.float64) + 0.5) / components
        mean = 0.9 * torch.special.ndtri(rank)  # apart: alike, they would learn alike
        spread = ((1 - mean.square().mean()).sqrt() - FLOOR).expm1().log().expand(components)
        with torch.no_grad():
            self.head.bias.copy_(torch.cat([torch.zeros(components), mean, spread]))

    def forward(self, text: TextFeatures, y: Tensor) -> Mixture:
        """Return the mixtures (B, n, k) of every coordinate given the true ones before it.

        Args:
            text: features of B captions, z_t scaled.
            y: (B, n) coordinates at unit variance.
        """
        return Mixture.of(self.say(self.outputs(text, self.code_embedding.of(y[:, :-1]))))

    def say(self, hidden: Tensor) -> Tensor:
        """Return the outputs (…, 3k) for ``Mixture.of``; not in bfloat16, whose means are off by half a percent."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))

    @torch.no_grad()
    def generate(
        self,
        text: TextFeatures,
        *,
        unconditional: TextFeatures | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        candidates: int = 1,
        generator: Streams | None = None,
    ) -> Tensor:
        """Draw coordinates (B, candidates, n) for B captions, one after another with cached keys and values.

        Args:
            text: features of B captions, z_t scaled.
            unconditional: features of the empty caption, batch size 1 or B; needed unless ``guidance`` is 1.
            guidance: scale of the log-density, see :func:`sample`; 1 is off, 0 ignores the caption.
            temperature: divisor of the log-density.
            candidates: number of draws per caption, which share its prefix.
            generator: source of the draws; one for each caption if they must not depend on the other captions.

        Raises:
            InputError: guidance without an unconditional caption, or a number outside its range.
        """
        check_draws(temperature, 0.0, candidates)
        if guidance != 1 and unconditional is None:
            raise InputError(f"Expected unconditional, the empty caption, for guidance {guidance}. Got None: give it.")
        hidden, prefix = self.encode_prefix(text)  # (B, width)
        if guidance != 1 and unconditional is not None:
            hidden, prefix = self.with_null(hidden, prefix, unconditional)  # (2B, width)
        filled, branches = prefix.mask.shape[1], 1 if guidance == 1 else 2
        cache = prefix.repeat(candidates).pad(filled + self.code_length - 1)

        def after(y: Tensor, before: Tensor) -> Tensor:
            """Return the outputs behind coordinates y (B·candidates, 1), whose place is ``before`` (1,)."""
            token = self.code_embedding.of(y).repeat(branches, 1, 1)
            return self.say(self.step(token, cache, filled + before, before))[:, 0]

        outputs = self.say(hidden.repeat_interleave(candidates, dim=0))  # (B·candidates, 3k), or twice as many
        step = recorded(after, outputs.device)
        drawn: list[Tensor] = []
        for place in range(self.code_length):
            if drawn:
                outputs = step(drawn[-1], torch.tensor([place - 1], device=outputs.device))
            drawn.append(sample(Mixture.of(outputs), guidance, temperature, generator=generator)[:, None])
        return torch.cat(drawn, dim=1).unflatten(0, (-1, candidates))
