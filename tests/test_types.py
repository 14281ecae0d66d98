import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from unclip_pl.types import PriorBatch, TextFeatures


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


def test_padding_keeps_what_was_there_and_hides_the_rest() -> None:
    text = make_text([3, 5])
    padded = text.pad(9)
    cut = TextFeatures(padded.tokens[:, :5], padded.states[:, :5], padded.mask[:, :5], padded.embed)
    assert same(cut, text)
    assert not padded.mask[:, 5:].any()
    assert padded.states[:, 5:].eq(0).all()
    assert padded.tokens[:, 5:].eq(0).all()


def test_padding_never_cuts() -> None:
    with pytest.raises(ValueError, match="at most 4 tokens"):
        make_text([5]).pad(4)


def test_cat_and_repeat_order() -> None:
    a, b, c = make_text([2, 4]), make_text([6], seed=1), make_text([1, 1], seed=2)
    joined = TextFeatures.cat([a, b, c])
    assert joined.mask.sum(1).tolist() == [2, 4, 6, 1, 1]
    assert torch.equal(joined.embed, torch.cat([a.embed, b.embed, c.embed]))
    assert same(joined.rows(slice(2)), a.pad(6))
    assert same(joined.rows(torch.tensor([2])), b)
    assert joined.repeat(2).mask.sum(1).tolist() == [2, 2, 4, 4, 6, 6, 1, 1, 1, 1]


def test_it_moves_by_itself_and_with_a_batch() -> None:
    text = make_text([2, 3])
    assert {part.device.type for part in text.to("meta")} == {"meta"}
    batch = move_data_to_device(PriorBatch(torch.zeros(2, 6), text), torch.device("meta"))
    assert isinstance(batch.text, TextFeatures)
    assert {part.device.type for part in batch.text} == {"meta"}
