"""Images out of shards that are read from end to end, for stores that are too slow for ranged reads.

webdataset reads the tars and shuffles the samples. Embeddings and captions come from the embedding store, by key.
"""

import logging
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, get_worker_info

from unclip_pl.data.sampler import RowBatch, row_draws
from unclip_pl.data.shards import IMAGE_SUFFIXES, Shard, Split, parse_json, split_name
from unclip_pl.data.store import EmbeddingStore, unpack_texts
from unclip_pl.data.transforms import BadSample, load_square
from unclip_pl.errors import InputError

log = logging.getLogger(__name__)


class Streamed(NamedTuple):
    """A sample as it comes out of a tar."""

    row: int  # of the store
    file: bytes  # of the image
    json: bytes


class Arrived(NamedTuple):
    """A sample that is ready for a batch."""

    image: Tensor  # (3, H, H) uint8
    json: bytes


class StreamedStore(EmbeddingStore):
    """An embedding store whose images arrive in a stream: no part of a shard is asked for.

    Args:
        path: folder that ``unclip precompute`` wrote.
        source: shards that it was made of, see ``list_shards``.
        image_size: side of the images in batches that have some.
        image_memory: always 0 here, since images that stream by are not kept; workers pass it on.

    Raises:
        MissingFileError: no store or no shards there.
        InputError: the store does not cover the source, mixes CLIPs, or a file of it is damaged.
    """

    def __init__(self, path: str | Path, source: str, *, image_size: int, image_memory: int = 0) -> None:
        super().__init__(path, source, image_size=image_size, image_memory=image_memory)
        self.arrived: dict[int, Arrived] = {}  # by row: the samples of the batch that is made next
        self.skipped: Counter[str] = Counter()  # samples by reason
        self._told: set[tuple[int, str]] = set()

    def _decode(self, batch: RowBatch) -> Tensor:
        return torch.stack([self.arrived[row].image for row in batch.rows.tolist()])

    def metadata(self, batch: RowBatch) -> list[dict[str, Any]]:
        """Return the JSON object of each row, empty where it has none."""
        return [parse_json(self.arrived[row].json) for row in batch.rows.tolist()]

    def shards_of(self, split: Split) -> list[int]:
        """Return the shards that hold images of a split."""
        return np.flatnonzero(self.counts[:, split]).tolist()

    def span(self, shard: int, split: Split | None = None) -> range:
        """Return the rows of a shard, or those of one split in it."""
        first = int(self.starts[shard] + (self.counts[shard, :split].sum() if split else 0))
        return range(first, first + int(self.counts[shard].sum() if split is None else self.counts[shard, split]))

    def samples(self, shard: int, rows: range) -> Iterator[Streamed]:
        """Yield a shard's samples of some rows, in the order of the tar.

        Those without an embedding, and embeddings whose samples do not come, are counted and named.

        Raises:
            InputError: the shard is not the one that was embedded, or cannot be read.
        """
        tar, features = self.shards[shard], self.features(shard)
        if not self.records[shard].describes(tar, self.path / self.records[shard].file):
            raise InputError(f"{tar} is not the file that was embedded in {self.path}: run `unclip precompute` again.")
        keys = unpack_texts(features.keys, features.keys_offsets, np.arange(len(features.split)))
        row_of = dict(zip(keys, self.span(shard), strict=True))
        strange: list[str] = []
        for files in _files(tar):
            image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
            if image is None:
                continue
            row = row_of.pop(files["__key__"], None)
            if row is None:
                strange.append(files["__key__"])
            elif row in rows:
                yield Streamed(row, image, files.get("json", b""))
        self._skip(shard, "no embedding", strange)
        self._skip(shard, "not in the stream", [key for key, row in row_of.items() if row in rows])

    def decoded(self, samples: Iterable[Streamed]) -> Iterator[tuple[int, Arrived]]:
        """Yield row and decoded sample; those that cannot be decoded are counted and named."""
        for row, file, json in samples:
            try:
                image = load_square(file, self.image_size)
            except BadSample as reason:
                shard = int(np.searchsorted(self.starts, row, side="right")) - 1
                self._skip(shard, str(reason), [f"row {row}"])
                continue
            yield row, Arrived(image, json)

    def _skip(self, shard: int, reason: str, names: list[str]) -> None:
        self.skipped[reason] += len(names)
        if names and (shard, reason) not in self._told:  # in the first epoch, not in all
            self._told.add((shard, reason))
            log.warning(
                "%s: skipped %d sample(s), %s: %s", self.shards[shard], len(names), reason, ", ".join(names[:3])
            )


