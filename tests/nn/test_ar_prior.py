from functools import partial
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.nn.ar_prior import (
    ARLogits,
    ARPriorTransformer,
    CodeEmbedding,
    CodeHead,
    CosineHead,
    FourierCodeEmbedding,
    SharedHead,
    draw,
    upper_quantile,
)
from unclip_pl.nn.layers import Prefix
from unclip_pl.nn.text import TextTransformer
from unclip_pl.types import TextFeatures

D, W, CONTEXT, N, BUCKETS, DOTS = 6, 10, 7, 5, 8, 4


class Tables(CodeEmbedding):
    """A learned vector for every (position, code): reads all that an embedding is given but the values."""

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(code_length * buckets, width)

    def forward(self, codes: Tensor, values: Tensor, position: Tensor) -> Tensor:
        return self.table(codes + position * self.buckets)


class OwnHeads(CodeHead):
    """A linear map of its own for every position."""

    def __init__(self, width: int, code_length: int, buckets: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(code_length, width, buckets))

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        return torch.einsum("bmw,mwv->bmv", hidden, self.weight[position])


PARTS = [(FourierCodeEmbedding, SharedHead), (FourierCodeEmbedding, CosineHead), (Tables, OwnHeads)]


def build(
    embedding: type = FourierCodeEmbedding, head: type = SharedHead, *, text_states: bool = True
) -> ARPriorTransformer:
    torch.manual_seed(0)
    sizes = (D, W, CONTEXT, N, BUCKETS, DOTS, 16, 3, 2, embedding, head)
    return sharpened(ARPriorTransformer(*sizes, text_states=text_states).double())


def sharpened(net: ARPriorTransformer) -> ARPriorTransformer:
    """With heads that start far from uniform: wrong logits are to show in the codes."""
    with torch.no_grad():
        for parameter in [*net.head.parameters(), *net.dot_head.parameters()]:
            parameter.normal_(std=0.5)
    return net


def captions(*lengths: int, seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), W, generator=g, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    embed = torch.randn(len(lengths), D, generator=g, dtype=torch.float64)
    return TextFeatures(mask.long(), states, mask, embed)


