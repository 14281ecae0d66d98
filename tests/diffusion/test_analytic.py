import pytest
import torch

from unclip_pl.diffusion.analytic import PosteriorMSE


def test_means_per_bucket_joined_by_lines() -> None:
    """A straight line in t is returned exactly between the outermost bucket centres, and held flat beyond."""
    t = torch.arange(1, 1001) / 1000
    errors = PosteriorMSE(1000, 50)
    errors.update(t, 3 * t)
    c_t = errors.compute()
    assert c_t.shape == (1000,)
    torch.testing.assert_close(c_t[10:990], 3 * t[10:990], rtol=1e-5, atol=0)
    torch.testing.assert_close(c_t[:10], c_t[9:10].expand(10), rtol=0.06, atol=0)


def test_batches_and_ranks_add_up() -> None:
    t, mse = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).clamp(min=1e-3).unbind()
    whole, first, second = PosteriorMSE(), PosteriorMSE(), PosteriorMSE()
    whole.update(t, mse)
    first.update(t[:20], mse[:20])
    second.update(t[20:].view(11, 4), mse[20:].view(11, 4))
    first.sums = first.sums + second.sums
    torch.testing.assert_close(first.compute(), whole.compute())


def test_unseen_times_are_interpolated() -> None:
    errors = PosteriorMSE(100, 10)
    errors.update(torch.tensor([0.01, 1.0]), torch.tensor([0.0, 99.0]))
    torch.testing.assert_close(errors.compute(), torch.arange(100.0))


def test_bound_and_reset() -> None:
    errors = PosteriorMSE(10, 10)
    errors.update(torch.tensor([0.5]), torch.tensor([4.0]))
    assert errors.compute(bound=0.289).tolist() == pytest.approx([0.289] * 10)
    errors.reset()
    with pytest.raises(ValueError, match="update"):
        errors.compute()


def test_buckets_are_checked() -> None:
    with pytest.raises(ValueError, match="buckets=11"):
        PosteriorMSE(10, 11)
