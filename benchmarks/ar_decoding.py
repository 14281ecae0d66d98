"""Decoding of the AR prior with cached keys and values against the same network without a cache.

No other project has an AR prior. The peer is the obvious loop: it computes the whole sequence again for every token.
256 × 4, the paper's 321 positions from z_t on (z_t, z_i·z_t, 319 codes of 1,024 buckets), captions of 77 tokens.
"""

from functools import partial

import torch
from measure import Row, fastest, floor, flops, growth, show, side_by_side
from torch import Tensor

from unclip_pl.nn.ar_prior import ARPriorTransformer, draw, upper_quantile
from unclip_pl.nn.kernels import packed
from unclip_pl.types import TextFeatures

D, CONTEXT, BATCH = 768, 77, 8


def network(code_length: int) -> ARPriorTransformer:
    torch.manual_seed(0)
    net = ARPriorTransformer(D, D, CONTEXT, code_length, buckets=1024, width=256, layers=4, heads=4)
    for head in (net.head, net.dot_head):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.05)  # they start at zero, and then all codes are as likely
    return net.eval()


def captions() -> TextFeatures:
    g = torch.Generator().manual_seed(1)
    states, embed = torch.randn(BATCH, CONTEXT, D, generator=g), torch.randn(BATCH, D, generator=g)
    mask = torch.ones(BATCH, CONTEXT, dtype=torch.bool)
    return TextFeatures(mask.long(), states, mask, embed)


def values(code_length: int) -> Tensor:
    """Buckets of unit variance, as a codec's."""
    return torch.linspace(-2.5, 2.5, 1024).expand(code_length, -1)


def cached(net: ARPriorTransformer, text: TextFeatures) -> Tensor:
    g = torch.Generator().manual_seed(2)
    with packed(net):  # as ARPrior does
        return net.generate(text, values_of=values(net.code_length), generator=g)[:, 0]


@torch.no_grad()
def uncached(net: ARPriorTransformer, text: TextFeatures) -> Tensor:
    """Draw codes like :meth:`ARPriorTransformer.generate`, but compute the whole sequence again for every token."""
    g = torch.Generator().manual_seed(2)
    codes = torch.zeros(BATCH, 0, dtype=torch.int64)
    table = values(net.code_length)

    def last(own: Tensor | None) -> Tensor:
        """Return the logits of the next token, given the caption and the tokens drawn so far."""
        tokens = net.prefix_tokens(text)
        if own is not None:
            tokens = torch.cat([tokens, own + net.suffix_positions[:, : own.shape[1]]], dim=1)
        causal = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        return net.final_ln(net.transformer(tokens, causal)[0][:, -1:])

    own = net.dot_embedding(draw(upper_quantile(net.dot_head(last(None)).softmax(-1), 0.5)[:, 0], generator=g))[:, None]
    for j in range(net.code_length):
        position = torch.tensor([j])
        code = draw(net.head(last(own), position)[:, 0].softmax(-1), generator=g)[:, None]
        codes = torch.cat([codes, code], dim=1)
        own = torch.cat([own, net.code_embedding(code, table[j][code], position)], dim=1)
    return codes


def rows() -> list[Row]:
    """Tokens per second of both loops, and how time grows with the number of codes."""
    net, text = network(319), captions()
    ours = fastest(lambda: cached(net, text), rounds=3)
    codes = []
    with packed(net):
        peer = side_by_side({"": lambda: codes.append(uncached(net, text))}, rounds=1)[""]
    same = (cached(net, text) == codes[0]).float().mean().item()
    assert same > 0.95, (
        f"the codes drawn with and without a cache agree in {same:.1%}"
    )  # one tie, and a row goes its way
    tokens = BATCH * 320
    note = f"{same:.1%} of the codes are the same; {floor().flops(flops(lambda: cached(net, text)) / ours)}"
    grid = (40, 80, 160, 319)
    times = [fastest(partial(cached, network(n), text), rounds=2) for n in grid[:-1]]
    return [
        Row(
            "AR prior decoding, batch 8, 321 positions", tokens / ours, tokens / peer, "tokens/s", peer / ours, 20, note
        ),
        growth("AR prior decoding with codes (batch 8)", grid, [*times, ours]),
    ]


if __name__ == "__main__":
    show(rows)
