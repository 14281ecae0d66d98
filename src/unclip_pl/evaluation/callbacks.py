"""Scores of a prior or a decoder while it trains: at each validation, what its loss does not say.

Early stopping and ``--ckpt_path best`` go by these scores. They draw from generators of their own, and so training ends
with the same weights as without them.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion import DDIM
from unclip_pl.errors import InputError
from unclip_pl.evaluation.drawing import gather
from unclip_pl.evaluation.inputs import streams_for
from unclip_pl.evaluation.scores import stated_indices, true_attributes
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import Prior
from unclip_pl.metrics import FrechetDistance
from unclip_pl.metrics.attributes import captions_right, stated_match
from unclip_pl.metrics.clip_score import retrieval_recall
from unclip_pl.metrics.embedding import calibration
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.tasks import DecoderTask, EmbeddingTask
from unclip_pl.types import EvaluationBatch, PriorBatch

#: Captions of which embeddings or pictures are drawn at once.
BATCH = 64
#: Samples of a caption that a prior draws: calibration looks at the cosine between two.
SAMPLES = 2


class ValidationScores(Callback):
    """Scores a Task at each validation, and logs the scores as ``val/NAME`` into every logger.

    Each caption has noise of its own, the same at every validation. Every rank scores a part of the captions. Add
    ``monitor`` to :class:`~unclip_pl.training.resume.StepCheckpoint` to keep the best weights by one of the scores.

    Args:
        captions: number of validation captions, spread evenly over the split; all of them where there are fewer.
        steps: solver steps of a diffusion prior or a decoder. Few are enough to compare a network with itself.
    """

    #: What it scores, in words.
    wanted: ClassVar[str]
    fewest: ClassVar[int] = 1

    def __init__(self, captions: PositiveInt = 256, steps: PositiveInt = 8) -> None:
        self.captions = captions
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to score.

        Raises:
            InputError: the Task or the data are of another kind, the network is sharded, or there are too few captions.
        """
        name, data = type(self).__name__, getattr(trainer, "datamodule", None)
        if not self.fits(pl_module) or not isinstance(data, UnclipDataModule):
            raise InputError(
                f"Expected {self.wanted} and UnclipDataModule for {name}. Got {type(pl_module).__name__} and "
                f"{type(data).__name__}: leave {name} out."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(f"{name} draws on one rank, which holds only a shard of the network. Leave it out.")
        if stage in ("fit", "validate") and (rows := self._rows(data.embeddings)):
            if len(rows) < self.fewest:
                raise InputError(
                    f"Expected at least {self.fewest} validation images for {name}. Got {len(rows)}: add some, or "
                    f"leave {name} out."
                )
            self.check(data, rows)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Score at the first batch of a validation. The averaged weights are in place then."""
        if batch_idx or trainer.sanity_checking:
            return
        data: UnclipDataModule = trainer.datamodule  # type: ignore[attr-defined]
        own = self._rows(data.embeddings)[trainer.global_rank :: trainer.world_size]
        bar = trainer.progress_bar_callback
        shown = isinstance(bar, TQDMProgressBar) and bar.is_enabled
        progress = tqdm(total=len(own), desc=type(self).__name__, unit="caption", disable=not shown, leave=False)
        with progress, in_float32(pl_module):
            parts = []
            for start in range(0, len(own), BATCH):
                rows = own[start : start + BATCH]
                parts.append(self.draw(pl_module, data, _fixed(rows)))
                progress.update(len(rows))
        everyone = [part for rank in gather(parts, trainer.world_size) for part in rank]
        scores = self.score(*(torch.cat(column) for column in zip(*everyone, strict=True)))
        first = next(iter(scores))
        for key, value in scores.items():  # on every rank the same
            pl_module.log(f"val/{key}", value, prog_bar=key == first, on_epoch=True, batch_size=1, sync_dist=True)

    def _rows(self, store: EmbeddingStore) -> list[int]:
        rows = store.rows(Split.VAL)
        count = min(int(self.captions), len(rows))
        return rows[np.arange(count) * len(rows) // max(count, 1)].tolist()

    @abstractmethod
    def fits(self, task: LightningModule) -> bool:
        """Return whether a Task is of the kind that is scored."""

    def check(self, data: UnclipDataModule, rows: list[int]) -> None:
        """Refuse data that cannot be scored, with an ``InputError``."""

    @abstractmethod
    def draw(self, task: Any, data: UnclipDataModule, rows: RowBatch) -> tuple[Tensor, ...]:
        """Return what the scores need of some captions, (B, …) tensors on the CPU."""

    @abstractmethod
    def score(self, *columns: Tensor) -> dict[str, Tensor]:
        """Return scores by name, the foremost first, from the (N, …) tensors of all captions."""


class PriorScores(ValidationScores):
    """Scores a prior: Fréchet distance of its samples to the true embeddings, calibration cosines, and retrieval.

    Two samples are drawn for each caption. ``steps`` matters to a diffusion prior alone.
    """

    wanted = "a Task that names its prior's `spec`"
    fewest = 2

    def fits(self, task: LightningModule) -> bool:
        """Return whether a Task trains a prior."""
        return isinstance(task, EmbeddingTask) and task.spec is not None

    def draw(self, task: Any, data: UnclipDataModule, rows: RowBatch) -> tuple[Tensor, ...]:
        """Return (B, S, d) samples and (B, d) true embeddings."""
        batch = data.batch(PriorBatch, rows, task.device)
        prior = prior_of(task, int(self.steps))
        draws = [prior.embed_batch(batch, generator=streams_for(batch, s)) for s in range(SAMPLES)]
        return torch.stack(draws, dim=1).float().cpu(), batch.image_embed.float().cpu()

    def score(self, *columns: Tensor) -> dict[str, Tensor]:
        """Return the scores; retrieval is among the scored captions' pictures."""
        samples, true = (F.normalize(column, dim=-1) for column in columns)
        distance = FrechetDistance(true.shape[1])
        distance.update(true, real=True)
        distance.update(samples[:, 0], real=False)
        cosines = calibration(samples, true)
        return {
            "embed_fd": distance.compute().float(),
            "cos_true": cosines.to_true.mean(),
            "cos_samples": cosines.between_samples.mean(),
            "calibration_gap": cosines.gap.mean(),
            **{f"retrieval_r{k}": retrieval_recall(samples[:, 0], true, k).float() for k in (1, 10)},
        }


def prior_of(task: EmbeddingTask, steps: int) -> Prior:
    """Return a prior of a Task's present weights, which draws one embedding for each caption.

    Args:
        task: Task in training, which names its spec.
        steps: number of DDIM steps of a prior that has a sampler.
    """
    assert task.spec is not None
    settings: dict[str, Any] = {"checkpoint": "", "sampler": DDIM(steps), "candidates": 1}
    known = {field.name for field in fields(task.spec)}
    return task.spec(**{name: value for name, value in settings.items() if name in known}).of(task)


class DecoderScores(ValidationScores):
    """Scores a decoder of shapes: what the oracle reads from its pictures, beside what their captions state.

    It draws from true embeddings and captions, without guidance, which would take twice the time.
    """

    wanted = "DecoderTask"

    def fits(self, task: LightningModule) -> bool:
        """Return whether a Task trains a decoder."""
        return isinstance(task, DecoderTask)

    def check(self, data: UnclipDataModule, rows: list[int]) -> None:
        """Refuse data that are no shapes, with an ``InputError``, and build the oracle."""
        true_attributes(data.batch(EvaluationBatch, _fixed(rows[:1]), torch.device("cpu")).metadata)
        self._oracle = ShapesOracle(data.image_size)

    def draw(self, task: Any, data: UnclipDataModule, rows: RowBatch) -> tuple[Tensor, ...]:
        """Return (B, A) readings, (B, A) stated attributes, and (B,) residuals."""
        batch = data.batch(EvaluationBatch, rows, task.device)
        spec = DecoderSpec(checkpoint="", image_size=data.image_size, sampler=DDIM(int(self.steps)), guidance=1.0)
        images = Decoder(spec, task).decode(batch.image_embed, batch.text, generator=streams_for(batch))
        read, _, residual = self._oracle(images.float().cpu())
        return read, stated_indices(batch.captions), residual

    def score(self, *columns: Tensor) -> dict[str, Tensor]:
        """Return the scores."""
        read, stated, residual = columns
        return {
            "stated_match": stated_match(read, stated).mean(),
            "captions_right": captions_right(read, stated).float().mean(),
            "residual": residual.mean(),
        }


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the context, as samplers do, also with a network of bf16-true or 64-true."""
    with torch.inference_mode(False):
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
        kept = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for tensor, data in zip(tensors, kept, strict=True):  # the same memory, which an average looks at
                tensor.data = data


def _fixed(rows: list[int]) -> RowBatch:
    """Return rows with the first caption of each."""
    return RowBatch(np.array(rows), np.zeros(len(rows), np.uint64))
