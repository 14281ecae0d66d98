"""LightningDataModules: frozen CLIP features and images for every task, and plain pairs for training a CLIP."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.pairs import PairStore
from unclip_pl.data.precompute import lacks_states, launched, pending, precompute
from unclip_pl.data.sampler import Blocks, BlockShuffleSampler, EvaluationSampler, RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import STATISTICS, EmbeddingStore
from unclip_pl.data.streamed import InOrder, Shuffled, StepSampler, StreamedStore
from unclip_pl.errors import InputError
from unclip_pl.types import DecoderBatch, EvaluationBatch, PriorBatch, UpsamplerBatch

log = logging.getLogger(__name__)

#: Missing shards that one rank may embed while the others wait in a barrier.
FEW = 4


class Batches(Dataset[Any]):
    """Whole batches by their rows, for a DataLoader with ``batch_size=None`` and a sampler of batches."""

    def __init__(self, assemble: Callable[[Any], Any]) -> None:
        self.assemble = assemble

    def __getitem__(self, index: RowBatch) -> Any:
        return self.assemble(index)


class FixedBatches(Dataset[Any]):
    """The first batches of an order, the same in every epoch: what ``trainer.overfit_batches`` asks for.

    Args:
        assemble: function that makes a batch of its rows.
        order: rows of all batches.
        share: number of batches, or their share as a float.
    """

    def __init__(self, assemble: Callable[[Any], Any], order: Sampler[Any], share: float) -> None:
        self.assemble = assemble
        self.length = len(order)  # type: ignore[arg-type] # the Trainer takes the share of it once more
        count = share if isinstance(share, int) else int(share * self.length)
        self.rows = list(islice(order, count))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.assemble(self.rows[index])


class ResumableLoader(DataLoader[Any]):
    """Loader with the methods by which Lightning knows that training goes on where it was cut.

    The data module keeps the position itself.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore a state."""


def loader(
    data: LightningDataModule, assemble: Callable[[Any], Any], sampler: Sampler[Any], num_workers: int
) -> ResumableLoader:
    """Load the batches whose rows a sampler gives; under ``overfit_batches`` the first ones alone."""
    trainer: Any = data.trainer
    fixed = overfits(data)
    share = trainer.overfit_batches if fixed and isinstance(sampler, BlockShuffleSampler) else 1.0
    return ResumableLoader(
        FixedBatches(assemble, sampler, share) if fixed else Batches(assemble),
        batch_size=None,
        sampler=None if fixed else sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Workers get seeds from here and use none; from the global generator they would shift the noise of training.
        generator=torch.Generator(),
    )


def overfits(data: LightningDataModule) -> bool:
    """Return whether a fit trains on the first batches alone, over and over."""
    trainer: Any = data.trainer
    return trainer is not None and trainer.state.fn == "fit" and trainer.overfit_batches > 0


class ResumableDataModule(LightningDataModule):
    """Training batches that go on at the very next one when a checkpoint is resumed.

    The position in a checkpoint counts trained batches, not those that workers have drawn ahead.

    Args:
        batch_size: images per rank and step in training.
        num_workers: processes that assemble batches; 0 is this one.
        seed: base seed of the order and of the number drawn for a row in an epoch.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._position = {"epoch": 0, "start": 0}
        self._sampler: BlockShuffleSampler | StepSampler | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and its first batch that is not trained."""
        if not self.trainer or not self._sampler:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": self._sampler.epoch + 1, "start": 0}
        return {"epoch": self._sampler.epoch, "start": progress.current.processed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the position at which ``train_dataloader`` goes on."""
        self._position = state

    def _training(self, blocks: Blocks, assemble: Callable[[RowBatch], Any]) -> ResumableLoader:
        rank, world_size = _place(self)
        position = {} if overfits(self) else self._position  # else a resumed fit would take other batches for the first
        self._sampler = BlockShuffleSampler(
            blocks, self.batch_size, seed=self.seed, rank=rank, world_size=world_size, **position
        )
        return loader(self, assemble, self._sampler, self.num_workers)


def in_order(
    data: LightningDataModule, rows: np.ndarray, batch_size: int, draws: np.ndarray | None = None
) -> EvaluationSampler:
    """Return this process's part of rows, in batches."""
    rank, world_size = _place(data)
    return EvaluationSampler(rows, batch_size, rank=rank, world_size=world_size, draws=draws)


