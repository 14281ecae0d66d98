import pytest
import torch

from unclip_pl.metrics.clip_score import clip_scores, retrieval_ranks, retrieval_recall


def test_scores_are_100_cosine_of_any_scale_and_sign() -> None:
    image = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    text = torch.tensor([[5.0, 0.0], [7.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_scores(image, text), torch.tensor([100.0, 0.0, -100.0]))


def test_true_pairs_are_found_and_swapped_ones_come_second() -> None:
    target = torch.eye(4) + 0.1 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert retrieval_ranks(2 * target, target).tolist() == [0, 0, 0, 0]
    mixed = target + 0.5 * target[[1, 0, 3, 2]]
    assert retrieval_ranks(mixed[[1, 0, 2, 3]], target).tolist() == [1, 1, 0, 0]


def test_ranks_equal_a_sort() -> None:
    query, target = torch.randn(2, 1500, 8, generator=torch.Generator().manual_seed(0))  # more rows than one chunk
    unit = torch.nn.functional.normalize(target, dim=-1)
    order = (query @ unit.mT).argsort(dim=1, descending=True)
    expected = (order == torch.arange(1500)[:, None]).int().argmax(1)
    # float32 in the reference may swap neighbours
    assert (retrieval_ranks(query, target) - expected).abs().max() <= 1


def test_ties_count_against() -> None:
    query = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    collapsed = torch.randn(64, generator=torch.Generator().manual_seed(1)).expand(10, 64)
    assert retrieval_ranks(query, collapsed).tolist() == [9] * 10
    almost = collapsed + 1e-8 * query  # the same image, encoded in another batch
    assert retrieval_ranks(query, almost).tolist() == [9] * 10


def test_random_embeddings_are_recalled_k_times_in_n() -> None:
    query, target = torch.randn(2, 2000, 16, generator=torch.Generator().manual_seed(0))
    assert retrieval_recall(query, target, 200).item() == pytest.approx(0.1, abs=0.02)
