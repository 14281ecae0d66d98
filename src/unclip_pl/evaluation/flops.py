"""Floating-point operations, counted and not estimated; a multiply-add is two."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.generation.priors import Prior
from unclip_pl.tasks import Task
from unclip_pl.types import PriorBatch


def count_flops(work: Callable[[], Any]) -> int:
    """Of whatever ``work`` computes in matrix products and convolutions.

    Attention runs as plain matrix products meanwhile: PyTorch's counter passes over the fused kernels of a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def sampling_flops(prior: Prior, pairs: PriorBatch, captions: int = 8) -> int:
    """Per embedding, counted over the first few captions."""
    few = first_pairs(pairs, captions)
    work = count_flops(lambda: prior.embed_batch(few, generator=torch.Generator().manual_seed(0)))
    return work // len(few.image_embed)


def training_flops(task: Task, pairs: PriorBatch, captions: int = 8) -> int:
    """Per training sample, forward and backward, counted over the first few pairs."""
    with torch.inference_mode(False), torch.enable_grad():
        # A test runs in inference mode, whose tensors know no gradients: copies do.
        copied = copy.deepcopy(task)
        few = first_pairs(pairs, captions)
        few = PriorBatch(few.image_embed.clone(), few.text.repeat(1))
        work = count_flops(lambda: copied.loss(few, torch.Generator().manual_seed(0)).backward())
    return work // len(few.image_embed)


def first_pairs(pairs: PriorBatch, n: int) -> PriorBatch:
    """The first n of them."""
    return PriorBatch(pairs.image_embed[:n], pairs.text.rows(slice(n)))