def _place(data: LightningDataModule) -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    return (data.trainer.global_rank, data.trainer.world_size) if data.trainer else (0, 1)


class StoreDataModule(ResumableDataModule):
    """Batches of an embedding store.

    The task chooses the batch by its class attribute ``batch_type``.

    Args:
        store: folder of the embeddings.
        batch_size: images per rank and step in training.
        eval_batch_size: images per rank and step in validation, test and prediction; None is ``batch_size``.
        num_workers: processes that assemble batches; 0 is this one.
        seed: base seed of the order, and of the caption that an image gets in an epoch.
    """

    def __init__(self, store: str, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.store = store
        self.eval_batch_size = eval_batch_size or batch_size
        self.eval_workers = num_workers

    @cached_property
    def embeddings(self) -> EmbeddingStore:
        """The opened store, without pictures."""
        return EmbeddingStore(self.store)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load shuffled training rows, one caption of each per epoch."""
        return self._training(self.embeddings.blocks(Split.TRAIN), self._assemble())

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Load validation rows in order with their first captions; no loader where the source has none."""
        return self._evaluation(Split.VAL) if self.embeddings.count(Split.VAL) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Load held-out rows in order with their first captions."""
        return self._evaluation(Split.HELDOUT)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Load held-out rows in order with their first captions."""
        return self._evaluation(Split.HELDOUT)

    def _evaluation(self, split: Split) -> DataLoader[Any]:
        rows = self.embeddings.rows(split)
        if not len(rows):
            raise InputError(
                f"Expected {split.name.lower()} images in {self.store}. Got none: pack some into shards called "
                f"{split.name.lower()}-*.tar, or import more."
            )
        return loader(self, self._assemble(), in_order(self, rows, self.eval_batch_size), self.eval_workers)

    def _makers(self) -> dict[type, Callable[[RowBatch], Any]]:
        """Return the store's method for each type of batch that there is data for."""
        return {PriorBatch: self.embeddings.prior_batch}

    def _assemble(self) -> Callable[[RowBatch], Any]:
        """Return the store's method for the task's batch type."""
        task = self.trainer.lightning_module if self.trainer else None
        makers, wanted = self._makers(), getattr(task, "batch_type", None)
        if wanted not in makers:
            names = ", ".join(kind.__name__ for kind in makers)
            raise InputError(
                f"Expected {type(task).__name__}.batch_type to be one of {names}, which {type(self).__name__} makes. "
                f"Got {wanted!r}: give another task, or other data."
            )
        return makers[wanted]


class EmbeddingDataModule(StoreDataModule):
    """Embeddings alone, for priors: any finished store, whose pictures and CLIP need not be here.

    Such are the stores of ``unclip import embeddings``.

    Args:
        store: folder of the embeddings.
        batch_size: pairs per rank and step in training.
        eval_batch_size: pairs per rank and step in validation, test and prediction; None is ``batch_size``.
        num_workers: processes that assemble batches; 0 is this one, and enough.
        seed: base seed of the order, and of the caption that an image gets in an epoch.

    Raises:
        MissingFileError: no finished store there.
    """

    def __init__(
        self,
        store: str,
        batch_size: PositiveInt = 256,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(store, batch_size, eval_batch_size, num_workers, seed)
        self.embed_dim, self.text_embed_dim = self.embeddings.embed_dim, self.embeddings.text_embed_dim
        self.text_width, self.context_length = self.embeddings.text_shape
        self.statistics = str(self.embeddings.statistics)

    def _makers(self) -> dict[type, Callable[[RowBatch], Any]]:
        return super()._makers() | {EvaluationBatch: self.embeddings.pictureless_batch}


class UnclipDataModule(StoreDataModule):
    """Frozen CLIP features, and the images where the task wants them.

    The task chooses the batch: its class attribute ``batch_type`` is PriorBatch, DecoderBatch, UpsamplerBatch or
    EvaluationBatch.

    Args:
        source: folder of webdataset tars, glob, or range such as train-{000000..000012}.tar.
        store: folder of the embeddings; missing ones are made before the fit.
        clip: CLIP that embeds.
        batch_size: images per rank and step in training.
        eval_batch_size: images per rank and step in validation, test and prediction; None is ``batch_size``.
        num_workers: processes that assemble batches; 0 is this one, and enough for priors.
        seed: base seed of the order, and of the caption that an image gets in an epoch.
        image_size: side of the images in a batch; None is CLIP's.
        caption_key: suffix of the captions' files, such as .caption, or field of the samples' JSON, such as prompt;
            empty takes key.txt, and key.json where there is none.
    """

    def __init__(
        self,
        source: str,
        store: str,
        clip: ClipSpec,
        batch_size: PositiveInt = 256,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        image_size: PositiveInt | None = None,
        caption_key: str = "",
    ) -> None:
        super().__init__(store, batch_size, eval_batch_size, num_workers, seed)
        self.prepare_data_per_node = False  # one store, on a file system that all nodes see
        self.source = source
        self.caption_key = caption_key
        self.clip = clip
        self.image_size = image_size or clip.image_size
        self.embed_dim, self.text_width, self.context_length = clip.embed_dim, clip.text_width, clip.context_length
        self.text_embed_dim = clip.embed_dim

    @property
    def statistics(self) -> str:
        """Path of the statistics that ``EmbeddingSpace`` reads; the store is made first where it is missing."""
        self.ensure_store(launched())
        return str(Path(self.store) / STATISTICS)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the CLIP, which is built once for it."""
        return self.clip.load().fingerprint

    @cached_property
    def embeddings(self) -> EmbeddingStore:
        """The opened store, with the pictures of its source."""
        return EmbeddingStore(self.store, self.source, image_size=self.image_size)

    def ensure_store(self, world_size: int = 1, *, allowed: int = 0) -> None:
        """Embed the shards that have no embeddings.

        Args:
            world_size: number of processes of this run.
            allowed: shards that may be missing where there are several processes.

        Raises:
            InputError: more are missing, or the store belongs to another CLIP.
        """
        missing = pending(self.source, self.store, self.fingerprint, self.caption_key)
        if world_size > 1 and len(missing) > allowed:
            raise InputError(
                f"{len(missing)} shards of {self.source} have no embeddings in {self.store}, and {world_size} "
                f"processes cannot wait for one to make them: run `unclip precompute --source {self.source} "
                f"--store {self.store} --clip.name {self.clip.name} --clip.pretrained '{self.clip.pretrained}'"
                f"{f' --caption_key {self.caption_key}' if self.caption_key else ''}` first."
            )
        if missing:
            states = not lacks_states(self.store)
            precompute(self.source, self.store, self.clip, caption_key=self.caption_key, states=states)

    def prepare_data(self) -> None:
        """Complete the store; Lightning calls this on one process while the others wait."""
        self.ensure_store(self.trainer.world_size if self.trainer else 1, allowed=FEW)

    @cached_property
    def text_encoder(self) -> ClipEncoder:
        """The CLIP without its image tower, for captions whose token states are not in the store."""
        with torch.random.fork_rng([]):  # first weights of a network, and all noise, stay those of a run without it
            encoder = self.clip.load()
        encoder.model.visual = torch.nn.Identity()
        return encoder

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encode the captions' token states where the store leaves them out, on the device of training."""
        if not hasattr(batch, "text") or self.embeddings.has_states:
            return batch
        trainer: Any = self.trainer
        with trainer.precision_plugin.forward_context() if trainer else nullcontext():
            return batch._replace(text=self.text_encoder.to(batch.text.embed.device).with_states(batch.text))

    def batch(self, kind: type, rows: RowBatch, device: torch.device) -> Any:
        """Return a batch of some rows as a Task would get it, with embeddings and captions on a device.

        Args:
            kind: PriorBatch, DecoderBatch or EvaluationBatch.
            rows: ascending rows.
            device: device of embeddings and captions.
        """
        batch = self._makers()[kind](rows)
        batch = batch._replace(image_embed=batch.image_embed.to(device), text=batch.text.to(device))
        return self.on_after_batch_transfer(batch, 0)

    def _makers(self) -> dict[type, Callable[[RowBatch], Any]]:
        store = self.embeddings
        return super()._makers() | {
            DecoderBatch: store.decoder_batch,
            UpsamplerBatch: store.upsampler_batch,
            EvaluationBatch: store.evaluation_batch,
        }


class StreamedImages(UnclipDataModule):
    """Features and images out of shards that webdataset reads from end to end, for stores too slow for ranged reads.

    Training draws from a shuffle buffer: an epoch that was cut goes on in another order, and in an epoch of several
    ranks or workers some samples come twice and others not at all. Validation, test and prediction are exact.

    Args:
        source: folder of webdataset tars, glob, or range such as train-{000000..000012}.tar.
        store: folder of the embeddings; missing ones are made before the fit.
        clip: CLIP that embeds.
        shuffle: samples among which a reader draws the next one; they are kept as image files.
        options: those of ``UnclipDataModule``.

    Raises:
        InputError: webdataset is missing, or there are more readers (ranks × workers) than shards.
    """

    def __init__(self, source: str, store: str, clip: ClipSpec, shuffle: PositiveInt = 1000, **options: Any) -> None:
        super().__init__(source, store, clip, **options)
        self.shuffle = shuffle
        self.eval_workers = min(1, self.num_workers)  # each would read all shards

    @cached_property
    def embeddings(self) -> StreamedStore:
        """The opened store, to which images come in a stream."""
        return StreamedStore(self.store, self.source, image_size=self.image_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load training samples in the order of the stream, one caption of each per epoch."""
        make = self._assemble()
        if not isinstance(make, InOrder):  # no images
            return super().train_dataloader()
        rank, world_size = _place(self)
        steps = self.embeddings.count(Split.TRAIN) // (self.batch_size * world_size)
        trainer: Any = self.trainer
        if not steps or (trainer is not None and trainer.overfit_batches):
            raise InputError(
                f"Expected at least batch_size × ranks = {self.batch_size} × {world_size} training images, and no "
                f"trainer.overfit_batches. Got {self.embeddings.count(Split.TRAIN)}: use UnclipDataModule."
            )
        if rank == 0:
            log.warning(
                "StreamedImages cannot go on at the sample (an epoch that was cut goes on in another order), nor give "
                "every rank equal batches (some samples come twice in an epoch, others not): UnclipDataModule can."
            )
        self._sampler = StepSampler(steps, **self._position)
        lane = {"rank": rank, "world_size": world_size}
        stream = Shuffled(self.embeddings, make.make, self.batch_size, buffer=self.shuffle, seed=self.seed, **lane)
        return loader(self, stream, self._sampler, self.num_workers)

    def _makers(self) -> dict[type, Callable[[RowBatch], Any]]:
        makers = super()._makers()
        return {kind: make if kind is PriorBatch else InOrder(self.embeddings, make) for kind, make in makers.items()}


class PairDataModule(ResumableDataModule):
    """Images and token ids straight from the shards, for training a CLIP; no embedding store is needed.

    Args:
        source: folder of webdataset tars, glob, or range such as train-{000000..000012}.tar.
        clip: architecture whose tokenizer and image size the batches are for.
        batch_size: pairs per rank and step.
        num_workers: processes that assemble batches; 0 is this one.
        seed: base seed of the order, the captions and the shifts.
        shift: largest random move of training images on both axes, in pixels.
        caption_key: suffix of the captions' files, such as .caption, or field of the samples' JSON, such as prompt;
            empty takes key.txt, and key.json where there is none.
    """

    def __init__(
        self,
        source: str,
        clip: ClipSpec,
        batch_size: PositiveInt = 256,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        shift: NonNegativeInt = 0,
        caption_key: str = "",
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.source = source
        self.clip = clip
        self.clip_name = clip.name  # for the task that trains it
        self.shift = shift
        self.caption_key = caption_key

    @cached_property
    def pairs(self) -> PairStore:
        """Pairs, loaded once."""
        size, key = self.clip.image_size, self.caption_key
        return PairStore(self.source, self.clip.load().tokenize, image_size=size, caption_key=key)

    def train_dataloader(self) -> DataLoader[Any]:
        """Load shuffled training pairs, one caption of each image per epoch."""
        rows = self.pairs.rows(Split.TRAIN)
        return self._training(Blocks.of(rows), partial(self.pairs.batch, shift=self.shift))

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Load validation pairs in order; no loader where the source has none."""
        rows = self.pairs.rows(Split.VAL)
        if not len(rows):
            return []
        return loader(self, self.pairs.batch, in_order(self, rows, self.batch_size), self.num_workers)
