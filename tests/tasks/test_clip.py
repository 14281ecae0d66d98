"""CLIP's training step against a plain one of open_clip's model: other memory format and kernels, same numbers."""

import copy

import pytest
import torch
from open_clip.loss import ClipLoss

from unclip_pl.parts import Optimization
from unclip_pl.tasks import ClipTask
from unclip_pl.types import ClipBatch

LR = 1e-3
EPS = 1e-3  # so large that Adam does not turn the rounding of a vanishing gradient into a step


@pytest.fixture
def task() -> ClipTask:
    torch.manual_seed(0)
    return ClipTask("tiny-rn", optimization=Optimization(lr=LR, eps=EPS)).train()


@pytest.fixture
def batch() -> ClipBatch:
    g = torch.Generator().manual_seed(1)
    tokens = torch.zeros(16, 16, dtype=torch.int64)
    tokens[:, :8] = torch.randint(1, 49_406, (16, 8), generator=g)
    tokens[:, 8] = 49_407
    return ClipBatch(torch.rand(16, 3, 32, 32, generator=g) * 2 - 1, tokens)


def test_two_steps_are_those_of_a_plain_loop(task: ClipTask, batch: ClipBatch) -> None:
    net = copy.deepcopy(task.net)
    optimizer, plain = task.optimizer(), torch.optim.AdamW(net.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
    for _ in range(2):
        task.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        ClipLoss()(*net(task.preprocess(batch.image), batch.tokens)).backward()
        plain.step()
        plain.zero_grad()
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(task.net.state_dict()[name], expected, atol=1e-2 * LR, rtol=1e-5, msg=name)


def test_bfloat16_changes_gradients_by_its_rounding_alone(task: ClipTask, batch: ClipBatch) -> None:
    gradients = []
    for bf16 in (False, True):
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task.loss(batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.net.parameters() if p.grad is not None]))
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.97  # how the sums are split over threads alone moves it by a few thousandths
