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
    """Move the weights to w + rho g / ‖g‖ (eq. 2) inside the context, where g is the gradient of all weights on entry.

    Batch norm counts nothing inside, since its running statistics are those of w. On exit w is back bit for bit, after
    an exception too. The gradients are scaled in place to the move: compute new ones inside. No device is waited for.

    Args:
        module: module with the weights and their gradients.
        rho: radius of the move (the paper's CLIP: 0.1).
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
    """Refuse a training in which a rank lacks whole weights, or the whole gradient of its own batch.

    Raises:
        InputError: weights are sharded, or gradients are accumulated over several batches.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise InputError(
            "Expected one device or trainer.strategy ddp for sharpness-aware minimisation, which moves whole weights. "
            f"Got {type(strategy).__name__}: change trainer.strategy, or leave model.sam_rho at 0."
        )
    if accumulate_grad_batches > 1:
        raise InputError(
            "Expected accumulate_grad_batches 1 for sharpness-aware minimisation, which moves by one batch's gradient. "
            f"Got {accumulate_grad_batches}: change it, or leave model.sam_rho at 0."
        )
