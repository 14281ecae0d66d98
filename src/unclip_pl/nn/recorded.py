"""A sampler's step as one CUDA graph: a GPU is done with small kernels sooner than Python can launch them."""

from collections.abc import Callable

import torch
from torch import Tensor


def recorded(step: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """``step``, which on a GPU is recorded as a CUDA graph at its first call and replayed at all later ones.

    Args:
        step: of tensors to a tensor, and what it writes in place besides. It must find everything else that it reads
            where it was, draw no random numbers, wait for no result, and may be called twice with the first arguments.
        device: elsewhere than on a GPU ``step`` itself is returned.

    Returns:
        A function of tensors of the first call's shapes.
    """
    return _Recorded(step) if device.type == "cuda" else step


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
