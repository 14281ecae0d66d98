import numpy as np
import pytest

from unclip_pl.data.sampler import Blocks, BlockShuffleSampler, EvaluationSampler, row_draws


def order_of(sampler: BlockShuffleSampler) -> np.ndarray:
    """Return an epoch's whole order."""
    return np.concatenate(list(sampler.windows()))


def blocks(rows: int, size: int = 7) -> Blocks:
    return Blocks.of(np.arange(rows), size)


def rows_of(sampler: BlockShuffleSampler | EvaluationSampler) -> list[list[int]]:
    return [batch.rows.tolist() for batch in sampler]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("window", [2, 64])
def test_ranks_share_an_epoch_in_equal_batches(world_size: int, window: int) -> None:
    samplers = [
        BlockShuffleSampler(blocks(103), 4, rank=rank, world_size=world_size, window=window)
        for rank in range(world_size)
    ]
    drawn = [rows_of(sampler) for sampler in samplers]
    steps = 103 // (4 * world_size)
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in drawn] == [steps] * world_size
    rows = [row for batches in drawn for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == steps * 4 * world_size


def test_blocks_are_runs_of_neighbours() -> None:
    rows = np.array([0, 1, 2, 3, 4, 7, 8, 20])
    found = Blocks.of(rows, 3)
    assert list(zip(found.first.tolist(), found.stop.tolist(), strict=True)) == [(0, 3), (3, 5), (7, 9), (20, 21)]
    assert found.rows(np.arange(4)).tolist() == rows.tolist()
    assert found.rows(np.array([2, 0])).tolist() == [7, 8, 0, 1, 2]
    empty = Blocks.of(np.empty(0, np.int64))
    assert len(empty.first) == len(empty.rows(np.arange(0))) == 0
    runs = Blocks.between(np.array([5, 9, 10]), np.array([9, 9, 11]), 3)  # the second is empty
    assert list(zip(runs.first.tolist(), runs.stop.tolist(), strict=True)) == [(5, 8), (8, 9), (10, 11)]


def test_the_order_is_what_it_always_was() -> None:
    """Shuffled blocks, then each window of them shuffled, from one stream: written out once, in the plainest way."""
    rng = np.random.default_rng([3, 2])
    pieces = [np.arange(start, min(start + 7, 150)) for start in range(0, 150, 7)]
    drawn = [pieces[b] for b in rng.permutation(len(pieces))]
    plain = [rng.permutation(np.concatenate(drawn[first : first + 4])) for first in range(0, len(drawn), 4)]
    sampler = BlockShuffleSampler(blocks(150), 5, seed=3, window=4)
    sampler.set_epoch(2)
    assert np.array_equal(order_of(sampler), np.concatenate(plain))
    assert np.array_equal(np.concatenate([batch.rows for batch in sampler]), np.concatenate(plain))


def test_two_ranks_see_what_one_sees() -> None:
    one = BlockShuffleSampler(blocks(64), 8)
    two = [BlockShuffleSampler(blocks(64), 4, rank=rank, world_size=2) for rank in range(2)]
    together = [a + b for a, b in zip(rows_of(two[0]), rows_of(two[1]), strict=True)]
    assert together == rows_of(one)


def test_order_is_fixed_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BlockShuffleSampler(blocks(50), 5, seed=seed)
        sampler.set_epoch(epoch)
        assert sorted(order_of(sampler)) == list(range(50))
        return order_of(sampler).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_blocks_stay_together_inside_a_window() -> None:
    order = order_of(BlockShuffleSampler(blocks(70), 7, window=1)).reshape(10, 7)
    assert all(len({row // 7 for row in block}) == 1 for block in order.tolist())


def test_starting_late_continues_the_epoch_and_only_that() -> None:
    sampler = BlockShuffleSampler(blocks(50), 5)
    whole = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        whole.append(rows_of(sampler))
    late = BlockShuffleSampler(blocks(50), 5, epoch=1, start=4)
    iter(late)
    assert rows_of(late) == whole[1][4:]
    assert len(late) == len(whole[1])
    late.set_epoch(2)
    assert rows_of(late) == whole[2]


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"4 × 2 training images\. Got 7"):
        BlockShuffleSampler(blocks(7), 4, world_size=2)


def test_draws_depend_on_seed_epoch_and_row_alone() -> None:
    rows = np.arange(4000)
    draws = row_draws(rows, seed=1, epoch=2)
    assert np.array_equal(draws[100:200], row_draws(rows[100:200], seed=1, epoch=2))
    assert np.array_equal(draws[::-1], row_draws(rows[::-1], seed=1, epoch=2))
    for other in (row_draws(rows, seed=2, epoch=2), row_draws(rows, seed=1, epoch=3), row_draws(rows, seed=2, epoch=1)):
        assert not np.isin(other, draws).any()
    counts = np.bincount((draws % np.uint64(5)).astype(int), minlength=5)
    assert counts == pytest.approx(np.full(5, 800), abs=120)


@pytest.mark.parametrize("rows", [4, 5, 12, 13, 31])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_sees_every_row_once_in_order(rows: int, world_size: int, batch_size: int) -> None:
    samplers = [
        EvaluationSampler(np.arange(rows) + 5, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    drawn = [rows_of(sampler) for sampler in samplers]
    assert [row for batches in drawn for batch in batches for row in batch] == list(range(5, rows + 5))
    assert all(1 <= len(batch) <= max(batch_size, 2) for batches in drawn for batch in batches)
    counts = [len(batches) for batches in drawn]
    assert [len(sampler) for sampler in samplers] == counts
    assert len(set(counts)) == 1  # or one rank would wait for another


def test_fewer_rows_than_ranks_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ValueError, match=r"each of 3 processes\. Got 2"):
        EvaluationSampler(np.arange(2), 8, world_size=3)
