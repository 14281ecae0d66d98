"""What devices need beyond plain torch, each with the measurement that justifies it. Results differ by rounding only.

Measured with torch 2.14. CPU: one thread of an AMD EPYC, where nothing else is said. GPU: one H200
(``results/benchmarks/gpu.md``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import mm_flop, register_flop_formula

Resample = Literal["none", "down", "up"]


# ------------------------------------------------------------------------------------------------------------------
# Matrix products


def fast_bfloat16(device: str) -> bool:
    """Return whether products in bfloat16 are faster than in float32.

    They are 2 times as fast on this CPU, and 80 times slower on one without AVX-512, where they are emulated (1,024²).

    Args:
        device: type of the device.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch that we take
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


# ------------------------------------------------------------------------------------------------------------------
# Attention


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Compute scaled dot-product attention, (B, heads, L, dim).

    On a CPU in bfloat16 it is written out: the backward pass of torch's fused kernel takes up to three times as long as
    what it fuses (64 tokens). A causal one does without a mask in memory, which keeps a GPU's flash attention away: the
    paper's prior trains at 48 % of the peak instead of 39 % (together with `GroupNorm`).

    Args:
        query: (B, heads, L, dim).
        key, value: (B, heads, keys, dim).
        mask: (B or 1, 1, L or 1, keys) bool, True where a query may look; None for everywhere.
        causal: the queries are the last L of the keys; each sees itself and the keys before it. It takes the place of
            a mask.
    """
    fused = query.device.type != "cpu" or query.dtype != torch.bfloat16
    if causal and fused and query.shape == key.shape:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if causal:
        length, keys = query.shape[2], key.shape[2]
        mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    batch, heads, _, dim = query.shape
    bias = query.new_zeros(1, 1, 1)
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        bias = hidden.expand(batch, heads, -1, -1).flatten(0, 1)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(bias, query, key.mT, alpha=dim**-0.5)
    return torch.bmm(scores.softmax(dim=-1), value).unflatten(0, (batch, heads))


def training_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which a network that is not ours (open_clip's) takes the fastest attention for training.

    On a CPU in bfloat16 that is the written-out one: the fused kernel's backward pass is a third of a tiny CLIP's step,
    which takes 0.22 s in bfloat16 and 0.35 s in float32.
    """
    written_out = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()


# ------------------------------------------------------------------------------------------------------------------
# Group norm and resolutions of the U-Net


