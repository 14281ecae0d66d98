import torch

from unclip_pl.metrics.attributes import attribute_accuracy, captions_right, stated_match

STATED = torch.tensor([[0, 1, -1], [2, -1, -1], [1, 1, 1], [-1, -1, -1]])
READ = torch.tensor([[0, 1, 5], [0, 3, 2], [1, 1, -1], [4, 4, 4]])


def test_only_what_is_stated_counts() -> None:
    torch.testing.assert_close(stated_match(READ, STATED), torch.tensor([1.0, 0.0, 2 / 3, 1.0]))
    assert captions_right(READ, STATED).tolist() == [True, False, False, True]
    torch.testing.assert_close(attribute_accuracy(READ, STATED), torch.tensor([2 / 3, 1.0, 0.0]))


def test_unreadable_is_wrong_and_never_stated_is_nan() -> None:
    unread, stated = torch.full((1, 2), -1), torch.tensor([[3, -1]])
    assert stated_match(unread, stated).item() == 0
    assert not captions_right(unread, stated).item()
    assert attribute_accuracy(unread, stated)[0] == 0
    assert attribute_accuracy(unread, stated)[1].isnan()
