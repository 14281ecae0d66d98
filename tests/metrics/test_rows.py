import torch

from unclip_pl.metrics import Rows


def test_rows_of_all_processes_stay_side_by_side() -> None:
    a, b = torch.randn(31, 4), torch.randn(31, 2, 4)
    ranks = [Rows("a", "b"), Rows("a", "b")]
    for rank, cut in zip(ranks, (slice(0, 20), slice(20, None)), strict=True):
        for first, second in zip(a[cut].split(8), b[cut].split(8), strict=True):
            rank.update(a=first, b=second)
    ranks[1].merge_state(ranks[0])
    found = ranks[1].compute()
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)
