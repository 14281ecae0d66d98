"""Priors of embeddings without token states, without an empty caption, and of two widths."""

from pathlib import Path

import pytest
import torch

from unclip_pl.diffusion import Ancestral
from unclip_pl.generation.priors import ARPrior, ARPriorSpec, DiffusionPrior, DiffusionPriorSpec
from unclip_pl.nn.ar_prior import ARPriorTransformer
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.mixture_prior import MixturePriorTransformer
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import ARPriorTask, DiffusionPriorTask, MixturePriorTask
from unclip_pl.types import PriorBatch, TextFeatures

D, E = 6, 4  # widths of z_i and z_t
SIZES = {"width": 8, "layers": 2, "heads": 2, "text_states": False, "text_embed_dim": E}


def alone(z_t: torch.Tensor) -> TextFeatures:
    n = len(z_t)
    return TextFeatures(torch.zeros(n, 0).long(), torch.zeros(n, 0, 0), torch.zeros(n, 0).bool(), z_t)


def batch(n: int = 64) -> PriorBatch:
    return PriorBatch(torch.randn(n, D), alone(torch.randn(n, E)))


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    """Write statistics of embeddings that came without an empty caption."""
    torch.manual_seed(0)
    path = tmp_path / "statistics.safetensors"
    null = alone(torch.zeros(1, 0))
    write_statistics(path, moments=Moments.of(torch.randn(99, D)), null_text=null, fingerprint="import-1")
    return str(path)


def diffusion(statistics: str, **options: object) -> DiffusionPriorTask:
    return DiffusionPriorTask(PriorTransformer(D, 0, 0, **SIZES), statistics, null_text="learned", **options)


def test_the_learned_null_stands_for_every_dropped_caption(statistics: str) -> None:
    task, data = diffusion(statistics, text_drop=1.0), batch()
    first, other = (
        task.loss(data._replace(text=alone(z_t)), torch.Generator().manual_seed(0))
        for z_t in (data.text.embed, torch.randn(64, E))
    )
    assert torch.equal(first, other), "no caption is read"
    first.backward()
    assert task.learned_null.grad.abs().sum() > 0
    assert any(parameter is task.learned_null for parameter in task.optimizer(fused=False).param_groups[1]["params"])


def test_guidance_mixes_the_caption_with_the_learned_null(statistics: str) -> None:
    """Scale 0 is the null alone, and linear extrapolation holds at one step from noise."""
    torch.manual_seed(1)
    task = diffusion(statistics).eval()
    task.learned_null.data.normal_()
    z_t = torch.randn(3, E)

    def estimate(scale: float, text: TextFeatures) -> torch.Tensor:
        spec = DiffusionPriorSpec("", sampler=Ancestral(1), candidates=1, guidance=scale)
        denoise = DiffusionPrior(spec, task)._denoiser(text)
        return denoise(torch.ones(3, 1, D), torch.ones(3)).x0

    null, said = estimate(0.0, alone(z_t)), estimate(1.0, alone(z_t))
    torch.testing.assert_close(estimate(0.0, alone(torch.randn(3, E))), null)
    assert not torch.allclose(null, said)
    torch.testing.assert_close(estimate(3.0, alone(z_t)), null + 3 * (said - null))
    spec = DiffusionPriorSpec("", candidates=2)
    with pytest.raises(
        ValueError, match=r"Expected z_i and z_t of one width, to choose among 2 .*Got 6 and 4: set cand"
    ):
        DiffusionPrior(spec, task).embed(alone(z_t))


def test_captions_with_states_meet_a_learned_null_without(statistics: str) -> None:
    """The null has no tokens, so nothing of a dropped caption's states is seen."""
    net = PriorTransformer(D, 5, 3, width=8, layers=2, heads=2, text_embed_dim=E)
    task = DiffusionPriorTask(net, statistics, null_text="learned", text_drop=1.0)
    losses = [
        task.loss(
            PriorBatch(torch.ones(4, D), TextFeatures(torch.ones(4, 3).long(), s, torch.ones(4, 3).bool(), z_t)),
            torch.Generator().manual_seed(0),
        )
        for s, z_t in ((torch.zeros(4, 3, 5), torch.zeros(4, E)), (torch.randn(4, 3, 5), torch.randn(4, E)))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", [ARPriorTransformer, MixturePriorTransformer])
def test_an_ar_prior_meets_a_learned_null_in_bfloat16(kind: type, statistics: str, tmp_path: Path) -> None:
    """The null has no token, so padding has none to look at but itself."""
    torch.manual_seed(0)
    image, text = torch.randn(99, D), torch.randn(99, E)
    codec = str(tmp_path / "codec.safetensors")
    EmbeddingCodec.fit(
        lambda: [(image, text)], fingerprint="import-1", code_length=3, buckets=4, dot_buckets=1
    ).save(Path(codec))  # fmt: skip
    sizes = {"width": 8, "layers": 2, "heads": 2, "text_embed_dim": E}
    if kind is ARPriorTransformer:
        task = ARPriorTask(
            ARPriorTransformer(D, 5, 3, 3, 4, 1, **sizes), codec, statistics, null_text="learned", text_drop=0.5
        )
    else:
        task = MixturePriorTask(
            MixturePriorTransformer(D, 5, 3, 3, 2, **sizes), codec, statistics, null_text="learned", text_drop=0.5
        )
    captions = TextFeatures(
        torch.ones(16, 3).long(), torch.randn(16, 3, 5), torch.ones(16, 3).bool(), torch.randn(16, E)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(PriorBatch(torch.randn(16, D), captions), torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_data_without_an_empty_caption_ask_for_a_learned_null(statistics: str) -> None:
    with pytest.raises(ValueError, match=r"no features of the empty caption: set model.init_args.null_text to learned"):
        DiffusionPriorTask(PriorTransformer(D, 0, 0, **SIZES), statistics)


def test_the_ar_prior_of_two_widths_does_without_dot_token(statistics: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image, text = torch.randn(400, D), torch.randn(400, E)
    options = {"fingerprint": "import-1", "code_length": 3, "buckets": 4}
    with pytest.raises(ValueError, match=r"one width for the dot-product token. Got 6 and 4: set dot_buckets to 1"):
        EmbeddingCodec.fit(lambda: [(image, text)], **options, dot_buckets=2)
    with pytest.raises(ValueError, match=r"one width for the dot-product token"):
        ARPriorTransformer(D, 0, 0, 3, 4, 2, **SIZES)
    EmbeddingCodec.fit(lambda: [(image, text)], **options, dot_buckets=1).save(tmp_path / "codec.safetensors")
    net = ARPriorTransformer(D, 0, 0, 3, 4, 1, **SIZES)
    task = ARPriorTask(net, str(tmp_path / "codec.safetensors"), statistics, null_text="learned")
    torch.testing.assert_close(task.loss(batch()).item(), torch.log(torch.tensor(4.0)).item())  # nats of a code alone
    drawn = ARPrior(ARPriorSpec("", guidance=2.0), task).embed(alone(torch.randn(5, E)))
    assert drawn.shape == (5, D)
