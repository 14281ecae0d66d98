import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.nn.kernels import attend
from unclip_pl.nn.layers import Attention, Prefix, PrefixTransformer, Transformer, causal_mask, sinusoidal
from unclip_pl.types import TextFeatures


@pytest.fixture
def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(width=16, layers=3, heads=2).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(batch: int, length: int) -> Tensor:
    return causal_mask(torch.ones(batch, length, dtype=torch.bool))


def test_sinusoidal_is_cosine_first_with_half_as_divisor() -> None:
    expected = [[torch.tensor(f * i / 10_000 ** (k / 4)) for k in range(4)] for i, f in [(0, 1.0), (999, 1.0)]]
    angle = torch.tensor(expected)
    embedded = sinusoidal(torch.tensor([0.0, 999.0]), 8)
    torch.testing.assert_close(embedded, torch.cat([angle.cos(), angle.sin()], -1), atol=2e-4, rtol=0)
    assert embedded[0].tolist() == [1.0] * 4 + [0.0] * 4


def test_sinusoidal_shapes_and_precision() -> None:
    index = torch.arange(6).view(2, 3)
    assert sinusoidal(index, 7).shape == (2, 3, 7)
    assert sinusoidal(index, 7)[..., -1].eq(0).all()
    assert sinusoidal(index.bfloat16(), 8).dtype == torch.float32
    assert sinusoidal(index.double(), 8).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 4, 9])
def test_causal_attention_needs_no_mask_in_memory(length: int, dtype: torch.dtype) -> None:
    """Queries are all positions, or only the last few."""
    key, value = randn(3, 2, 9, 8, seed=1).to(dtype), randn(3, 2, 9, 8, seed=2).to(dtype)
    query = randn(3, 2, 9, 8).to(dtype)[:, :, 9 - length :]
    torch.testing.assert_close(
        attend(query, key, value, causal=True), attend(query, key, value, seen(1, 9)[:, :, 9 - length :])
    )


def test_a_prefix_closed_up_is_the_same_prefix() -> None:
    """Captions have different lengths. Every key that may be seen is seen, in any order."""
    torch.manual_seed(0)
    net = PrefixTransformer(6, 10, 7, 3, 16, 3, 2).double()
    count = torch.tensor([[7], [2], [1], [0]])
    mask = torch.arange(7) < count
    text = TextFeatures(mask.long(), randn(4, 7, 10), mask, randn(4, 6, seed=1))
    keys = F.pad(mask, (0, 1), value=True)
    _, plain = net.transformer(net.prefix_tokens(text), causal_mask(keys))
    tokens, closed = net.causal_prefix(text)
    _, causal = net.transformer(tokens, None)
    assert closed.sum(1).tolist() == keys.sum(1).tolist() == [8, 3, 2, 1]
    for ours, theirs in zip(causal, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[closed], b.transpose(1, 2)[keys])


