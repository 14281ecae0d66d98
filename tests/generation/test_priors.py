"""Identities that guidance, candidates and the closed-form baseline must obey, on small random networks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import Ancestral, DPMSolver, GaussianDiffusion, Heun, LinearSchedule
from unclip_pl.generation import guide
from unclip_pl.generation.guide import GuideSpec
from unclip_pl.generation.priors import (
    ARPriorSpec,
    DiffusionPrior,
    DiffusionPriorSpec,
    LinearPriorSpec,
    RoundTripSpec,
    TextEmbeddingSpec,
    TrueEmbeddingSpec,
    best_of,
)
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.prior import PriorMLP, PriorNetwork, PriorTransformer
from unclip_pl.nn.ridge import fit_ridge, save_linear_prior
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.types import PriorBatch, TextFeatures

D, W, CONTEXT = 8, 6, 10


def captions(n: int, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(2, 6, (n, 1), generator=generator)
    states = torch.randn(n, 5, W, generator=generator) * mask[..., None]
    return TextFeatures(mask.long(), states, mask, torch.randn(n, D, generator=generator))


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    null = TextFeatures(torch.ones(1, 2).long(), torch.randn(1, 2, W), torch.ones(1, 2).bool(), torch.randn(1, D))
    write_statistics(
        tmp_path / "s.safetensors", moments=Moments.of(torch.randn(99, D)), null_text=null, fingerprint="c"
    )
    return str(tmp_path / "s.safetensors")


@pytest.fixture(params=["transformer", "mlp"])
def task(statistics: str, request: pytest.FixtureRequest) -> DiffusionPriorTask:
    torch.manual_seed(0)
    net: PriorNetwork = PriorTransformer(D, W, CONTEXT, width=16, layers=2, heads=2)
    if request.param == "mlp":
        net = PriorMLP(D, W, width=16, blocks=2)
        for layer in (net.out_proj, *(block.out_proj for block in net.blocks)):
            torch.nn.init.normal_(layer.weight, std=0.2)  # it starts at zero, and so deaf
    return DiffusionPriorTask(net, statistics, draws_per_caption=2).eval()


def prior(task: DiffusionPriorTask, guidance: float, candidates: int = 1) -> DiffusionPrior:
    return DiffusionPrior(DiffusionPriorSpec("", Ancestral(5), guidance, candidates), task)


def draw(prior: DiffusionPrior, text: TextFeatures) -> Tensor:
    return prior.embed(text, generator=torch.Generator().manual_seed(1))


def denoised(prior: DiffusionPrior, text: TextFeatures, x_t: Tensor) -> Tensor:
    with torch.no_grad():
        return prior._denoiser(text)(x_t, torch.full((len(x_t),), 0.5)).x0


def test_scale_1_is_the_conditional_pass(task: DiffusionPriorTask) -> None:
    text, x_t = captions(4), torch.randn(4, 1, D)
    close = denoised(prior(task, 1 + 1e-6), text, x_t)
    torch.testing.assert_close(denoised(prior(task, 1.0), text, x_t), close, rtol=1e-4, atol=1e-5)


def test_scale_0_hides_the_text_and_never_x_t(task: DiffusionPriorTask) -> None:
    x_t = torch.randn(4, 1, D)
    one, other = (denoised(prior(task, 0.0), captions(4, seed), x_t) for seed in (0, 1))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, denoised(prior(task, 0.0), captions(4), torch.randn(4, 1, D)), atol=1e-3)


def test_guidance_is_the_line_through_both(task: DiffusionPriorTask) -> None:
    text, x_t = captions(4), torch.randn(4, 1, D)
    off, on, far = (denoised(prior(task, scale), text, x_t) for scale in (0.0, 1.0, 3.0))
    torch.testing.assert_close(far, off + 3 * (on - off), rtol=1e-4, atol=1e-4)


def test_an_empty_caption_is_the_unconditional_one(task: DiffusionPriorTask) -> None:
    null = task.space.null_text
    x_t = torch.randn(1, 1, D)
    torch.testing.assert_close(denoised(prior(task, 1.0), null, x_t), denoised(prior(task, 0.0), captions(1), x_t))


def test_same_seed_same_bytes(task: DiffusionPriorTask) -> None:
    text = captions(3)
    assert torch.equal(draw(prior(task, 2.0, 2), text), draw(prior(task, 2.0, 2), text))


def test_more_candidates_are_closer_to_the_text(task: DiffusionPriorTask) -> None:
    text = captions(64)
    z_t = F.normalize(text.embed, dim=-1)
    one, eight = ((draw(prior(task, 1.0, n), text) * z_t).sum(-1).mean() for n in (1, 8))
    assert eight > one


def test_evaluations_follow_from_the_settings(task: DiffusionPriorTask) -> None:
    one = prior(task, 1.0)
    assert one.evaluations == 5
    assert one.adjusted(candidates=3).evaluations == 15
    assert one.adjusted(guidance=2.0).evaluations == 10
    assert one.adjusted(guidance=2.0).adjusted(guidance=1.0, candidates=2).evaluations == 10
    assert one.adjusted(guidance=2.0, sampler=Heun(4)).evaluations == 14
    assert one.evaluations == 5


def test_another_solver_is_as_if_it_were_the_specs(task: DiffusionPriorTask) -> None:
    other = DiffusionPrior(DiffusionPriorSpec("", DPMSolver(6), 1.0, 1), task)
    assert torch.equal(draw(prior(task, 1.0).adjusted(sampler=DPMSolver(6)), captions(3)), draw(other, captions(3)))
    with pytest.raises(ValueError, match="posterior_mse"):
        prior(task, 1.0).adjusted(sampler=Ancestral(6, "analytic"))


def adjusted(task: DiffusionPriorTask, guide: DiffusionPriorTask | None = None, **settings: Any) -> DiffusionPrior:
    return DiffusionPrior(DiffusionPriorSpec("", Ancestral(5), candidates=1, **settings), task, guide)


def test_an_interval_of_everything_is_plain_guidance(task: DiffusionPriorTask) -> None:
    text = captions(3)
    for interval, plain in (((0.0, 1e9), prior(task, 3.0)), ((1e8, 1e9), prior(task, 1.0))):
        assert torch.equal(draw(adjusted(task, guidance=3.0, guidance_interval=interval), text), draw(plain, text))


def test_outside_its_interval_a_prior_is_asked_once(task: DiffusionPriorTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations that are reported are the captions that the network saw, over a batch of 3."""
    times = torch.tensor(Ancestral(5).times(task.diffusion)[:-1], dtype=torch.float64)
    high, low = task.diffusion.schedule.level(times)[[1, 2]].tolist()
    seen: list[int] = []
    forward = type(task.net).forward
    monkeypatch.setattr(
        type(task.net), "forward", lambda net, x_t, *a, **k: (seen.append(len(x_t)), forward(net, x_t, *a, **k))[1]
    )
    for weak in (None, task):
        seen.clear()
        part = adjusted(task, weak, guidance=3.0, guidance_interval=(low, high))
        draw(part, captions(3))
        assert part.evaluations == 7
        assert sum(seen) == 3 * 7
        assert part.adjusted(guidance=1.0).evaluations == 5


