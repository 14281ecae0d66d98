import torch
from torch import Tensor

from unclip_pl.nn.space import EmbeddingSpace


class Wider(EmbeddingSpace):
    """Annotations of its own: an instance shows these only, and from Python 3.14 on none at all."""

    extra: Tensor


def test_a_subclass_has_every_buffer() -> None:
    assert set(EmbeddingSpace().state_dict()) == set(Wider().state_dict())
    assert "raw_mean" in Wider().state_dict()
    assert torch.equal(Wider().mean, torch.empty(0))
