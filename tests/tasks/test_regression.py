"""The prior without noise: its optimum in closed form, and its contrastive term by open_clip's loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.evaluation.callbacks import prior_of
from unclip_pl.generation.priors import RegressionPrior, RegressionPriorSpec
from unclip_pl.nn.prior import PriorMLP, PriorNetwork, PriorTransformer
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import RegressionPriorTask
from unclip_pl.types import PriorBatch, TextFeatures

D, N = 4, 20_000


class Linear(PriorNetwork):
    """An answer that is linear in z_t: the conditional mean of Gaussian data is one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = self.text_embed_dim = D
        self.out_proj = torch.nn.Linear(D, D)

    def predict(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        assert not x_t.any()
        assert (index == 999).all()
        return self.out_proj(text.embed)[:, None]

    def under(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("Nobody samples a regression.")


def alone(z_t: Tensor) -> TextFeatures:
    n = len(z_t)
    return TextFeatures(torch.zeros(n, 0).long(), torch.zeros(n, 0, 0), torch.zeros(n, 0).bool(), z_t)


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    """Those of embeddings that came without an empty caption: no caption is dropped, and none is asked for."""
    path = tmp_path / "s.safetensors"
    moments = Moments.of(torch.randn(99, D))
    write_statistics(path, moments=moments, null_text=alone(torch.zeros(1, 0)), fingerprint="c")
    return str(path)


def fitted(task: RegressionPriorTask, batch: PriorBatch) -> float:
    """Train on the whole batch to the end; the loss there."""
    optimizer = torch.optim.LBFGS(task.net.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss.item()

    optimizer.step(closure)  # type: ignore[arg-type]
    return closure()


def test_the_optimum_on_gaussian_data_is_the_conditional_mean(statistics: str) -> None:
    """z_i = A z_t + b + noise: the weights become A and b, and what is left of the loss is the noise's variance.

    With the contrastive term the answers move from there towards their own captions.
    """
    g = torch.Generator().manual_seed(0)
    A, b, z_t = (torch.randn(*shape, generator=g) for shape in ((D, D), (D,), (N, D)))
    z_i = z_t @ A.T + b + 0.5 * torch.randn(N, D, generator=g)
    batch = PriorBatch(z_i, alone(z_t))
    task = RegressionPriorTask(Linear(), statistics, scaling="raw")
    left = fitted(task, batch)
    layer = task.net.out_proj
    torch.testing.assert_close(layer.weight, A, rtol=0, atol=0.02)  # 4 standard errors, 0.5 / √N
    torch.testing.assert_close(layer.bias, b, rtol=0, atol=0.02)
    assert left == pytest.approx(0.25, rel=0.02)

    few = PriorBatch(z_i[:500], alone(z_t[:500]))
    both = RegressionPriorTask(Linear(), statistics, scaling="raw", contrastive=0.2, temperature=0.1)
    both.net.load_state_dict(task.net.state_dict())
    before = F.cosine_similarity(both.answer(few.text), few.text.embed).mean()
    fitted(both, few)
    assert F.cosine_similarity(both.answer(few.text), few.text.embed).mean() > before + 0.1


def test_the_contrastive_term_is_one_direction_of_open_clips(statistics: str) -> None:
    """ECLIPSE's eq. 4; its mean with the other direction is CLIP's loss."""
    task = RegressionPriorTask(Linear(), statistics, contrastive=0.2)
    answers, captions = torch.randn(2, 12, D)
    units = F.normalize(answers, dim=-1), F.normalize(captions, dim=-1)
    expected = ClipLoss()(*units, logit_scale=torch.tensor(1 / 0.01))
    torch.testing.assert_close((task.contrast(answers, captions) + task.contrast(captions, answers)) / 2, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # divided by .01, its cosines would be off by .2
        half = task.contrast(answers, captions)
    torch.testing.assert_close(half, task.contrast(answers, captions))
    plain = RegressionPriorTask(task.net, statistics)
    batch = PriorBatch(torch.randn(12, D), alone(captions))
    more = 0.2 * task.contrast(task.answer(batch.text), captions)
    torch.testing.assert_close(task.loss(batch), plain.loss(batch) + more)


def test_processes_contrast_with_all_captions(statistics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = RegressionPriorTask(Linear(), statistics, contrastive=0.2)
    answers, captions = torch.randn(2, 12, D)
    expected = task.contrast(answers, captions)
    monkeypatch.setattr(task, "all_gather", lambda _: captions.view(3, 4, D))
    task._world_size, losses = 3, []
    for task._rank in range(3):
        rows = slice(4 * task._rank, 4 * task._rank + 4)
        losses.append(task.contrast(answers[rows], captions[rows]))
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


@pytest.mark.parametrize("net", [PriorTransformer(D, 0, 0, 8, 1, 2, False), PriorMLP(D, 0, 8, 2, False)])
def test_every_network_answers_once(net: PriorNetwork, statistics: str) -> None:
    text = alone(torch.randn(5, D))
    if isinstance(net, PriorMLP):
        torch.nn.init.normal_(net.out_proj.weight)
    prior = prior_of(RegressionPriorTask(net, statistics).eval(), steps=8)
    assert isinstance(prior, RegressionPrior)
    assert prior.evaluations == 1
    z_i = prior.embed(text)
    torch.testing.assert_close(z_i.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(prior.embed(text.rows(slice(1, 2))), z_i[1:2])
    with pytest.raises(ValueError, match="Expected a prior with guidance"):
        RegressionPrior(RegressionPriorSpec(""), prior.part).adjusted(guidance=2.0)


def test_bad_settings_are_refused(statistics: str) -> None:
    for bad in ({"contrastive": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"Expected contrastive >= 0 and temperature > 0"):
            RegressionPriorTask(Linear(), statistics, **bad)
    with pytest.raises(ValueError, match=r"one width for the contrastive loss\. Got 4 and 3: set contrastive to 0"):
        RegressionPriorTask(PriorMLP(D, 0, 8, 1, False, text_embed_dim=3), statistics, contrastive=0.2)
