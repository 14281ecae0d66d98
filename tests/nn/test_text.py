import pytest
import torch

from unclip_pl.nn.text import TextTransformer, mix_text
from unclip_pl.types import TextFeatures


def make_text(lengths: list[int], seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextFeatures(
        tokens=torch.randint(1, 50, (count, longest), generator=g) * mask,
        states=torch.randn(count, longest, 8, generator=g) * mask[..., None],
        mask=mask,
        embed=torch.randn(count, 6, generator=g),
    )


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("null_length", [2, 4, 7])
def test_mix_takes_whole_rows_from_the_one_or_the_other(null_length: int) -> None:
    text, null = make_text([4, 3, 1]), make_text([null_length], seed=1)
    length = max(4, null_length)
    mixed = mix_text(text, null, torch.tensor([True, False, True]))
    rows = [mixed.rows(slice(i, i + 1)) for i in range(3)]
    expected = [text.pad(length).rows(slice(i, i + 1)) for i in range(3)]
    expected[1] = null.pad(length)
    assert all(same(a, b) for a, b in zip(rows, expected, strict=True))


@pytest.fixture
def transformer() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(16, 2, 2, context_length=12, vocab_size=50)


def test_cut_and_padding_change_no_state(transformer: TextTransformer) -> None:
    text = make_text([3, 5])
    states, last = transformer(text.tokens, text.mask)
    assert states.shape == (2, 5, 16)
    wide = text.pad(10)
    junk = torch.where(wide.mask, wide.tokens, 7)  # what stands behind the mask is not read
    junked = transformer(junk, wide.mask)
    torch.testing.assert_close(junked.states[:, :5], states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(junked.last, last, rtol=1e-5, atol=1e-6)
    alone = transformer(text.tokens[:1, :3], text.mask[:1, :3])
    torch.testing.assert_close(alone.states, states[:1, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.last, last[:1], rtol=1e-5, atol=1e-6)


def test_captions_of_full_length_need_no_padding(transformer: TextTransformer) -> None:
    text = make_text([12])
    transformer(text.tokens, text.mask).states.square().sum().backward()
    assert transformer.padding_embedding.grad is not None
    assert transformer.padding_embedding.grad.eq(0).all()


def test_every_parameter_learns(transformer: TextTransformer) -> None:
    text = make_text([3, 5])
    weight = torch.randn(2, 5, 16)
    (transformer(text.tokens, text.mask).states * weight).sum().backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_text_longer_than_the_context_is_an_error(transformer: TextTransformer) -> None:
    text = make_text([13])
    with pytest.raises(ValueError, match="context_length=12"):
        transformer(text.tokens, text.mask)


def test_the_null_caption_leaves_out_what_the_captions_leave_out() -> None:
    text = TextFeatures(torch.ones(3, 2).long(), torch.zeros(3, 2, 0), torch.ones(3, 2).bool(), torch.randn(3, 4))
    null = TextFeatures(torch.zeros(1, 2).long(), torch.randn(1, 2, 5), torch.ones(1, 2).bool(), torch.randn(1, 4))
    mixed = mix_text(text, null, torch.tensor([True, False, True]))
    assert mixed.states.shape == (3, 2, 0)
    assert torch.equal(mixed.embed[1], null.embed[0])
    assert not mixed.tokens[1].any()
