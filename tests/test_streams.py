"""A row with a stream of its own draws the same beside any other rows."""

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import Ancestral, Denoised, GaussianDiffusion
from unclip_pl.diffusion.process import noise_like
from unclip_pl.nn.ar_prior import draw
from unclip_pl.streams import Streams


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def denoise(x_t: Tensor, t: Tensor) -> Denoised:
    return Denoised(torch.sin(x_t))


def normal(rows: int, streams: Streams) -> Tensor:
    return noise_like(torch.empty(rows, 3, 5), generator=streams)


def sampled(rows: int, streams: Streams) -> Tensor:
    return Ancestral(4).sample(denoise, normal(rows, streams), GaussianDiffusion(), generator=streams)


def codes(rows: int, streams: Streams) -> Tensor:
    return draw(torch.full((rows, 40, 100), 0.01), generator=streams)


@pytest.mark.parametrize("make", [normal, sampled, codes])
def test_a_row_draws_the_same_in_any_batch(make: object) -> None:
    assert callable(make)
    whole = make(4, seeds(1, 2, 3, 4))
    assert torch.equal(make(2, seeds(4, 2)), whole[[3, 1]])
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(make(4, seeds(1, 2))[:2], make(2, seeds(1)))  # two draws a row, side by side


def test_one_stream_is_torchs_own() -> None:
    x = torch.empty(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    (a,), (b,) = seeds(5), seeds(5)
    assert torch.equal(noise_like(x, generator=a), torch.randn(3, 4, 8, 8, generator=b))
    torch.manual_seed(6)
    drawn = noise_like(x)
    torch.manual_seed(6)
    assert torch.equal(drawn, torch.randn(3, 4, 8, 8))


def test_streams_that_do_not_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="Got 2 for 3 rows"):
        normal(3, seeds(1, 2))
