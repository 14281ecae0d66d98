"""The rows of each batch: a deterministic function of (seed, epoch, rank, step)."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self, cast

import numpy as np
from torch.utils.data import DistributedSampler

from unclip_pl.errors import InputError

#: Rows of a block, neighbours in one shard.
BLOCK = 256


class RowBatch(NamedTuple):
    """Rows of one batch, and the number that is drawn for each of them this epoch."""

    rows: np.ndarray  # (B,) int64, into the store
    draws: np.ndarray  # (B,) uint64, picks a row's caption and its shift; zero in evaluation: first caption, no shift


def row_draws(rows: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Draw (B,) uniform uint64, fixed by (seed, epoch, row) and so the same in any batch, rank or worker."""
    epoch_key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _mix(rows.astype(np.uint64) + epoch_key)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the output function of SplitMix64 (Steele, Lea & Flood, 2014); uint64 arrays wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blocks(NamedTuple):
    """Runs of neighbouring rows, each short and inside one shard, which a disk reads at once."""

    first: np.ndarray  # (K,) int64, the first row of each
    stop: np.ndarray  # (K,) int64, one past its last

    @classmethod
    def of(cls, rows: np.ndarray, size: int = BLOCK) -> Self:
        """Cut ascending rows into blocks of at most ``size``, and where a row is left out."""
        ends = np.flatnonzero(np.diff(rows) != 1)
        return cls.between(rows[np.r_[0, ends + 1]], rows[np.r_[ends, -1]] + 1, size) if len(rows) else cls(rows, rows)

    @classmethod
    def between(cls, first: np.ndarray, stop: np.ndarray, size: int = BLOCK) -> Self:
        """Cut n runs of rows, given by (n,) ends, to blocks of at most ``size``."""
        counts = -(-(stop - first) // size)
        run = np.repeat(np.arange(len(counts)), counts)
        start = first[run] + size * _ramps(counts)
        return cls(start, np.minimum(start + size, stop[run]))

    @property
    def lengths(self) -> np.ndarray:
        """(K,) lengths of the blocks."""
        return self.stop - self.first

    def rows(self, which: np.ndarray) -> np.ndarray:
        """Return the rows of some blocks, block after block."""
        lengths = self.lengths[which]
        return np.repeat(self.first[which], lengths) + _ramps(lengths)


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """Return 0 … n - 1 for each n, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


class BlockShuffleSampler(DistributedSampler[RowBatch]):
    """Training batches: blocks of neighbouring rows in random order, rows shuffled inside a window of blocks.

    Every rank gets the same number of whole batches, however uneven the shards are. Rows at the end of an epoch's order
    that make no whole batch for every rank are left out; they are other rows in every epoch. Memory holds the blocks'
    ends and one window, never a number per row.

    It is a ``DistributedSampler`` by type, so that Lightning sets the epoch and does not replace it.

    Args:
        blocks: rows to draw from, see ``EmbeddingStore.blocks``.
        batch_size: rows of one rank's batch.
        seed: base seed of the order and of the draws.
        rank: number of this process, below ``world_size``.
        world_size: number of processes.
        epoch: epoch in which training goes on; Lightning's ``set_epoch`` moves on from there.
        start: batches of that epoch that are already trained; ``len`` counts them too.
        window: blocks that are shuffled together; a data set smaller than the window is shuffled as a whole.

    Raises:
        InputError: not even one batch for every rank.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start: int = 0,
        window: int = 64,
    ) -> None:
        rows = int(blocks.lengths.sum())
        if rows < batch_size * world_size:
            raise InputError(
                f"Expected at least batch_size × ranks = {batch_size} × {world_size} training images. Got {rows}: "
                "lower data.batch_size."
            )
        super().__init__(cast(Any, range(rows)), num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.blocks = blocks
        self.batch_size = batch_size
        self.window = window
        self.set_epoch(epoch)
        self._started = (epoch, start)

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[RowBatch]:
        # By epoch, not once: an iterator that nobody draws from must not use the start up.
        start = self._started[1] if self.epoch == self._started[0] else 0
        stride = self.batch_size * self.num_replicas
        windows = self.windows()
        held, offset = np.empty(0, np.int64), 0  # rows of the order from place ``offset`` on
        for step in range(start, len(self)):
            first = step * stride + self.rank * self.batch_size
            while offset + len(held) < first + self.batch_size:
                rest = held[max(0, first - offset) :]
                offset += len(held) - len(rest)
                held = np.concatenate([rest, next(windows)])
            rows = held[first - offset : first - offset + self.batch_size]
            yield RowBatch(rows, row_draws(rows, seed=self.seed, epoch=self.epoch))

    def windows(self) -> Iterator[np.ndarray]:
        """Yield this epoch's order over all ranks, every row once, window by window."""
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = rng.permutation(len(self.blocks.first))
        for first in range(0, len(blocks), self.window):
            yield rng.permutation(self.blocks.rows(blocks[first : first + self.window]))


class EvaluationSampler(DistributedSampler[RowBatch]):
    """Every row exactly once, in order, split over the ranks: the same number of batches each, of near-equal sizes.

    No row is left out, and none is drawn twice to fill a last batch, where it would count twice in a mean.

    Args:
        rows: (N,) row numbers.
        batch_size: largest batch; where it is 1, a rank with one row more than others has one batch of 2.
        rank: number of this process, below ``world_size``.
        world_size: number of processes.
        draws: (N,) numbers that pick a row's caption; None takes every first one.

    Raises:
        InputError: fewer rows than ranks, some of which would wait without end.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, *, rank: int = 0, world_size: int = 1, draws: np.ndarray | None = None
    ) -> None:
        if len(rows) < world_size:
            raise InputError(
                f"Expected at least one image for each of {world_size} processes. Got {len(rows)}: use fewer "
                "processes, or more images."
            )
        super().__init__(cast(Any, rows), num_replicas=world_size, rank=rank, shuffle=False)
        smallest, largest = len(rows) // world_size, -(-len(rows) // world_size)
        count = min(-(-largest // batch_size), smallest)
        draws = np.zeros(len(rows), np.uint64) if draws is None else draws
        mine = (np.array_split(np.array_split(part, world_size)[rank], count) for part in (rows, draws))
        self.batches = [RowBatch(*pair) for pair in zip(*mine, strict=True)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[RowBatch]:
        return iter(self.batches)
