"""Networks too large for one GPU: weights, gradients and optimizer state sharded over all ranks by PyTorch's FSDP2.

What Lightning leaves to us: which modules are gathered together, an average that stays sharded, and activations
computed again in the backward pass.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint
from unclip_pl.nn.layers import Block
from unclip_pl.nn.unet_blocks import Layer, ResBlock
from unclip_pl.training.callbacks import warmup_decay

#: What is gathered, used and freed together, and what is computed again in the backward pass.
UNITS = (Block, Layer, ResBlock)
#: Methods besides ``forward`` that use a network's weights.
METHODS = ("encode_prefix", "encode_condition")


def units(net: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of :data:`UNITS` in a network."""
    for module in net.children():
        if isinstance(module, UNITS):
            yield module
        else:
            yield from units(module)


class FullySharded(ModelParallelStrategy):
    """FSDP2 of a Task's network over all ranks, on GPUs (NCCL) or CPUs (gloo), in ``32-true`` or ``bf16-mixed``.

    Under ``bf16-mixed`` weights are gathered in bfloat16; gradients are reduced, and master weights kept, in float32.
    Checkpoints are the same single file as without sharding, gathered on rank 0's CPU.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Every process is a rank of one mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shards the network before the optimizer is made of its parameters."""
        assert self.lightning_module is not None
        net: Any = self.lightning_module.net
        if not isinstance(net, FSDPModule):
            shard = partial(
                fully_shard, mesh=self.device_mesh["data_parallel"], mp_policy=mixed_precision(trainer.precision)
            )
            for unit in units(net):
                shard(unit)
            shard(net, reshard_after_forward=True)  # not the default of a root: between two calls nothing is whole
            for name in METHODS:
                if hasattr(net, name):
                    register_fsdp_forward_method(net, name)
        Strategy.setup(self, trainer)  # ModelParallelStrategy's wants a Task that shards itself

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathered on rank 0, numbered as torch does without sharding: Lightning's numbers fit no other strategy."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved: Any = get_optimizer_state_dict(self._module, optimizer, options=options)
        if not saved:
            return saved  # another rank's
        return _renamed(saved, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Of a run with sharding or without; every rank reads the file and keeps its shards."""
        loaded = read_checkpoint(self.broadcast(checkpoint_path), mmap=True)
        everything = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self._module, loaded["state_dict"], options=everything)
        for optimizer, saved in zip(self.optimizers, loaded.get("optimizer_states", []), strict=False):
            if saved["state"]:  # an imported model has none yet
                numbers = [i for group in saved["param_groups"] for i in group["params"]]
                named = _renamed(saved, dict(zip(numbers, self._names(optimizer), strict=True)))
                set_optimizer_state_dict(self._module, optimizer, named, options=everything)
        return loaded

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Of the parameters in the order of an optimizer's groups."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state under other names for its parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Inputs are left to autocast: bfloat16 cannot tell time 998 from 999."""
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


class ShardedEMA(Callback):
    """:class:`~unclip_pl.training.callbacks.WarmupEMA` for :class:`FullySharded`: every rank averages its own shards.

    It costs each rank one more copy of its shards, no communication, and at a checkpoint a second gathering. The
    checkpoint is WarmupEMA's: ``state_dict`` holds the average, ``current_model_state`` what training goes on from, and
    each callback goes on from the other's.

    Args:
        decay: d, the decay it ends at.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        self.decay = decay
        self._average: list[Tensor] = []
        self._updates = 0
        self._step = 0
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the weights as they are.

        Raises:
            ValueError: nothing is sharded.
        """
        if not isinstance(trainer.strategy, FullySharded):
            raise InputError(
                "ShardedEMA needs the strategy unclip_pl.training.sharding.FullySharded. Use WarmupEMA elsewhere."
            )
        self._average = [shard.clone() for shard in shards(pl_module)]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Moves towards the weights after every optimizer step."""
        if trainer.global_step > self._step:
            decay = warmup_decay(self.decay, self._updates) if self._updates else 0.0
            torch._foreach_lerp_(self._average, shards(pl_module), 1 - decay)
            self._updates += 1
            self._step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the average."""
        if self._average:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weights back."""
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the weights back where a validation was cut."""
        if self._swapped:
            self._swap(pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the network."""
        torch._foreach_copy_(shards(pl_module), self._average)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The average takes the place of the weights, which stand beside it."""
        if not self._average:
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        self._swap(pl_module)
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        self._swap(pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The network holds the average by now: keeps it, and loads the weights."""
        if not self._average:
            return
        self._average = [shard.clone() for shard in shards(pl_module)]
        self._step = checkpoint["global_step"]
        if "current_model_state" in checkpoint:
            self._updates = int(checkpoint["averaging_state"]["n_averaged"])
            everything = StateDictOptions(full_state_dict=True)
            set_model_state_dict(pl_module, checkpoint["current_model_state"], options=everything)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        current = shards(pl_module)
        kept = [shard.clone() for shard in current]
        torch._foreach_copy_(current, self._average)
        self._average = kept
        self._swapped = not self._swapped


def shards(module: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter, sharing its memory."""
    return [p.detach() for p in (q.to_local() if isinstance(q, DTensor) else q for q in module.parameters())]


class ActivationCheckpointing(Callback):
    """Keeps no activations inside a network's blocks but computes them again in the backward pass.

    Costs a third more time and saves most of the memory; the gradients are the same.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Wraps the blocks' ``forward``: names of parameters stay as they are."""
        for unit in units(pl_module.net):
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
