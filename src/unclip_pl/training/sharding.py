"""Networks too large for one GPU: weights, gradients and optimizer state sharded over all ranks by PyTorch's FSDP2.

What Lightning leaves to us: which modules are gathered together, checkpoints that do not depend on sharding, and
activations computed again in the backward pass.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from unclip_pl.errors import InputError
from unclip_pl.files import require_finite
from unclip_pl.nn.layers import Block
from unclip_pl.nn.unet_blocks import Layer, ResBlock
from unclip_pl.training.private import shard_over_all_ranks
from unclip_pl.training.resume import read_newest

#: Modules that are gathered, used and freed as one, and computed again in the backward pass.
UNITS = (Block, Layer, ResBlock)
#: Methods besides ``forward`` that use a network's weights.
METHODS = ("encode_prefix", "in_one_pass", "encode_condition")


def units(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules of :data:`UNITS` in a network."""
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
        """Make every process a rank of one mesh."""
        shard_over_all_ranks(self)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the network before the optimizer is made of its parameters.

        Raises:
            InputError: the precision is another one.
        """
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise InputError(
                f"Expected precision 32-true or bf16-mixed for FullySharded. Got {trainer.precision}: change it."
            )
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
        Strategy.setup(self, trainer)  # ModelParallelStrategy's own expects a Task that shards itself

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Gather the state on rank 0, with torch's numbers of parameters: Lightning's names fit no other strategy."""
        inner: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved: Any = get_optimizer_state_dict(self._module, inner, options=options)
        if not saved:
            return saved  # on the other ranks
        return _renamed(saved, {name: i for i, name in enumerate(self._names(inner))})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Load a checkpoint of a run with or without sharding. Every rank reads the file and keeps its shards."""
        loaded = read_newest(Path(self.broadcast(checkpoint_path)), mmap=True)
        parameters = {name for name, _ in self._module.named_parameters()}
        require_finite({k: v for k, v in loaded["state_dict"].items() if k in parameters}, str(checkpoint_path))
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
        """Return the parameters' names in the order of an optimizer's groups."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state under other names for its parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy. Inputs are left to autocast: bfloat16 cannot tell time 998 from 999."""
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


class ActivationCheckpointing(Callback):
    """Keeps no activations inside a network's blocks but computes them again in the backward pass.

    Costs a third more time and saves most of the memory. The gradients are the same.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the blocks' ``forward``. Parameters keep their names."""
        net: Any = pl_module.net
        for unit in units(net):
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
