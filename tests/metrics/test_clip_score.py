import pytest
import torch

from unclip_pl.metrics.clip_score import CLIPScore, RetrievalRecall, clip_scores, retrieval_ranks


def test_scores_are_100_cosine_of_any_scale_and_sign() -> None:
    image = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    text = torch.tensor([[5.0, 0.0], [7.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_scores(image, text), torch.tensor([100.0, 0.0, -100.0]))


def test_metric_does_not_clamp_and_pools_processes() -> None:
    image, text = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    ranks = [CLIPScore(), CLIPScore()]
    ranks[0].update(image[:7], -image[:7])
    ranks[1].update(image[7:], text[7:])
    expected = clip_scores(image, torch.cat([-image[:7], text[7:]])).mean().item()
    ranks[0].merge_state(ranks[1])
    assert expected < 0
    assert ranks[0].compute().item() == pytest.approx(expected)


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
    metric = RetrievalRecall(k=200)
    metric.update(query, target)
    assert metric.compute().item() == pytest.approx(0.1, abs=0.02)


def test_recall_pools_processes() -> None:
    query = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    target = query + torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    whole, *ranks = (RetrievalRecall(k=3) for _ in range(3))
    whole.update(query, target)
    for rank, cut in zip(ranks, (slice(0, 11), slice(11, None)), strict=True):
        rank.update(query[cut], target[cut])
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute() == whole.compute()
    assert 0 < whole.compute() < 1


def test_recall_refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        RetrievalRecall(k=0)