VALUES_OF = torch.randn(N, BUCKETS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def values(codes: Tensor) -> Tensor:
    return VALUES_OF.T.gather(0, codes)


def tokens(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, DOTS, (batch,), generator=g), torch.randint(0, BUCKETS, (batch, N), generator=g)


def run(net: ARPriorTransformer, text: TextFeatures, dot: Tensor, codes: Tensor) -> ARLogits:
    return net(text, dot, codes, values(codes))


@pytest.mark.parametrize(("embedding", "head"), PARTS)
def test_a_fresh_network_says_nothing(embedding: type, head: type) -> None:
    """Uniform logits, whose cross-entropy is ln(buckets); the first gradient goes to the heads alone, and to both."""
    net = ARPriorTransformer(D, W, CONTEXT, N, BUCKETS, DOTS, 16, 3, 2, embedding, head).double()
    dot, codes = tokens(3)
    logits = run(net, captions(4, 2, 6), dot, codes)
    loss = F.cross_entropy(logits.codes.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(loss.item(), log(BUCKETS))
    torch.testing.assert_close(F.cross_entropy(logits.dot, dot).item(), log(DOTS))
    (loss + F.cross_entropy(logits.dot, dot)).backward()
    moved = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"head", "dot_head"}


@pytest.mark.parametrize(("embedding", "head"), PARTS)
def test_causality(embedding: type, head: type) -> None:
    """The dot token is predicted from the caption alone; code j from dot and codes before j, and from all of them."""
    net, text = build(embedding, head), captions(4)
    dot, codes = tokens(1)
    before = run(net, text, dot, codes)
    assert before.dot.shape == (1, DOTS)
    assert before.codes.shape == (1, N, BUCKETS)
    changed = run(net, text, (dot + 1) % DOTS, codes)
    torch.testing.assert_close(changed.dot, before.dot, rtol=0, atol=0)
    assert (changed.codes != before.codes).any(-1).all()
    for j in range(N):
        other = codes.clone()
        other[:, j] = (other[:, j] + 1) % BUCKETS
        changed = run(net, text, dot, other)
        torch.testing.assert_close(changed.codes[:, : j + 1], before.codes[:, : j + 1], rtol=1e-12, atol=1e-12)
        assert (changed.codes[:, j + 1 :] - before.codes[:, j + 1 :]).abs().amax(-1).gt(1e-6).all()


def test_padding_and_cutting_change_nothing() -> None:
    net, text = build(), captions(5, 2)
    dot, codes = tokens(2)
    expected = run(net, text, dot, codes)
    garbage = torch.full((2, 2, W), 1e3, dtype=torch.float64)
    padded = TextFeatures(
        F.pad(text.tokens, (0, 2)), torch.cat([text.states, garbage], 1), F.pad(text.mask, (0, 2)), text.embed
    )
    short = TextFeatures(text.tokens[1:, :2], text.states[1:, :2], text.mask[1:, :2], text.embed[1:])
    for got, wanted in zip(run(net, padded, dot, codes), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(run(net, short, dot[1:], codes[1:]), expected, strict=True):
        torch.testing.assert_close(got, wanted[1:])


@pytest.mark.parametrize(("embedding", "head"), PARTS)
def test_gradient_reaches_every_parameter(embedding: type, head: type) -> None:
    net = build(embedding, head)
    dot, codes = tokens(2)
    logits = run(net, captions(CONTEXT, 3), dot, codes)
    (logits.dot.square().sum() + logits.codes.square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_text_transformer_of_its_own_reads_tokens_and_not_clips_states() -> None:
    torch.manual_seed(0)
    encoder = TextTransformer(12, 1, 2, context_length=CONTEXT, vocab_size=20)
    net = sharpened(ARPriorTransformer(D, W, CONTEXT, N, BUCKETS, DOTS, 16, 3, 2, text_encoder=encoder).double())
    text = captions(4, 2, 6)
    text = text._replace(tokens=torch.arange(18).view(3, 6) * text.mask)
    dot, codes = tokens(3)
    logits = run(net, text, dot, codes)
    blind = run(net, text._replace(states=torch.zeros_like(text.states)), dot, codes)
    torch.testing.assert_close(blind, logits)
    other = run(net, text._replace(tokens=(text.tokens + 1) % 20 * text.mask), dot, codes)
    assert (other.codes - logits.codes).abs().amax((1, 2)).min() > 1e-4
    with torch.no_grad():
        expected = reference(net, text, None, 1.0, seed=7, quantile=0.5)
    got = net.generate(text, values_of=VALUES_OF, generator=torch.Generator().manual_seed(7))
    assert torch.equal(got[:, 0], expected)
    (logits.dot.square().sum() + logits.codes.square().sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def reference(
    net: ARPriorTransformer, text: TextFeatures, null: TextFeatures | None, guidance: float, seed: int, quantile: float
) -> Tensor:
    """One draw per caption with the whole sequence recomputed for every token, and no cache."""
    g = torch.Generator().manual_seed(seed)
    batch = len(text.embed)
    dot, codes = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, N, dtype=torch.long)

    def logits() -> ARLogits:
        cond = run(net, text, dot, codes)
        if null is None:
            return cond
        uncond = run(net, null.repeat(batch), dot, codes)
        return ARLogits(*(u + guidance * (c - u) for c, u in zip(cond, uncond, strict=True)))

    dot = draw(upper_quantile(logits().dot.float().softmax(-1), quantile), generator=g)
    for j in range(N):
        codes[:, j] = draw(logits().codes[:, j].float().softmax(-1), generator=g)
    return codes


@pytest.mark.parametrize(("embedding", "head"), PARTS)
@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
def test_cached_decoding_equals_full_forward(embedding: type, head: type, guidance: float) -> None:
    net, text = build(embedding, head), captions(4, 2, 6, 5, 3, 3)
    null = captions(2, seed=9) if guidance != 1 else None
    with torch.no_grad():
        expected = reference(net, text, null, guidance, seed=7, quantile=0.5)
    got = net.generate(
        text,
        values_of=VALUES_OF,
        unconditional=null,
        guidance=guidance,
        generator=torch.Generator().manual_seed(7),
    )
    assert got.shape == (6, 1, N)
    assert torch.equal(got[:, 0], expected)


def test_unconditional_rows_or_one_row() -> None:
    net, text, null = build(), captions(4, 2), captions(2, seed=9)
    go = partial(net.generate, text, values_of=VALUES_OF, guidance=3.0)
    one = go(unconditional=null, generator=torch.Generator().manual_seed(1))
    rows = null.repeat(2)
    assert torch.equal(one, go(unconditional=rows, generator=torch.Generator().manual_seed(1)))
    ignored = net.generate(
        captions(3, 3, seed=4),
        values_of=VALUES_OF,
        unconditional=null,
        guidance=0.0,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(ignored, go(unconditional=null, guidance=0.0, generator=torch.Generator().manual_seed(1)))


def test_candidates_are_repeated_captions() -> None:
    """C candidates of B captions are the draws of B·C captions, so sharing the prefix changes nothing; they differ."""
    net, text = build(), captions(4, 2, 3)
    shared = net.generate(text, values_of=VALUES_OF, candidates=6, generator=torch.Generator().manual_seed(2))
    repeated = text.repeat(6)
    apart = net.generate(repeated, values_of=VALUES_OF, generator=torch.Generator().manual_seed(2))
    assert shared.shape == (3, 6, N)
    assert torch.equal(shared.flatten(0, 1), apart[:, 0])
    assert len(shared[0].unique(dim=0)) > 1


def test_one_prefill_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    net, rows = build(), []
    encode = net.encode_prefix

    def counted(text: TextFeatures) -> tuple[Tensor, Prefix]:
        rows.append(len(text.embed))
        return encode(text)

    monkeypatch.setattr(net, "encode_prefix", counted)
    null = captions(2, seed=9)
    net.generate(captions(4, 2), values_of=VALUES_OF, candidates=16, guidance=2.0, unconditional=null)
    assert rows == [2, 1]


def test_draws_follow_the_network() -> None:
    """Frequencies of the first code over 20,000 candidates are Σ_dot p(dot) p(code | dot), for plain sampling."""
    net, text = build(), captions(4)
    codes = net.generate(
        text, values_of=VALUES_OF, dot_quantile=0.0, candidates=20_000, generator=torch.Generator().manual_seed(0)
    )[0]
    dots = torch.arange(DOTS)
    repeated = text.repeat(DOTS)
    with torch.no_grad():
        logits = run(net, repeated, dots, torch.zeros(DOTS, N, dtype=torch.long))
    expected = logits.dot[0].softmax(-1) @ logits.codes[:, 0].softmax(-1)
    counts = torch.bincount(codes[:, 0], minlength=BUCKETS) / len(codes)
    torch.testing.assert_close(counts.double(), expected, atol=0.015, rtol=0)  # 4 standard errors of a half


def test_cold_draws_are_greedy() -> None:
    net, text = build(), captions(4, 2)
    cold = net.generate(text, values_of=VALUES_OF, temperature=1e-4, dot_quantile=0.0, candidates=3)
    assert (cold == cold[:, :1]).all()
    with torch.no_grad():
        dot = run(net, text, *tokens(2)).dot.argmax(-1)
        logits = run(net, text, dot, cold[:, 0]).codes
    assert torch.equal(logits.argmax(-1), cold[:, 0])


def test_same_seed_same_codes() -> None:
    net, text = build(), captions(4, 2)
    a, b, c = (net.generate(text, values_of=VALUES_OF, candidates=4, generator=g) for g in map(seeded, (1, 1, 2)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [
        (0.0, [0.2, 0.4, 0.1, 0.3]),
        (0.5, [0.0, 0.2, 0.2, 0.6]),  # 0.1 of the second bucket's 0.4 lies above the median
        (0.6, [0.0, 0.0, 0.25, 0.75]),
        (0.85, [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_upper_quantile_in_closed_form(quantile: float, expected: list[float]) -> None:
    p = torch.tensor([[0.2, 0.4, 0.1, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(upper_quantile(p, quantile), torch.tensor([expected], dtype=torch.float64))


def test_upper_quantile_of_plain_sampling_is_exact() -> None:
    p = torch.rand(50, 300, generator=seeded(0)).softmax(-1)
    torch.testing.assert_close(upper_quantile(p, 0.0), p, rtol=1e-6, atol=0)


def test_upper_half_of_a_fine_uniform_is_its_upper_half() -> None:
    half = upper_quantile(torch.full((1000,), 1e-3, dtype=torch.float64), 0.5)
    torch.testing.assert_close(half, torch.tensor([0.0, 2e-3], dtype=torch.float64).repeat_interleave(500))


def test_draw_frequencies() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    counts = torch.bincount(draw(p.expand(40_000, 4), generator=seeded(0)), minlength=4) / 40_000
    torch.testing.assert_close(counts, p, atol=0.01, rtol=0)
    assert counts[1] == 0


def test_fourier_features_know_the_value_and_nothing_else() -> None:
    embedding = FourierCodeEmbedding(16, N, BUCKETS)
    v, position = torch.randn(2, 3, generator=seeded(0)), torch.arange(3)
    a = embedding(torch.zeros(2, 3).long(), v, position)
    assert torch.equal(a, embedding(torch.ones(2, 3).long(), v, position + 2))
    zero = torch.zeros(1, 1).long()
    near, far = (embedding(zero, torch.full((1, 1), value), position[:1]) for value in (0.0, 1e-3))
    assert (far - near).norm() < 0.2 * near.norm()


def test_a_cosine_series_of_the_rank() -> None:
    """DCT-II: its terms are orthogonal, and with all of them every distribution can be said."""
    head = CosineHead(width=3, code_length=2, buckets=16, terms=99)
    assert head.cosines.shape == (15, 16)
    torch.testing.assert_close(head.cosines @ head.cosines.T, torch.eye(15) * 16 / 15)
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.bias.copy_(torch.eye(15)[1])
    rank = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(
        head(torch.randn(1, 2, 3), torch.arange(2))[0, 1], (2 / 15) ** 0.5 * torch.cos(2 * torch.pi * rank)
    )


def test_a_code_teaches_its_neighbours() -> None:
    """After one step of gradient descent on one code, the nearer a bucket the likelier it has become."""
    torch.manual_seed(0)
    head, hidden = CosineHead(width=8, code_length=1, buckets=64, terms=8), torch.randn(1, 1, 8)
    before = head(hidden, torch.arange(1))[0, 0]
    torch.nn.functional.cross_entropy(before[None], torch.tensor([20])).backward()
    with torch.no_grad():
        torch.optim.SGD(head.parameters(), lr=0.1).step()
        risen = head(hidden, torch.arange(1))[0, 0] - before
    assert risen[18:23].min() > 0.5 * risen[20]
    assert risen[20] > 3 * risen[40:].abs().max()


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"dot_quantile": 1.0}, {"candidates": 0}, {"guidance": 2.0}])
def test_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected temperature|Expected unconditional, the empty caption"):
        build().generate(captions(2), values_of=VALUES_OF, **bad)


def test_without_text_states_z_t_alone_speaks() -> None:
    """The rest is the same network: a whole one that is given no tokens agrees."""
    whole, alone = build(), build(text_states=False)
    text, (dot, codes) = captions(4, 2, 6), tokens(3)
    bare = text.without_states()
    for a, b in zip(run(alone, text, dot, codes), run(whole, bare, dot, codes), strict=True):
        torch.testing.assert_close(a, b)
    options = {"values_of": VALUES_OF, "guidance": 2.0}
    drawn = [
        net.generate(given, unconditional=given.rows(slice(1)), generator=torch.Generator().manual_seed(0), **options)
        for net, given in ((alone, text), (whole, bare))
    ]
    assert torch.equal(*drawn)


def test_a_text_encoder_reads_tokens() -> None:
    encoder = TextTransformer(8, 1, 2, CONTEXT, 20)
    with pytest.raises(ValueError, match=r"Expected text_states with a text_encoder\. Got false"):
        ARPriorTransformer(D, W, CONTEXT, N, width=16, layers=1, heads=2, text_encoder=encoder, text_states=False)