def test_a_prior_is_led_away_from_its_guide(task: DiffusionPriorTask) -> None:
    text, x_t = captions(4), torch.randn(4, 1, D)
    torch.manual_seed(1)
    weak = copy.deepcopy(task)
    for p in weak.parameters():
        p.data += 0.1 * torch.randn_like(p)
    strong, weaker = (denoised(prior(which, 1.0), text, x_t) for which in (task, weak))
    led = denoised(adjusted(task, weak, guidance=2.5), text, x_t)
    torch.testing.assert_close(led, weaker + 2.5 * (strong - weaker), rtol=1e-4, atol=1e-4)
    same = denoised(adjusted(task, task, guidance=2.5), text, x_t)
    torch.testing.assert_close(same, strong, rtol=1e-5, atol=1e-5)


def test_a_guide_that_does_not_fit_is_refused(
    task: DiffusionPriorTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(change: Callable[[DiffusionPriorTask], None], match: str) -> None:
        other = copy.deepcopy(task)
        change(other)
        monkeypatch.setattr(guide, "load_part", lambda *_: other)
        with pytest.raises(ValueError, match=match):
            GuideSpec("weak.ckpt").load(tmp_path, "cpu", task)

    def another_clip(other: DiffusionPriorTask) -> None:
        other.space.fingerprint_bytes = torch.tensor(list(b"other"), dtype=torch.uint8)

    refused(another_clip, r"weak.ckpt was trained on embeddings of CLIP 'other', .* on those of 'c'")
    refused(lambda other: setattr(other, "diffusion", GaussianDiffusion(LinearSchedule(), "x0")), "other noise levels")
    refused(lambda other: setattr(other.space, "scaling", "raw"), "embeddings of another scale")
    for interval in ((3.0, 0.2), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="put the lower one first"):
            DiffusionPriorSpec("", guidance_interval=interval)


def test_best_of_keeps_the_largest_dot_product() -> None:
    text = captions(2)
    z_t = F.normalize(text.embed, dim=-1)
    candidates = torch.stack([-z_t, z_t, torch.zeros_like(z_t)], dim=1)
    torch.testing.assert_close(best_of(candidates, text), z_t)


def test_text_drop_1_makes_the_loss_blind_to_captions(task: DiffusionPriorTask) -> None:
    task.text_drop = 1.0
    z_i = torch.randn(6, D)
    one, other = (task.loss(PriorBatch(z_i, captions(6, seed)), torch.Generator().manual_seed(2)) for seed in (0, 1))
    torch.testing.assert_close(one, other)


def test_ridge_finds_a_linear_map_and_a_large_penalty_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(D, D)).Q
    z_t = torch.randn(500, D)
    weight, bias = fit_ridge(z_t, z_t @ rotation.T, 1e-9)
    torch.testing.assert_close(weight.float(), rotation, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias.float(), torch.zeros(D), rtol=0, atol=1e-4)
    flat, mean = fit_ridge(z_t, z_t @ rotation.T, 1e9)
    assert flat.abs().max() < 1e-6
    torch.testing.assert_close(mean, F.normalize((z_t @ rotation.T).double(), dim=-1).mean(0), rtol=0, atol=1e-6)

    save_linear_prior(tmp_path / "l.safetensors", weight, bias, fingerprint="c", seconds=1.5)
    loaded = LinearPriorSpec("l.safetensors").load(tmp_path)
    text = captions(5)
    torch.testing.assert_close(loaded.embed(text), F.normalize(text.embed @ rotation.T, dim=-1), rtol=0, atol=1e-3)
    assert loaded.fingerprint == "c"
    assert loaded.record.seconds == 1.5


