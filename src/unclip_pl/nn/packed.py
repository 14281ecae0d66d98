"""Linear layers whose weights lie as a CPU's kernels want them, for samplers: few rows, the same weights each step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import mm_flop, register_flop_formula

# torch lays a weight out for the processor's caches anew at every call, which for tens of rows takes longer than the
# product itself. These two are what torch.compile's frozen graphs call instead, there is no public name for them.
_OPS = torch.ops.mkldnn
_KNOWN = hasattr(_OPS, "_reorder_linear_weight") and hasattr(_OPS, "_linear_pointwise")


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of ``module`` multiply by copies of their weights that are laid out once.

    On a CPU with oneDNN, two to five times as fast with up to 16 rows, and the same but for the order of the sums;
    elsewhere, and in a region of autocast, nothing changes. The copies are taken on entry, so a weight that changes
    inside is not seen; nothing inside has a gradient.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and _able(layer.weight)]
    for layer in layers:
        # An attribute of the instance, which nn.Module calls before the method of its class.
        weight = _OPS._reorder_linear_weight(layer.weight.detach())
        vars(layer)["forward"] = partial(_linear, weight=weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _able(weight: Tensor) -> bool:
    able = _KNOWN and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    return able and weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _OPS._linear_pointwise(x, weight, bias, "none", [], "")


if _KNOWN:

    @register_flop_formula(_OPS._linear_pointwise)
    def _linear_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        """As of any other linear layer."""
        *rows, width = x
        return mm_flop([torch.Size(rows).numel(), width], [width, weight[0]])