def _files(shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield the files of each sample by suffix, with its ``__key__``. A tar that breaks off ends there.

    Raises:
        InputError: webdataset is not installed, or the shard cannot be read.
    """
    tars = _webdataset().tariterators
    wanted = (*IMAGE_SUFFIXES, "json")
    try:
        with shard.opened() as stream:
            source = [{"url": str(shard), "stream": stream}]
            files = tars.tar_file_expander(source, select_files=lambda name: split_name(name)[1] in wanted)
            yield from tars.group_by_keys(_whole(files, shard), keys=split_name, handler=_keep_the_first)
    except InputError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise InputError(f"Shard {shard} cannot be read ({type(error).__name__}: {error}): try again.") from error


def _whole(files: Iterable[dict[str, Any]], shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield a tar's files up to where it breaks off."""
    try:
        yield from files
    except tarfile.TarError as error:
        log.warning("%s: broken tar (%s), read as far as it goes", shard, type(error).__name__)


def _keep_the_first(error: Exception) -> bool:
    """Go on after a file whose name was there before."""
    if isinstance(error, ValueError) and "duplicate file name" in str(error):
        return True
    raise error


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise InputError("StreamedImages reads through webdataset: install unclip_pl[stream].") from error
    return webdataset


# --- In order


class InOrder:
    """Maker of batches whose rows ascend: it reads on from where the last batch ended, and begins again with an epoch.

    Args:
        store: place of the embeddings.
        make: method of the store that makes a batch of the samples that have arrived.
    """

    def __init__(self, store: StreamedStore, make: Callable[[RowBatch], Any]) -> None:
        self.store = store
        self.make = make
        self._stream: Iterator[Streamed] = iter(())
        self._last = -1

    def __call__(self, batch: RowBatch) -> Any:
        """Return the batch of some rows; where they do not follow those of the last batch, it begins again."""
        rows = batch.rows.tolist()
        if self._last < 0 or rows[0] <= self._last:
            first = int(np.searchsorted(self.store.starts, rows[0], side="right")) - 1
            shards = range(first, len(self.store.shards))
            self._stream = (s for shard in shards for s in self.store.samples(shard, self.store.span(shard)))
        self._last, wanted = rows[-1], set(rows)
        samples = (sample for sample in self._stream if sample.row in wanted)
        self.store.arrived = dict(self.store.decoded(islice(samples, len(rows))))
        if missing := wanted - self.store.arrived.keys():
            raise InputError(
                f"Expected the samples of all embeddings in {self.store.source}. Got none for row {min(missing)}: run "
                "`unclip precompute` again."
            )
        return self.make(batch)


# --- Shuffled


class Step(NamedTuple):
    """A training batch, of which the stream decides what is in it."""

    epoch: int
    start: int  # batches of that epoch that were trained before this run began it


class StepSampler(DistributedSampler[Step]):
    """Steps of an epoch, as many on every rank.

    Args:
        steps: number of steps of an epoch.
        epoch: epoch in which training goes on; Lightning's ``set_epoch`` moves on from there.
        start: batches of that epoch that are already trained; ``len`` counts them too.
    """

    def __init__(self, steps: int, *, epoch: int = 0, start: int = 0) -> None:
        super().__init__(cast(Any, range(steps)), num_replicas=1, rank=0)
        self.set_epoch(epoch)
        self._started = Step(epoch, start)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Step]:
        start = self._started.start if self.epoch == self._started.epoch else 0
        return iter([Step(self.epoch, start)] * (len(self) - start))


class Shuffled:
    """Maker of training batches of a stream that has no end: who has read all of his shards begins again.

    Ranks and their workers read shards of their own, in an order of (seed, epoch), through a buffer of encoded images.

    Args:
        store: place of the embeddings.
        make: method of the store that makes a batch of the samples that have arrived.
        batch_size: images of a batch.
        buffer: samples among which the next one is drawn.
        seed: base seed of the order, and of the caption that an image gets in an epoch.
        rank: number of this process, below ``world_size``.
        world_size: number of processes.
    """

    def __init__(
        self,
        store: StreamedStore,
        make: Callable[[RowBatch], Any],
        batch_size: int,
        *,
        buffer: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.store = store
        self.make = make
        self.batch_size = batch_size
        self.buffer = buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._step: Step | None = None
        self._stream: Iterator[tuple[int, Arrived]] = iter(())

    def __call__(self, step: Step) -> Any:
        """Return the next batch of an epoch's stream."""
        if step != self._step:
            self._step, self._stream = step, self.store.decoded(self._shuffled(step))
        samples = list(islice(self._stream, self.batch_size))
        self.store.arrived = dict(samples)
        rows = np.array([row for row, _ in samples])
        return self.make(RowBatch(rows, row_draws(rows, seed=self.seed, epoch=step.epoch)))

    def _shuffled(self, step: Step) -> Iterator[Streamed]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, lanes = self.rank * workers + number, self.world_size * workers
        shards, order = self.store.shards_of(Split.TRAIN), random.Random(f"{self.seed} {step}")
        order.shuffle(shards)
        own = shards[lane::lanes]
        if not own:
            raise InputError(
                f"Expected a shard for each of {lanes} readers (ranks × workers). Got {len(shards)} shards in "
                f"{self.store.source}: lower data.num_workers, or pack smaller shards."
            )
        order.seed(f"{self.seed} {step} {lane}")
        mix = _webdataset().shuffle(self.buffer, initial=self.buffer, rng=order)
        while True:  # all of a reader's samples, and then all of them again
            came = False
            for sample in mix(
                s for shard in own for s in self.store.samples(shard, self.store.span(shard, Split.TRAIN))
            ):
                came = True
                yield sample
            if not came:
                raise InputError(
                    f"Expected samples with embeddings in {self.store.source}. Got none: run `unclip precompute` again."
                )
            order.shuffle(own)
