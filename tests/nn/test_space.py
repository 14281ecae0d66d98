from pathlib import Path

import torch
from torch import Tensor

from unclip_pl.nn.space import EmbeddingSpace, Moments, write_statistics
from unclip_pl.types import TextFeatures


class Wider(EmbeddingSpace):
    """Annotations of its own: an instance shows these only, and from Python 3.14 on none at all."""

    extra: Tensor


def test_a_subclass_has_every_buffer() -> None:
    assert set(EmbeddingSpace().state_dict()) == set(Wider().state_dict())
    assert "raw_mean" in Wider().state_dict()
    assert torch.equal(Wider().mean, torch.empty(0))


def test_a_coordinate_that_never_changes_is_not_divided_by_zero(tmp_path: Path) -> None:
    embed = torch.randn(99, 4)
    embed[:, 2] = 0.25
    null = TextFeatures(torch.zeros(1, 0).long(), torch.zeros(1, 0, 0), torch.zeros(1, 0).bool(), torch.zeros(1, 4))
    path = tmp_path / "statistics.safetensors"
    write_statistics(path, moments=Moments.of(embed), null_text=null, fingerprint="")
    space = EmbeddingSpace(str(path), "standardize")
    assert space.scale(embed).isfinite().all()
    torch.testing.assert_close(space.unscale(space.scale(embed)), embed)