class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its input.

    Autocast would run it in float32 on a GPU and move several times the bytes, though its kernels add up in float32 in
    any case: the paper's decoder trains at 37 % of the peak instead of 31 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, …)."""
        return self.scaled(x, self.num_groups, self.weight, self.bias)

    def scaled(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalise with other groups, weight and bias."""
        if x.device.type != "cuda":
            return F.group_norm(x, groups, weight, bias, self.eps)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), self.eps)


class Conv2d(nn.Conv2d):
    """Convolution that lays its weight out as its input is, in ``channels_last`` or not.

    The parameter itself stays as it is, and so do checkpoints, optimizers and shards. Autocast copies the weight in any
    case; here that copy has the layout that cuDNN's fast kernels take.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        if x.device.type != "cuda" or x.is_contiguous():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        weight = self.weight.to(dtype, memory_format=torch.channels_last)
        return self._conv_forward(x, weight, self.bias)


class NormSiLU(GroupNorm):
    """Group norm, scaled and shifted where it is asked to be, and SiLU; out comes the memory format that went in.

    It is a module of its own so that it can be compiled: torch's own norm on a GPU leaves ``channels_last``.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return silu(norm(x) · (1 + scale) + shift), of x (B, C, H, W), scale and shift (B, C)."""
        y = super().forward(x) if scale is None or shift is None else scale_shift_norm(self, x, scale, shift)
        y = F.silu(y)
        return y if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def scale_shift_norm(norm: GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return norm(x) · (1 + scale) + shift, of x (B, C, H, W), scale and shift (B, C).

    Contiguous x takes one pass: its images stand side by side like so many channels, and scale and shift go into the
    norm's weight and bias. On a CPU that takes 1.1 ms instead of 3.9, (8, 128, 32, 32) in bfloat16, both passes.
    """
    gain = 1 + scale
    if not x.is_contiguous():
        normed = norm.scaled(x, norm.num_groups, norm.weight, norm.bias)
        return torch.addcmul(shift[..., None, None], normed, gain[..., None, None])
    weight, bias = (norm.weight * gain).flatten(), torch.addcmul(shift, norm.bias, gain).flatten()  # (B·C,)
    return norm.scaled(x.flatten(0, 1)[None], len(x) * norm.num_groups, weight, bias).view_as(x)


def resample(x: Tensor, mode: Resample) -> Tensor:
    """Halve the sides by averaging ("down"), double them by repetition ("up") or return ``x`` ("none").

    Contiguous x on a CPU goes by sums and stacks: doubling takes 1.3 ms instead of 4.0 and halving 1.4 instead of 5.3,
    (8, 128, 32, 32) in bfloat16, both passes.
    """
    if mode == "none":
        return x
    by_hand = x.device.type == "cpu" and x.is_contiguous()
    if mode == "down":
        return _halve(_halve(x, -2), -1) if by_hand else F.avg_pool2d(x, 2)
    return _double(_double(x, -1), -2) if by_hand else F.interpolate(x, scale_factor=2.0, mode="nearest")


def _halve(x: Tensor, dim: int) -> Tensor:
    """Return the means of neighbours; ``dim`` counts from the end."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim)
    return torch.lerp(first, second, 0.5)


def _double(x: Tensor, dim: int) -> Tensor:
    """Return everything twice in a row; ``dim`` counts from the end."""
    return torch.stack((x, x), dim).flatten(dim - 1, dim)


# ------------------------------------------------------------------------------------------------------------------
# Samplers on a CPU: weights laid out once

# torch lays a weight out for the processor's caches at every call, which for tens of rows takes longer than the product
# itself. torch.compile's frozen graphs call these two instead. There is no public name for them.
_OPS = torch.ops.mkldnn
_KNOWN = hasattr(_OPS, "_reorder_linear_weight") and hasattr(_OPS, "_linear_pointwise")


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Lay out the weights of a module's linear layers once, for all products inside the context.

    For samplers: few rows, the same weights at each step. With oneDNN, products with up to 16 rows are two to five
    times as fast; drawing one embedding takes half the time on two threads, drawing eight takes two thirds. Elsewhere
    than on a CPU, and inside autocast, nothing changes. The copies are taken on entry, so a weight that changes inside
    is not seen. Nothing inside has a gradient.
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
        """Count what any other linear layer does."""
        *rows, width = x
        return mm_flop([torch.Size(rows).numel(), width], [width, weight[0]])


# ------------------------------------------------------------------------------------------------------------------
# Samplers on a GPU: one graph per step


def recorded(step: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Return ``step``, which on a GPU is recorded as a CUDA graph at its first call and replayed at all later ones.

    A GPU is done with small kernels sooner than Python can launch them: replayed, AR decoding at batch 8 takes 148 ms
    instead of 953, and a diffusion prior's 64 guided steps take 127 ms instead of 779.

    Args:
        step: function of tensors to a tensor, which may also write in place. It must find everything else that it reads
            where it was, draw no random numbers, wait for no result, and may be called twice with the first arguments.
        device: device of the tensors; elsewhere than on a GPU ``step`` itself is returned.

    Returns:
        A function of tensors of the first call's shapes. Where operations are counted it is ``step`` too, since a
        counter sees nothing of a replay.
    """
    counted = _get_current_dispatch_mode() is not None
    return _Recorded(step) if device.type == "cuda" and not counted else step


class _Recorded:
    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        if self.graph is None:
            self._record(given)
        for mine, yours in zip(self.inputs, given, strict=True):
            mine.copy_(yours)
        assert self.graph is not None
        self.graph.replay()
        return self.output.clone()

    def _record(self, given: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at a first call must not be recorded
            self.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory meanwhile
            self.output = self.step(*self.inputs)
        self.graph = graph