@pytest.mark.parametrize("mask_shape", [None, (3, 1, 1, 9), (1, 1, 5, 9), (3, 1, 5, 9)])
def test_attention_in_bfloat16_is_that_in_float32_to_its_rounding(mask_shape: tuple[int, ...] | None) -> None:
    """Outputs and gradients; masked keys get none of either."""
    query, key, value = (randn(3, 2, n, 8, seed=n).float() for n in (5, 9, 9))
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(0)) < 0.6
        mask[..., 0] = True
        mask[..., 8] = False

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        out = attend(*leaves, mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for narrow, wide in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.02 * wide.abs().max().item())
        if mask is not None and narrow.shape[2] == 9:
            assert narrow[:, :, 8].eq(0).all()


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = Attention(width=6, heads=1).double()
    x = randn(2, 5, 6)
    q, k, v = attention.c_qkv(x).chunk(3, dim=-1)
    scores = (q @ k.mT / 6**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    out, _ = attention(x, seen(2, 5), None, None, 0)
    torch.testing.assert_close(out, attention.c_proj(scores.softmax(-1) @ v))


def test_causality(transformer: Transformer) -> None:
    """Output i depends on tokens 0 … i and on no other: read off the Jacobian."""
    x = randn(1, 5, 16).requires_grad_()
    out, _ = transformer(x, seen(1, 5))
    for i in range(5):
        (gradient,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [j <= i for j in range(5)]


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_continuing_equals_starting_over(transformer: Transformer, cut: int) -> None:
    x, mask = randn(2, 5, 16), seen(2, 5)
    whole, memory = transformer(x, mask)
    _, past = transformer(x[:, :cut], mask[..., :cut, :cut])
    rest, now = transformer(x[:, cut:], mask[..., cut:, :], past)
    torch.testing.assert_close(rest, whole[:, cut:])
    for ours, theirs in zip(now, memory, strict=True):
        torch.testing.assert_close(ours.key, theirs.key)
        torch.testing.assert_close(ours.value, theirs.value)


def test_static_slots_equal_appending(transformer: Transformer) -> None:
    x = randn(2, 6, 16)
    whole, _ = transformer(x, seen(2, 6))
    _, layers = transformer(x[:, :3], seen(2, 3))
    cache = Prefix(layers, torch.ones(2, 3, dtype=torch.bool)).pad(6)
    shapes = [layer.key.data_ptr() for layer in cache.layers]
    for i in range(3, 6):
        slot = torch.tensor([i])
        cache.mask.index_fill_(1, slot, True)
        out, now = transformer(x[:, i, None], cache.mask[:, None, None], cache.layers, slot=slot)
        torch.testing.assert_close(out, whole[:, i, None])
        assert [layer.key.data_ptr() for layer in now] == shapes  # nothing was allocated


@pytest.mark.parametrize("start", [0, 2, 5])
def test_start_skips_only_what_nobody_reads(transformer: Transformer, start: int) -> None:
    x = randn(2, 5, 16)
    whole, memory = transformer(x, seen(2, 5))
    out, now = transformer(x, seen(2, 5), start=start)
    torch.testing.assert_close(out, whole[:, start:])
    assert all(torch.equal(a.key, b.key) for a, b in zip(now, memory, strict=True))


def test_prefix_expand_repeat_and_cat(transformer: Transformer) -> None:
    def prefix(x: Tensor) -> Prefix:
        keys = torch.ones(x.shape[:2], dtype=torch.bool)
        return Prefix(transformer(x, causal_mask(keys))[1], keys)

    def follow(p: Prefix) -> Tensor:
        mask = F.pad(p.mask, (0, 1), value=True)[:, None, None]
        return transformer(randn(1, 1, 16, seed=5).expand(len(p.mask), -1, -1), mask, p.layers)[0]

    a, b = randn(2, 4, 16), randn(1, 2, 16, seed=1)
    apart = torch.cat([follow(prefix(a)), follow(prefix(b))])
    torch.testing.assert_close(follow(prefix(a).cat(prefix(b))), apart)
    torch.testing.assert_close(follow(prefix(b).cat(prefix(a))), apart[[2, 0, 1]])
    torch.testing.assert_close(follow(prefix(b).expand(3)), apart[[2, 2, 2]])
    torch.testing.assert_close(follow(prefix(a).repeat(2)), apart[[0, 0, 1, 1]])
    assert prefix(b).expand(3).layers[0].key.stride(0) == 0  # no copy


def test_deep_stacks_start_calm() -> None:
    """The variance of the residual stream stays of order one at any depth."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, 64)
    shallow, deep = (Transformer(64, n, 4)(x, seen(8, 6))[0].std() for n in (1, 32))
    assert deep < 1.5 * shallow


def test_errors() -> None:
    with pytest.raises(ValueError, match="heads to divide"):
        Transformer(10, 1, 3)
    net = PrefixTransformer(4, 4, context_length=3, suffix_length=1, width=8, layers=1, heads=1)
    text = TextFeatures(torch.zeros(1, 4).long(), torch.zeros(1, 4, 4), torch.ones(1, 4).bool(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="context_length = 3"):
        net.prefix_tokens(text)


def test_states_that_the_data_leave_out_are_not_missed_in_silence() -> None:
    """Data without token states have width 0: who reads them says so, who does not works as ever."""
    sizes = {"context_length": 3, "suffix_length": 1, "width": 8, "layers": 1, "heads": 1}
    with pytest.raises(ValueError, match=r"no token states: set .*text_states to false"):
        PrefixTransformer(4, 0, **sizes)
    torch.manual_seed(0)
    whole = TextFeatures(torch.ones(2, 2).long(), torch.randn(2, 2, 4), torch.ones(2, 2).bool(), torch.randn(2, 4))
    left_out = whole._replace(states=whole.states[..., :0])
    reader, other = PrefixTransformer(4, 4, **sizes), PrefixTransformer(4, 4, **sizes, text_states=False)
    with pytest.raises(ValueError, match=r"Expected token states of width 4\. Got 0"):
        reader.prefix_tokens(reader.seen(left_out))
    assert torch.equal(other.prefix_tokens(other.seen(left_out)), other.prefix_tokens(other.seen(whole)))
    assert PrefixTransformer(4, 0, **sizes, text_states=False).prefix_tokens(whole.without_states()).shape == (2, 1, 8)
