"""Sharpness-aware minimisation: the optimizer steps with the gradient of the worst point nearby (Foret et al. 2021)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unclip_pl.errors import InputError


@contextmanager
def perturbed(module: nn.Module, rho: float) -> Iterator[None]:
    """Inside, w + rho g / ‖g‖ in place of w (eq. 2), for the gradient g of all weights that is there on entering.

    Batch norm counts nothing inside, for its running statistics are those of w. Leaving it, by an exception too, puts w
    back bit for bit; the gradients stay as they are by then. No device is waited for.

    Args:
        module: whose weights move.
        rho: radius (the paper's CLIP: 0.1).
    """
    moved = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    weights, gradients = [p.detach() for p, _ in moved], [g for _, g in moved]
    kept = [w.clone() for w in weights]
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        length = torch.nn.utils.get_total_norm(gradients).clamp(min=1e-12)  # without a slope there is no worst point
        torch._foreach_mul_(gradients, rho / length)
        torch._foreach_add_(weights, gradients)
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        torch._foreach_copy_(weights, kept)


def check_strategy(strategy: Strategy, accumulate_grad_batches: int) -> None:
    """Whether every rank has whole weights, and a whole gradient of its own batch to move them by.

    Raises:
        ValueError: weights are sharded, or the gradient would be one of several batches.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise InputError(
            "Sharpness-aware minimisation moves whole weights: expected one device or trainer.strategy ddp. Got "
            f"{type(strategy).__name__}: change trainer.strategy, or leave model.sam_rho at 0."
        )
    if accumulate_grad_batches > 1:
        raise InputError(
            "Sharpness-aware minimisation moves by the gradient of one batch: expected accumulate_grad_batches 1. Got "
            f"{accumulate_grad_batches}: change it, or leave model.sam_rho at 0."
        )