def test_floor_and_ceiling() -> None:
    batch = PriorBatch(torch.randn(3, D), captions(3))
    floor, ceiling = TextEmbeddingSpec().load(Path()), TrueEmbeddingSpec().load(Path())
    torch.testing.assert_close(floor.embed_batch(batch), F.normalize(batch.text.embed, dim=-1))
    torch.testing.assert_close(ceiling.embed_batch(batch), F.normalize(batch.image_embed, dim=-1))
    with pytest.raises(ValueError, match="needs the image"):
        ceiling.embed(batch.text)


def test_settings_out_of_range_are_refused_before_anything_is_read() -> None:
    for kind in (ARPriorSpec, DiffusionPriorSpec):
        with pytest.raises(ValueError, match=r"guidance >= 0.* Got -1"):
            kind("", guidance=-1.0)
        with pytest.raises(ValueError, match="candidates >= 1"):
            kind("", candidates=0)
    with pytest.raises(ValueError, match=r"temperature > 0.* Got 0.0"):
        ARPriorSpec("", temperature=0.0)
    with pytest.raises(ValueError, match=r"dot_quantile < 1.* Got 1.0, 1.0"):
        ARPriorSpec("", dot_quantile=1.0)


def test_a_round_trip_is_the_codec_s_and_nearer_with_every_axis(tmp_path: Path) -> None:
    z_i = torch.randn(2000, D, generator=torch.Generator().manual_seed(0)) * 0.6 ** torch.arange(D) + 1
    codec = EmbeddingCodec.fit(lambda: [(z_i, z_i)], fingerprint="c", code_length=6, buckets=64, dot_buckets=8)
    codec.save(tmp_path / "codec.safetensors")
    batch = PriorBatch(3 * z_i, captions(len(z_i)))
    trips = [RoundTripSpec("codec.safetensors", axes).load(tmp_path) for axes in (1, 2, 4, 6)]
    cosines = [F.cosine_similarity(trip.embed_batch(batch), z_i, dim=-1).mean().item() for trip in trips]
    assert cosines == sorted(cosines)
    torch.testing.assert_close(trips[-1].embed_batch(batch), codec.decode(codec.encode(z_i)))
    assert trips[0].fingerprint == "c"
    for axes in (0, 7):
        with pytest.raises(ValueError, match="from 1 to the 6"):
            RoundTripSpec("codec.safetensors", axes).load(tmp_path)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_every_parameterisation_is_clamped_alike(task: DiffusionPriorTask, prediction: str) -> None:
    """An estimate far outside is cut at the bound, one inside passes untouched; at t = 1 errors count 500-fold."""
    task.diffusion = GaussianDiffusion(prediction=prediction)  # type: ignore[arg-type]
    text, x_t, t = captions(4), torch.randn(4, 1, D), torch.ones(4)
    free, wide, tight = (
        DiffusionPrior(DiffusionPriorSpec("", Ancestral(5), x0_bound=bound), task)._denoiser(text)(x_t, t).x0
        for bound in (None, 1e6, 0.1)
    )
    assert torch.equal(free, wide)
    assert torch.equal(tight, free.clamp(-0.1, 0.1))
    assert DiffusionPriorSpec("").x0_bound == 10
    if prediction == "eps":
        assert free.abs().max() > 50
