"""Counted operations beside what arithmetic says."""

import torch
from torch.nn import functional as F

from unclip_pl.evaluation.costs import count_flops
from unclip_pl.tasks.base import orthogonalised


def test_attention_counts_on_any_device() -> None:
    batch, heads, length, width = 2, 3, 16, 8
    q = torch.randn(batch, heads, length, width)
    products = 2 * batch * heads * length * length * width  # q kᵀ, and again for the weights times v
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * products
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q, mask)) == 2 * products


def test_backward_costs_twice_the_forward() -> None:
    layer, x = torch.nn.Linear(8, 4, bias=False), torch.randn(5, 8, requires_grad=True)
    forward = 2 * 5 * 8 * 4
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward


def test_muons_own_products_are_those_of_the_documentation() -> None:
    """For k × n, k ≤ n: X Xᵀ and the last product take 2k²n each, three steps of Newton and Schulz 18k³ together."""
    shapes = [(8, 8), (8, 24), (32, 8)]
    work = count_flops(lambda: orthogonalised([torch.randn(shape) for shape in shapes]))
    assert work == sum(4 * k * k * n + 18 * k**3 for k, n in map(sorted, shapes))
