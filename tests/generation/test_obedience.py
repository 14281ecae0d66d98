"""How far an AR prior follows its dot-product token."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.generation.priors import ARPrior, ARPriorSpec
from unclip_pl.streams import Streams
from unclip_pl.types import TextFeatures


def captions(n: int) -> TextFeatures:
    embed = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return TextFeatures(torch.zeros(n, 1).long(), torch.zeros(n, 1, 2), torch.ones(n, 1).bool(), embed)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_prior_that_follows_its_dot_token_is_obedient(share: float) -> None:
    """A stand-in whose samples go the given share of the way to what the token asks for."""

    class Following(ARPrior):
        def __init__(self) -> None:
            self.spec = ARPriorSpec("", candidates=3)
            codec = SimpleNamespace(dot_edges=torch.linspace(-0.6, 0.8, 15)[None])
            part = SimpleNamespace(net=SimpleNamespace(dot_head=torch.nn.Linear(2, 16)))
            vars(self).update(codec=codec, part=part)  # stand-ins, with what obedience asks for

        def embed(self, text: TextFeatures, *, generator: Streams | None = None) -> Tensor:
            assert self.spec.candidates == 1
            asked = -0.6 + 0.1 * (self.part.net.dot_head(torch.zeros(2)).argmax() - 0.5)
            z_t = F.normalize(text.embed, dim=-1)
            other = torch.randn(z_t.shape, generator=generator)  # type: ignore[arg-type]
            across = F.normalize(other - (other * z_t).sum(-1, keepdim=True) * z_t, dim=-1)
            cosine = 0.1 + share * asked
            return cosine * z_t + (1 - cosine**2).sqrt() * across

    prior = Following()
    found = prior.obedience(captions(6), generator=torch.Generator().manual_seed(1))  # not what drew the captions
    assert found is not None
    torch.testing.assert_close(found, torch.full((6,), share), atol=1e-4, rtol=0)
    assert not prior.part.net.dot_head._forward_hooks
    prior.codec.dot_edges = torch.zeros(1, 0)  # no token
    assert prior.obedience(captions(6)) is None
