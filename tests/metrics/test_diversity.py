import pytest
import torch

from unclip_pl.metrics.diversity import (
    diversity_gap,
    expected_total_variation,
    intra_caption_cosine,
    total_variation,
    vendi,
)


def test_vendi_counts_what_is_distinct() -> None:
    equal, orthogonal = torch.ones(8, 10), torch.eye(8, 10)
    assert vendi(equal).item() == pytest.approx(1)
    assert vendi(3 * orthogonal).item() == pytest.approx(8)
    assert vendi(torch.eye(4).repeat(5, 1)).item() == pytest.approx(4)  # n > d: through the d × d matrix
    torch.testing.assert_close(vendi(torch.stack([equal, orthogonal])), torch.tensor([1.0, 8.0]).double())


def test_vendi_of_two_at_an_angle_is_the_closed_form() -> None:
    """Eigenvalues (1 ± cos) / 2."""
    cosine = torch.tensor(0.3).double()
    pair = torch.stack([torch.tensor([1.0, 0.0]), torch.stack([cosine, (1 - cosine**2).sqrt()])])
    half = torch.stack([(1 + cosine) / 2, (1 - cosine) / 2])
    torch.testing.assert_close(vendi(pair), (-(half * half.log()).sum()).exp(), atol=1e-6, rtol=0)


def test_vendi_is_one_number_through_either_matrix() -> None:
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([features, torch.zeros(20, 30)], dim=1)  # n < d
    assert vendi(wide).item() == pytest.approx(vendi(features).item())


def test_intra_caption_cosine_is_the_mean_over_pairs() -> None:
    samples = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    pairs = torch.combinations(torch.arange(4))
    expected = torch.cosine_similarity(samples[:, pairs[:, 0]], samples[:, pairs[:, 1]], dim=-1).mean(1)
    torch.testing.assert_close(intra_caption_cosine(samples), expected)
    torch.testing.assert_close(intra_caption_cosine(torch.eye(5)[None]), torch.zeros(1))
    with pytest.raises(ValueError, match="at least 2"):
        intra_caption_cosine(samples[:, :1])


def test_total_variation_is_zero_to_itself_and_one_between_strangers() -> None:
    counts = torch.tensor([[4, 4, 0], [0, 0, 16]])
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert total_variation(counts, p).tolist() == [0, 0]
    assert total_variation(counts, p.flip(0)).tolist() == [1, 1]
    assert total_variation(counts, torch.tensor([0.25, 0.5, 0.25])).tolist() == [0.25, 0.75]


def test_expected_total_variation_equals_enumeration_and_simulation() -> None:
    fair = torch.tensor([0.5, 0.5])
    # two draws: (2,0) and (0,2) with 1/4 each are 1/2 away, (1,1) is 0 away
    assert expected_total_variation(fair, torch.tensor(2)).item() == pytest.approx(0.25)
    assert expected_total_variation(torch.tensor([1.0, 0.0]), torch.tensor(16)).item() == 0
    p = torch.tensor([0.25, 0.25, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(p.expand(20000, -1), 16, replacement=True, generator=generator)
    counts = torch.nn.functional.one_hot(draws, 5).sum(1)
    simulated = total_variation(counts, p).mean().item()
    assert expected_total_variation(p, torch.tensor(16)).item() == pytest.approx(simulated, abs=2e-3)


def test_diversity_gap_is_zero_for_true_draws_and_large_for_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    conditional = torch.rand(2000, 5, generator=generator)
    conditional /= conditional.sum(1, keepdim=True)
    draws = torch.multinomial(conditional, 16, replacement=True, generator=generator)
    true = torch.nn.functional.one_hot(draws, 5).sum(1)
    collapsed = 16 * torch.nn.functional.one_hot(draws[:, 0], 5)
    assert diversity_gap(true, conditional).mean().item() == pytest.approx(0, abs=0.006)
    assert diversity_gap(collapsed, conditional).mean() > 0.4


def test_diversity_gap_of_another_number_of_draws_is_still_centred() -> None:
    """Images whose attribute could not be read leave fewer draws."""
    generator = torch.Generator().manual_seed(0)
    conditional = torch.full((4000, 4), 0.25)
    draws = torch.multinomial(conditional, 16, replacement=True, generator=generator)
    unread = torch.rand(draws.shape, generator=generator) < 0.3
    counts = (torch.nn.functional.one_hot(draws, 4) * ~unread[..., None]).sum(1)
    assert diversity_gap(counts, conditional).mean().item() == pytest.approx(0, abs=0.006)
    assert diversity_gap(torch.zeros(1, 4), conditional[:1]).isnan().all()
