"""What Lightning's own callbacks leave to us: an average of the weights, a bar over the whole fit, grids of samples."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torchvision.utils import make_grid

from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import NormSiLU
from unclip_pl.nn.layers import Block
from unclip_pl.nn.unet import UNet
from unclip_pl.training.loggers import log_picture, name_the_blind, takes_pictures
from unclip_pl.training.private import accumulates

#: Steps of a GPU between two looks at the loss.
LOOK = 50


class WarmupEMA(Callback):
    """Exponential moving average of the weights, with decay min(d, (1 + n) / (10 + n)) after n updates.

    The average forgets early weights fast, so that short runs profit too. Validation and checkpoints use it: in a
    checkpoint ``state_dict`` holds the average, and ``current_model_state`` the weights that training goes on from.
    Buffers (statistics, fingerprints) are not averaged. The average is in float32 also where the weights are not: in
    bfloat16 it would not move. Every rank averages what it holds, so that a sharded network costs one more copy of its
    shards. The file is the same with sharding and without.

    Lightning's ``WeightAveraging`` has no warm-up, waits for the GPU at every update, and does not work on shards.

    Args:
        decay: d, the largest decay.
    """

    def __init__(self, decay: ClosedUnitInterval = 0.9999) -> None:
        self.decay = decay
        self._average: list[Tensor] = []  # one tensor for each parameter, or for this rank's shard of it
        self._weights: list[Tensor] = []  # the network's own, listed once: walking its modules costs a step 0.5 ms
        self._kept: list[Tensor] = []  # copies of the weights while the average is in their place
        self._updates = 0
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights at hand; after a checkpoint was loaded, only follow the network to its device."""
        self._weights = local_parameters(pl_module)
        if self._average:
            self._average = [mine.to(weight.device) for mine, weight in zip(self._average, self._weights, strict=True)]
        else:
            self._average = [weight.to(torch.float32, copy=True) for weight in self._weights]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the average after every optimizer step."""
        if trainer.global_step > self._step:
            self.update()
            self._step = trainer.global_step

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        decay = warmup_decay(self.decay, self._updates) if self._updates else 0.0
        weights = self._weights
        if any(weight.dtype != torch.float32 for weight in weights[:1]):  # bf16-true, 64-true
            weights = [weight.float() for weight in weights]
        torch._foreach_lerp_(self._average, weights, 1 - decay)
        self._updates += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if self._average:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self._kept:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back where a validation was cut: a checkpoint may be about to be written."""
        if self._kept:
            self._swap(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the network, after the last checkpoint, which holds the weights as well."""
        for weight, average in zip(local_parameters(pl_module), self._average, strict=True):
            weight.copy_(average)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of a finished fit, so that the next fit begins with its own weights."""
        self._average, self._weights, self._updates, self._step = [], [], 0, 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average in the place of the weights, and the weights beside it."""
        if not self._average:
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        names = [name for name, _ in pl_module.named_parameters()]
        self._swap(pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()  # gathered: a copy
        else:
            state = pl_module.state_dict() | dict(zip(names, self._average, strict=True))  # in float32
            checkpoint["state_dict"] = {k: v.to("cpu", copy=True) for k, v in state.items()}
        self._swap(pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average, which Lightning has loaded into the network, and load the weights that a fit goes on from.

        Other commands score the average, and leave it in the network.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._average = [weight.to(torch.float32, copy=True) for weight in local_parameters(pl_module)]
        self._step = checkpoint["global_step"]
        if "current_model_state" in checkpoint:
            self._updates = int(checkpoint["averaging_state"]["n_averaged"])
            if isinstance(trainer.strategy, ModelParallelStrategy):
                everything = StateDictOptions(full_state_dict=True)
                set_model_state_dict(pl_module, checkpoint["current_model_state"], options=everything)
            else:
                pl_module.load_state_dict(checkpoint["current_model_state"])

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        weights, others = local_parameters(pl_module), self._kept or self._average
        self._kept = [] if self._kept else [weight.clone() for weight in weights]
        for weight, other in zip(weights, others, strict=True):
            weight.copy_(other)


def local_parameters(module: nn.Module) -> list[Tensor]:
    """Return this rank's part of every parameter. The tensors share the parameters' memory and need no gradient."""
    parts: list[Any] = [*module.parameters()]
    return [(p.to_local() if hasattr(p, "to_local") else p).detach() for p in parts]


def warmup_decay(decay: float, updates: int) -> float:
    """Return the decay of an average that was updated that many times: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + updates) / (10 + updates))


