"""What the decoder's loss drops and how it computes, on small random networks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclip_pl.diffusion import GaussianDiffusion, LogitNormalTime, StraightPath
from unclip_pl.diffusion.process import TimeDensity
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.nn.unet import UNet
from unclip_pl.tasks import DecoderTask
from unclip_pl.types import DecoderBatch, TextFeatures

D, W = 6, 5


class At(TimeDensity):
    """Always the k-th time."""

    def __init__(self, k: int) -> None:
        self.k = k

    def draw(self, n: int, *, steps: int, device: Any = None, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((n,), self.k / steps, device=device)


class Listener(nn.Module):
    """A network that answers 0 and keeps what it was told."""

    def encode_condition(self, image_embed: Tensor, text: TextFeatures, keep_image: Tensor) -> None:
        self.image_embed, self.text, self.keep_image = image_embed, text, keep_image

    def forward(self, x: Tensor, index: Tensor, condition: None) -> Tensor:
        return torch.zeros_like(x)


def captions(n: int) -> TextFeatures:
    return TextFeatures(torch.ones(n, 3).long(), torch.randn(n, 3, W), torch.ones(n, 3).bool(), torch.randn(n, D))


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    path, moments = tmp_path / "s.safetensors", Moments.of(torch.randn(99, D))
    write_statistics(path, moments=moments, null_text=captions(1), fingerprint="c")
    return str(path)


def test_embedding_and_caption_are_dropped_independently(statistics: str) -> None:
    """10 % and 50 %: the caption alone is seen by 5 %, nothing at all by another 5 % (§2.1)."""
    n, net = 40_000, Listener()
    task = DecoderTask(net, statistics)  # type: ignore[arg-type]
    batch = DecoderBatch(torch.zeros(n, 3, 1, 1), torch.randn(n, D), captions(n))
    task.loss(batch, torch.Generator().manual_seed(0))
    null = task.space.scale_text(task.space.null_text)
    silent = (net.text.embed == null.embed).all(1)
    assert torch.equal(silent, (net.text.states == null.states).all(2).all(1))  # z_t goes with its token states
    assert torch.equal(net.image_embed, task.space.scale(batch.image_embed))
    blind = ~net.keep_image
    for share, p in [(blind, 0.1), (silent, 0.5), (blind & ~silent, 0.05), (blind & silent, 0.05)]:
        assert share.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_learned_variance_in_bfloat16_at_batch_1(k: int, statistics: str) -> None:
    """Finite, and the network that it trains too, from the likelihood of pixels to all but pure noise."""
    torch.manual_seed(k)
    net = UNet(
        channels=8, channel_mult=[1, 2], res_blocks=1, attention_levels=[1], head_channels=8, groups=4, embed_dim=D,
        text_width=W,
    )  # fmt: skip
    nn.init.normal_(net.conv_out.weight, std=0.3)  # outputs far from a trained network's
    task = DecoderTask(net, statistics, diffusion=GaussianDiffusion(time_density=At(k)))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    batch = DecoderBatch(torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, D), captions(1))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = task.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "diffusion", [GaussianDiffusion(StraightPath(), "velocity"), GaussianDiffusion(time_density=LogitNormalTime())]
)
def test_a_learned_variance_knows_no_times_between_steps(diffusion: GaussianDiffusion, statistics: str) -> None:
    net = UNet(
        channels=8, channel_mult=[1], res_blocks=1, attention_levels=[0], head_channels=8, groups=4, embed_dim=D,
        text_width=W,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"decoder of fixed variance on a straight path.* Got 6 output channels"):
        DecoderTask(net, statistics, diffusion=diffusion)


@pytest.mark.parametrize("image_drop", [1.0, 0.1])
def test_a_decoder_of_captions_alone_never_gets_the_embedding(image_drop: float, statistics: str) -> None:
    net = Listener()
    task = DecoderTask(net, statistics, image_drop=image_drop)  # type: ignore[arg-type]
    task.loss(DecoderBatch(torch.zeros(9, 3, 1, 1), torch.randn(9, D), captions(9)))
    assert not (net.keep_image.any() and image_drop == 1)
    for guidance in (1.0, 3.0):
        task.denoiser(torch.randn(9, D), captions(9), guidance)
        assert net.keep_image[:9].all() == (image_drop < 1)
        assert not net.keep_image[9:].any()
