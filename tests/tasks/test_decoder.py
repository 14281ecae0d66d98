"""What the decoder's loss drops and how it computes, on small random networks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclip_pl.diffusion import DDIM, GaussianDiffusion, LogitNormalTime, StraightPath
from unclip_pl.diffusion.process import TimeDensity
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.nn.unet import UNet
from unclip_pl.parts.decoder import EmbeddingNoise
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


class LevelListener(Listener):
    """One that is told of noise on z_i."""

    image_levels, out_channels = True, 3

    def encode_condition(  # type: ignore[override]
        self, image_embed: Tensor, text: TextFeatures, keep_image: Tensor, level: Tensor
    ) -> None:
        super().encode_condition(image_embed, text, keep_image)
        self.level = level


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


@pytest.mark.parametrize(("scaling", "rms"), [("whiten", 1.0), ("unit", 0.5375)])
def test_a_level_of_noise_is_drawn_put_on_z_i_and_told(scaling: Any, rms: float, statistics: str) -> None:
    """What is left of √(1 − s²)·z_i is normal noise of s times the embeddings' RMS, for even levels from 0 on."""
    n, net = 20_000, LevelListener()
    task = DecoderTask(net, statistics, scaling=scaling, image_noise=0.4)  # type: ignore[arg-type]
    batch = DecoderBatch(torch.zeros(n, 3, 1, 1), torch.randn(n, D), captions(n))
    task.loss(batch, torch.Generator().manual_seed(0))
    level = net.level
    assert 0 <= level.min() < 0.001 < 0.399 < level.max() <= 0.4
    assert level.mean().item() == pytest.approx(0.2, abs=0.004)
    left = net.image_embed - (1 - level.square()).sqrt()[:, None] * task.space.scale(batch.image_embed)
    eps = left[level > 0.05] / (rms * level[level > 0.05][:, None])
    assert eps.mean().item() == pytest.approx(0, abs=0.01)
    assert eps.std().item() == pytest.approx(1, abs=0.01)


def test_a_sampler_chooses_the_level(statistics: str) -> None:
    net, text, z_i, eps = LevelListener(), captions(3), torch.randn(3, D), torch.randn(3, D)
    task = DecoderTask(net, statistics, scaling="whiten", image_noise=0.4)  # type: ignore[arg-type]
    scaled = task.space.scale(z_i)
    for noise, expected in ((None, scaled), (EmbeddingNoise(0.3, eps), (1 - 0.09) ** 0.5 * scaled + 0.3 * eps)):
        for guidance in (1.0, 2.0):
            task.denoiser(z_i, text, guidance, noise=noise)
            torch.testing.assert_close(net.image_embed[:3], expected)
            assert net.keep_image.tolist() == [True] * 3 + [False] * 3 * (guidance > 1)
            torch.testing.assert_close(net.level, torch.full_like(net.level, noise.level if noise else 0.0))


def test_noise_and_a_network_that_is_told_of_it_go_together(statistics: str) -> None:
    for net, options in (
        (Listener(), {"image_noise": 0.4}),
        (LevelListener(), {}),
        (LevelListener(), {"image_noise": 1.5}),
        (LevelListener(), {"image_noise": 0.4, "scaling": "raw"}),
    ):
        with pytest.raises(ValueError, match="Expected image_noise from 0 to 1, above 0 exactly if"):
            DecoderTask(net, statistics, **options)  # type: ignore[arg-type]


def test_a_level_is_heard_with_z_i_alone(statistics: str) -> None:
    """Only pictures that keep their z_i hear it; a spec's level is drawn again from the same seed."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "attention_levels": [1], "head_channels": 8}
    net = UNet(**sizes, out_channels=3, groups=4, embed_dim=D, text_width=W, image_levels=True)  # type: ignore[arg-type]
    text, z_i, keep = captions(2), torch.randn(2, D), torch.tensor([True, False])
    clean, told = (net.encode_condition(z_i, text, keep, level).time_bias for level in (None, torch.full((2,), 0.3)))
    assert (clean[0] - told[0]).abs().max() > 0.01
    torch.testing.assert_close(clean[1], told[1])

    for p in net.parameters():
        if not p.any():  # branches that start at zero
            torch.nn.init.normal_(p, std=0.1)
    task = DecoderTask(net, statistics, scaling="whiten", image_noise=0.4).eval()
    task.loss(DecoderBatch(torch.rand(2, 3, 8, 8), z_i, text)).backward()
    encoder = net.condition_encoder
    assert encoder is not None
    assert encoder.level_to_time is not None
    assert encoder.level_to_time.weight.grad is not None
    assert encoder.level_to_time.weight.grad.abs().sum() > 0

    def drawn(level: float) -> Tensor:
        decoder = Decoder(DecoderSpec("", 8, DDIM(3), noise_level=level), task)
        return decoder.decode(z_i, text, generator=torch.Generator().manual_seed(0))

    assert torch.equal(drawn(0.3), drawn(0.3))
    assert (drawn(0.3) - drawn(0.0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"noise_level from 0 to 0.4, the image_noise of .* Got 0.5"):
        drawn(0.5)
    guide = DecoderTask(net, statistics, scaling="whiten", image_noise=0.1)
    with pytest.raises(ValueError, match=r"a guide .* noise on z_i up to 0.3.* Got an image_noise of 0.1"):
        Decoder(DecoderSpec("", 8, DDIM(3), noise_level=0.3), task, guide=guide)
