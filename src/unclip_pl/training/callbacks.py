"""What Lightning's own callbacks leave to us: a warm-up for EMA, a bar over the whole fit, grids of samples."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchvision.utils import make_grid

from unclip_pl.errors import InputError
from unclip_pl.nn.layers import Block


class WarmupEMA(WeightAveraging):
    """Exponential moving average with decay min(d, (1 + n) / (10 + n)) after n updates.

    Early weights are forgotten fast, so that short runs profit too. Validation and checkpoints use the average. A
    sharded network takes :class:`~unclip_pl.training.sharding.ShardedEMA`.

    Args:
        decay: d, the decay it ends at.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        self.decay = decay
        # Buffers are statistics and fingerprints: copied, never averaged.
        super().__init__(use_buffers=False)
        self._updates = 0
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes room for the average, on the device that trains.

        Raises:
            ValueError: the network is sharded.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(
                "WarmupEMA copies whole networks. Use unclip_pl.training.sharding.ShardedEMA for a sharded one."
            )
        # The module is still on the CPU here. Left there, the average would fetch all weights at every step.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Moves the average after every optimizer step."""
        if trainer.global_step > self._latest_update_step:
            self.update(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def update(self, pl_module: LightningModule) -> None:
        """Towards the weights as they are. Unlike torch's own, it waits for no device to say how often it has moved."""
        average = self._average_model
        assert average is not None
        decay = warmup_decay(self.decay, self._updates) if self._updates else 0.0
        torch._foreach_lerp_([*average.module.parameters()], [*pl_module.parameters()], 1 - decay)
        for mine, yours in zip(average.module.buffers(), pl_module.buffers(), strict=True):
            mine.copy_(yours)
        average.n_averaged += 1
        self._updates += 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average back, and how often it has moved."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            self._updates = int(self._average_model.n_averaged)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the current weights back where a validation was cut: a checkpoint may be about to be written."""
        if self._swapped:
            self._swap_models(pl_module)


def warmup_decay(decay: float, updates: int) -> float:
    """Of an average after that many updates: min(d, (1 + n) / (10 + n))."""
    return min(decay, (1 + updates) / (10 + updates))


class CompiledBlocks(Callback):
    """torch.compile of every transformer block by itself: what is alike shares a graph, so compiling takes a minute.

    Worth it where a prior trains for hours on a GPU:
    ``--trainer.callbacks+=unclip_pl.training.callbacks.CompiledBlocks``.
    U-Nets stay as they are: no two of their blocks are of one shape.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Parameters keep their names: a checkpoint does not know."""
        compile_blocks(pl_module)


def compile_blocks(module: nn.Module) -> None:
    """Each transformer block in ``module``, in place, at its first call."""
    torch._dynamo.config.recompile_limit = 64  # lengths of captions, the top layer, validation: each its own graph
    for part in module.modules():
        if isinstance(part, Block):
            part.compile()


class StepProgressBar(TQDMProgressBar):
    """One bar over all optimizer steps of the fit, not one an epoch: its time left is the training's.

    Args:
        refresh_rate: steps between two updates.
    """

    def __init__(self, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the total, and where a resumed run stands."""
        super().on_train_start(trainer, pl_module)
        total = trainer.estimated_stepping_batches
        self.train_progress_bar.reset(total if total != float("inf") else None)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description(type(pl_module).__name__.removesuffix("Task"))

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """The bar goes on."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Moves to the optimizer step reached."""
        step = trainer.global_step
        if self._should_update(step, self.train_progress_bar.total):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Losses without the version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class SampleGrid(Callback):
    """Draws images for the first validation pairs, always from the same noise, into TensorBoard.

    Args:
        every_n_steps: optimizer steps between two grids; drawn at the validation that follows.
        num: images.
    """

    def __init__(self, every_n_steps: int = 1000, num: int = 16) -> None:
        self.every_n_steps = every_n_steps
        self.num = num
        self._next = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One rank draws.

        Raises:
            ValueError: the network is sharded, so that one rank cannot.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError("SampleGrid draws on one rank, which has but a shard of the network: leave it out.")

    def state_dict(self) -> dict[str, Any]:
        """When the next grid is due."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self._next = state_dict["next"]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """At the first batch of a validation that is due: the averaged weights are in place here."""
        if batch_idx or trainer.sanity_checking or trainer.global_step < self._next:
            return
        self._next = trainer.global_step + self.every_n_steps
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        few = first(batch, self.num)
        images = torch.cat([few.image, pl_module.draw(few, torch.Generator().manual_seed(0))])
        grid = make_grid(images.float().cpu().add(1).div(2), nrow=self.num)
        trainer.logger.experiment.add_image("samples (true above, drawn below)", grid, trainer.global_step)


def first(batch: Any, n: int) -> Any:
    """The first n samples of a batch, which may hold batches."""
    return type(batch)(*(part[:n] if isinstance(part, Tensor) else first(part, n) for part in batch))