class FiniteLoss(Callback):
    """Ends a fit whose loss became NaN or infinite, and lets no checkpoint of such weights be written.

    A GPU counts such losses by itself, and is asked every :data:`LOOK` steps: no other step waits for it. Under
    float16 some steps overflow until the loss scale fits, and are skipped; there, all :data:`LOOK` must be bad.
    """

    def __init__(self) -> None:
        self._bad: Tensor | int = 0
        self._seen = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Count, and look at the count where it is time.

        Raises:
            InputError: the loss is not finite.
        """
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        self._bad = self._bad + ~loss.detach().isfinite()
        self._seen += 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._seen < (LOOK if scaled or loss.is_cuda else 1):
            return
        bad = int(self._bad)
        self._stop_if(bad == self._seen if scaled else bad > 0, trainer)
        self._bad = self._seen = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite.

        Raises:
            InputError: there are such weights.
        """
        whole = [weight.isfinite().all() for weight in local_parameters(pl_module) if weight.numel()]
        self._stop_if(not torch.stack(whole).all(), trainer)

    def _stop_if(self, wrong: bool, trainer: Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(wrong, all=False):
            return
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        kept = f"{last} is from before" if last and Path(last).is_file() else "no checkpoint was written before"
        raise InputError(
            f"Expected a finite loss. Got NaN or infinity by step {trainer.global_step}: training diverged; {kept}. "
            "Lower model.init_args.optimization.lr, lengthen its warmup_steps, or set trainer.gradient_clip_val."
        )


class TimeLimit(Timer):
    """Ends a fit by ``trainer.max_time``, counted from this start. Lightning's Timer counts over all resumptions."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the time of earlier starts."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Look at the clock between steps, not between the batches whose gradients make one."""
        if not accumulates(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)


class CompiledBlocks(Callback):
    """Compiles every transformer block and every norm of a U-Net by itself; transformers take a minute.

    Worth it where a network trains for hours on a GPU:
    ``--trainer.callbacks+=unclip_pl.training.callbacks.CompiledBlocks``.
    Equal blocks share a graph. On a GPU the maps of a U-Net with compiled norms are laid out channels last, as its
    fastest convolutions want them.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile in place. Parameters keep their names, so that checkpoints stay the same."""
        compile_blocks(pl_module)


def compile_blocks(module: nn.Module) -> None:
    """Compile each transformer block and each norm of U-Nets in a module, in place, at its first call."""
    # Each length of captions, the top layer and validation have a graph, and so has each shape of a norm.
    torch._dynamo.config.recompile_limit = 64
    for part in module.modules():
        if isinstance(part, Block):
            part.compile()
        if isinstance(part, NormSiLU):
            part.compile(dynamic=False)
        if isinstance(part, UNet):
            part.channels_last = part.conv_in.weight.is_cuda


class RecordedLoss(Callback):
    """Records the loss and its gradient as CUDA graphs at the third batch of a fit, and replays them.

    For priors and decoders that are too small for their GPU: its kernels are done sooner than Python launches them. On
    an H200, steps of 431 to 1,786 kernels took 28 to 128 ms, in proportion, and kernels ran for 4 to 13 % of that time.
    Captions are padded to the context length, so that shapes stay the same. Nothing changes elsewhere than on a single
    GPU, and where gradients are accumulated. Give the data ``num_workers: 0``: the thread that pins the memory of
    workers' batches must not call the driver during the recording. No card has run this yet.
    """

    EAGER = 2  # batches before: the first sets things up, and a profile counts the second one's arithmetic

    def __init__(self) -> None:
        self._seen = 0
        self._replay: Any = None  # a function of a batch's tensors

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the Task's loss."""
        alone = trainer.world_size == 1 and trainer.accumulate_grad_batches == 1
        length = getattr(getattr(trainer, "datamodule", None), "context_length", None)
        if alone and length and pl_module.device.type == "cuda":
            vars(pl_module)["loss"] = partial(self.loss, pl_module, length)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Task its loss back."""
        vars(pl_module).pop("loss", None)
        self._seen, self._replay = 0, None

    def loss(self, task: Any, length: int, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return the Task's loss of a batch, replayed in training.

        Args:
            task: Task whose loss it is.
            length: number of tokens that captions are padded to.
            batch: batch of a prior or a decoder; the loss of any other batch is computed as usual.
            generator: source of fixed noise in validation, which is not recorded.
        """
        if not (task.training and generator is None and hasattr(batch, "text")):
            return type(task).loss(task, batch, generator)
        self._seen += 1
        if self._seen <= self.EAGER:
            return type(task).loss(task, batch)
        batch = batch._replace(text=batch.text.pad(length))
        if self._replay is None:
            self._replay = self._record(task, batch)
        return self._replay(*tree_leaves(batch))

    @staticmethod
    def _record(task: Any, batch: Any) -> Any:
        """Return the Task's loss as a function of a batch's tensors that replays it."""
        kind = task.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        inputs = tuple(part.clone() for part in tree_leaves(batch))  # every later batch is copied into them
        with (
            torch.autocast(kind, dtype, enabled, cache_enabled=False),  # a cached cast is not part of the graph
            torch.random.fork_rng([task.device] if kind == "cuda" else []),  # the loss is run to warm up, and draws
        ):
            return torch.cuda.make_graphed_callables(_LossOfTensors(task, batch), inputs, allow_unused_input=True)


class _LossOfTensors(nn.Module):
    """A Task's loss as a function of a batch's tensors, the form that can be recorded."""

    def __init__(self, task: Any, like: Any) -> None:
        super().__init__()
        self.task = task
        self.layout = tree_flatten(like)[1]

    def forward(self, *tensors: Tensor) -> Tensor:
        return type(self.task).loss(self.task, tree_unflatten(tensors, self.layout))


class StepProgressBar(TQDMProgressBar):
    """One bar over all optimizer steps of the fit, not one for each epoch: it shows when training will end.

    Args:
        refresh_rate: number of steps between two updates of the bar.
    """

    def __init__(self, refresh_rate: NonNegativeInt = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the total, and where a resumed run stands."""
        super().on_train_start(trainer, pl_module)
        total = trainer.estimated_stepping_batches
        self.train_progress_bar.reset(total if total != float("inf") else None)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description(type(pl_module).__name__.removesuffix("Task"))

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Go on with the same bar."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move to the optimizer step reached."""
        step, total = trainer.global_step, self.train_progress_bar.total
        if self.is_enabled and (step % self.refresh_rate == 0 or step == total):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the losses, without the version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class SampleGrid(Callback):
    """Draws images for the first validation pairs, always from the same noise, into every logger that takes pictures.

    Such loggers are those of TensorBoard, W&B and MLflow, and others with a method ``log_image(key, images, step)``.

    Args:
        every_n_steps: number of optimizer steps between two grids; drawn at the validation that follows.
        num: number of images.
    """

    def __init__(self, every_n_steps: PositiveInt = 1000, num: PositiveInt = 16) -> None:
        self.every_n_steps = every_n_steps
        self.num = num
        self._next = int(every_n_steps)  # checkpoints hold plain numbers, not the parser's

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that one rank holds the whole network, and name the loggers that will show nothing.

        Raises:
            InputError: the network is sharded, or draws no pictures.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError("SampleGrid draws on one rank, which holds only a shard of the network. Leave it out.")
        if not hasattr(pl_module, "draw"):
            raise InputError(
                f"Expected a decoder or an upsampler for SampleGrid. Got {type(pl_module).__name__}, which draws no "
                "pictures: leave it out."
            )
        name_the_blind(trainer.loggers, "the pictures of SampleGrid")

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the next grid."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the next grid."""
        self._next = state_dict["next"]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Draw at the first batch of a validation where a grid is due. The averaged weights are in place then."""
        if batch_idx or trainer.sanity_checking or trainer.global_step < self._next:
            return
        self._next = trainer.global_step + self.every_n_steps
        loggers: list[Any] = [logger for logger in trainer.loggers if takes_pictures(logger)]
        if not loggers or not trainer.is_global_zero:
            return
        few = first(batch, self.num)
        images = torch.cat([few.image, pl_module.draw(few, torch.Generator().manual_seed(0))])
        grid = make_grid(images.float().cpu().add(1).div(2), nrow=self.num)
        title = "samples (true above, drawn below)"
        for logger in loggers:
            log_picture(logger, title, grid, trainer.global_step)


def first(batch: Any, n: int) -> Any:
    """Return the first n samples of a batch, which may hold batches."""
    return type(batch)(*(part[:n] if isinstance(part, Tensor) else first(part, n) for part in batch))
