"""A run, put together: what `generate` promises."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import DDIM, Ancestral, GaussianDiffusion, LinearSchedule
from unclip_pl.errors import InputError
from unclip_pl.generation import decoding, guide, pipeline
from unclip_pl.generation.decoding import Decoder, DecoderSpec, Upsampler, UpsamplerSpec
from unclip_pl.generation.guide import GuideSpec
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.generation.run import read_run
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.parts import load_part
from unclip_pl.tasks import DecoderTask, UpsamplerTask


@pytest.fixture(scope="module")
def unclip(mini_run: Path) -> Unclip:
    return Unclip.load(mini_run)


def test_it_loads_in_silence(
    mini_run: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    unclip = Unclip.load(mini_run)
    unclip.prior("diffusion")
    assert not caplog.records, "open_clip says that our CLIP has random weights, before it gets its own"
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_rows_of_images_and_their_embeddings(unclip: Unclip) -> None:
    images, image_embed = unclip.generate(["a red star", "a ring"], num=2)
    assert images.shape == (4, 3, 32, 32)
    assert images.abs().max() <= 1
    torch.testing.assert_close(image_embed.norm(dim=-1), torch.ones(4))


def test_one_call_leaves_nothing_to_the_next(unclip: Unclip) -> None:
    before = unclip.generate(["a red star"]).images
    assert not torch.equal(unclip.generate(["a red star"], guidance=5.0).images, before)
    torch.testing.assert_close(unclip.generate(["a red star"]).images, before, rtol=0, atol=0)


def test_what_cannot_be_drawn_is_refused(unclip: Unclip) -> None:
    with pytest.raises(ValueError, match="a caption and num >= 1"):
        unclip.generate([])
    with pytest.raises(ValueError, match=r"no prior 'best'\. Expected one of diffusion, ar"):
        unclip.generate(["a red star"], prior="best")
    with pytest.raises(ValueError, match="TrueEmbedding needs the image"):
        unclip.generate(["a red star"], prior="ceiling")
    with pytest.raises(ValueError, match=r"guidance >= 0.* Got -2.0"):
        unclip.generate(["a red star"], guidance=-2.0)
    with pytest.raises(ValueError, match=r"guidance >= 0.* Got -2.0"):
        DecoderSpec("", guidance=-2.0)
    with pytest.raises(ValueError, match=r"guidance >= 0.* Got -1.0"):
        unclip.generate(["a red star"], prior_guidance=-1.0)
    with pytest.raises(ValueError, match=r"a prior with candidates, .* Got LinearPrior"):
        unclip.generate(["a red star"], prior="linear", candidates=4)
    with pytest.raises(ValueError, match=r"candidates >= 1. Got 0"):
        unclip.generate(["a red star"], candidates=0)
    with pytest.raises(ValueError, match=r"batch_size >= 1. Got 0"):
        unclip.generate(["a red star"], batch_size=0)
    with pytest.raises(ValueError, match=r"shape \(B, 64\).* Got \(2, 3\), 1 and 1"):
        unclip.decode(torch.ones(2, 3))


def test_an_image_depends_on_its_own_seed_alone(unclip: Unclip) -> None:
    many = unclip.generate(["a red star", "a ring"], num=2, seed=5, batch_size=3)
    for i, (caption, seed) in enumerate(product(("a red star", "a ring"), (5, 6))):
        own = unclip.generate([caption], seed=seed)
        torch.testing.assert_close(many.images[i : i + 1], own.images, rtol=0, atol=1e-4)
        torch.testing.assert_close(many.image_embed[i : i + 1], own.image_embed, rtol=0, atol=1e-4)
    assert (many.images[0] - many.images[1]).abs().max() > 2e-4  # weights of two steps draw little


def test_embeddings_are_drawn_as_their_prior_would_have_it(unclip: Unclip) -> None:
    captions = ["a red star", "a ring"]
    images, image_embed = unclip.generate(captions, prior="linear", seed=3)
    torch.testing.assert_close(unclip.decode(image_embed, captions, seed=3).images, images, rtol=0, atol=0)
    alone = unclip.decode(image_embed, num=2, seed=3)
    torch.testing.assert_close(alone.image_embed, image_embed.repeat_interleave(2, dim=0))
    assert not torch.equal(alone.images[0], images[0])


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_best_of_more_lies_nearer_to_the_caption(unclip: Unclip, prior: str) -> None:
    text, own = unclip.clip.describe(["a red star"]), unclip.prior(prior).spec.candidates
    cosines = [
        F.cosine_similarity(unclip.generate(["a red star"], num=2, prior=prior, candidates=n).image_embed, text.embed)
        for n in (1, 16)
    ]
    assert cosines[0].mean() < cosines[1].mean()
    assert unclip.prior(prior).spec.candidates == own


def test_guidance_of_the_prior_is_not_that_of_the_decoder(unclip: Unclip) -> None:
    plain, guided = (unclip.generate(["a red star"], prior_guidance=scale) for scale in (1.0, 4.0))
    assert not torch.equal(plain.image_embed, guided.image_embed)
    with_decoder = unclip.generate(["a red star"], guidance=4.0)
    torch.testing.assert_close(with_decoder.image_embed, plain.image_embed, rtol=0, atol=0)
    assert not torch.equal(with_decoder.images, plain.images)


def test_a_decoder_of_the_caption_alone_is_blind_to_z_i(mini_run: Path) -> None:
    sampler, checkpoint = DDIM(2), "decoder/checkpoints/last.ckpt"
    with_it, alone = (
        DecoderSpec(checkpoint, 32, sampler, drop_embedding=drop).load(mini_run) for drop in (False, True)
    )
    text, generator = with_it.null_text(2), torch.Generator()
    z_i = torch.randn(2, 2, with_it.part.space.embed_dim, generator=generator.manual_seed(0))
    blind, seeing = ([d.decode(z, text, generator=generator.manual_seed(1)) for z in z_i] for d in (alone, with_it))
    assert torch.equal(*blind)
    assert not torch.equal(*seeing)


def test_a_decoder_of_z_i_alone_is_deaf_to_the_caption(mini_run: Path) -> None:
    spec = DecoderSpec("decoder/checkpoints/last.ckpt", 32, DDIM(2))
    hearing, deaf = (replace(spec, drop_text=drop).load(mini_run) for drop in (False, True))
    empty, generator = hearing.null_text(2), torch.Generator()
    said = empty._replace(embed=-empty.embed, states=-empty.states)
    z_i = torch.randn(2, hearing.part.space.embed_dim, generator=generator.manual_seed(0))
    a, b = (
        [d.decode(z_i, text, generator=generator.manual_seed(1)) for text in (empty, said)] for d in (hearing, deaf)
    )
    assert not torch.equal(*a)
    assert torch.equal(*b)
    assert torch.equal(a[0], b[0])
    with pytest.raises(ValueError, match="leave one out"):
        replace(spec, drop_text=True, drop_embedding=True)


def test_a_decoder_in_bfloat16_draws_the_same_but_for_rounding(mini_run: Path) -> None:
    sampler, checkpoint = DDIM(4), "decoder/checkpoints/last.ckpt"
    full, mixed = (
        DecoderSpec(checkpoint, 32, sampler, precision=precision).load(mini_run)
        for precision in ("32-true", "bf16-mixed")
    )
    z_i, text = torch.randn(2, full.part.space.embed_dim), full.null_text(2)
    drawn = [decoder.decode(z_i, text, generator=torch.Generator().manual_seed(0)) for decoder in (full, mixed)]
    assert drawn[1].dtype == torch.float32
    assert not torch.equal(*drawn)
    torch.testing.assert_close(*drawn, rtol=0, atol=0.05)


def test_variances_that_the_decoder_did_not_learn_are_refused_on_loading(mini_run: Path) -> None:
    checkpoint = "decoder/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="learned its variance"):
        DecoderSpec(checkpoint, 32).load(mini_run)  # the paper's sampler, for a tiny decoder
    with pytest.raises(ValueError, match="posterior_mse"):
        DecoderSpec(checkpoint, 32, Ancestral(4, "analytic")).load(mini_run)
    decoder = DecoderSpec(checkpoint, 32, Ancestral(4, "large")).load(mini_run)
    z_i = torch.zeros(1, decoder.part.space.embed_dim)
    with pytest.raises(ValueError, match="learned its variance"):
        decoder.decode(z_i, decoder.null_text(1), sampler=Ancestral(4, "learned"))


def test_guidance_of_a_decoder_by_interval_and_by_a_guide(mini_run: Path) -> None:
    """An interval of everything is plain guidance, of nothing none; whoever is its own guide is not led away."""
    checkpoint = "decoder/checkpoints/last.ckpt"
    z_i = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    task = load_part(mini_run / checkpoint, DecoderTask)

    def drawn(guide: DecoderTask | None = None, **settings: Any) -> Tensor:
        decoder = Decoder(DecoderSpec(checkpoint, 32, DDIM(4), **settings), task, guide=guide)
        return decoder.decode(z_i, decoder.null_text(2), generator=torch.Generator().manual_seed(1))

    plain, off = (drawn(guidance=scale) for scale in (3.0, 1.0))
    assert torch.equal(drawn(guidance=3.0, guidance_interval=(0.0, 1e9)), plain)
    assert torch.equal(drawn(guidance=3.0, guidance_interval=(1e8, 1e9)), off)
    torch.testing.assert_close(drawn(task, guidance=3.0), off, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, off, atol=1e-3)
    with pytest.raises(ValueError, match=r"Got \[3, 0.2\]: put the lower one first"):
        DecoderSpec(checkpoint, guidance_interval=(3.0, 0.2))
    with pytest.raises(ValueError, match=r"holds a DiffusionPriorPart. Expected a DecoderPart"):
        DecoderSpec(checkpoint, guide=GuideSpec("prior/checkpoints/last.ckpt")).load(mini_run)


def test_a_guide_leads_an_upsampler(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, *_: object) -> UpsamplerTask:
        torch.manual_seed(len(path.name))
        net = UpsamplerUNet(8, [1], 1, dropout=0.0)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return UpsamplerTask(net, factor=2 if path.name == "double.ckpt" else 4).eval()

    monkeypatch.setattr(decoding, "load_part", load)
    monkeypatch.setattr(guide, "load_part", load)
    low = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def drawn(**settings: Any) -> Tensor:
        upsampler = UpsamplerSpec("up.ckpt", DDIM(3), **settings).load(Path())
        return upsampler.upsample(low, generator=torch.Generator().manual_seed(0))

    plain = drawn()
    torch.testing.assert_close(drawn(guidance=2.0, guide=GuideSpec("up.ckpt")), plain)
    assert not torch.allclose(drawn(guidance=2.0, guide=GuideSpec("weaker.ckpt")), plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"guidance and guide together.* Got guidance 2 without a guide"):
        drawn(guidance=2.0)
    with pytest.raises(ValueError, match=r"guidance and guide together.* Got guidance 1 with a guide"):
        drawn(guide=GuideSpec("weaker.ckpt"))
    with pytest.raises(ValueError, match=r"double.ckpt enlarges 2 times, and the other 4"):
        drawn(guidance=2.0, guide=GuideSpec("double.ckpt"))


def test_a_run_names_interval_and_guide(mini_run: Path, tmp_path: Path) -> None:
    content = json.loads((mini_run / "run.json").read_text())
    content["decoder"]["init_args"] |= {"guidance_interval": [0.2, 3], "guide": {"checkpoint": "weak.ckpt"}}
    content["priors"]["diffusion"]["init_args"] |= {"guidance_interval": [0.2, 3], "guide": {"checkpoint": "w.ckpt"}}
    (tmp_path / "run.json").write_text(json.dumps(content))
    run = read_run(tmp_path)
    assert run.decoder.guide == GuideSpec("weak.ckpt")
    assert run.decoder.guidance_interval == (0.2, 3.0)
    prior = run.priors["diffusion"]
    assert isinstance(prior, DiffusionPriorSpec)
    assert prior.guide == GuideSpec("w.ckpt")
    content["decoder"]["init_args"]["guidance_interval"] = [3, 0.2]
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="put the lower one first"):
        read_run(tmp_path)


def test_a_picture_is_inpainted(unclip: Unclip) -> None:
    """Without a mask it is the picture, with a full one it is `generate` bit for bit, and every seed has its own."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    captions = ["a red star", "a ring"]
    assert torch.equal(unclip.inpaint(images, mask, captions).images, images)
    plain = unclip.generate(captions, num=2, seed=3)
    whole = unclip.inpaint(images, ~mask, captions, num=2, seed=3, jumps=2)
    assert torch.equal(whole.images, plain.images)
    assert torch.equal(whole.image_embed, plain.image_embed)

    mask[..., 10:20, 8:24] = True
    for words in (captions, ["a ring"], None):
        drawn = unclip.inpaint(images, mask, words, num=2, seed=3).images
        kept = ~mask[0].expand(3, -1, -1)
        for picture, around in zip(drawn, images.repeat_interleave(2, dim=0), strict=True):
            assert torch.equal(picture[kept], around[kept])
            assert not torch.equal(picture, around)
        assert not torch.equal(drawn[0], drawn[1])
    z_i = unclip.inpaint(images, mask).image_embed
    torch.testing.assert_close(z_i, unclip.clip.encode_image(images))
    for wrong in (mask[..., 1:], mask.expand(3, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"a mask for \(2, 3, 32, 32\), of one channel"):
            unclip.inpaint(images, wrong)
    with pytest.raises(ValueError, match=r"Expected one caption or 2, one for each picture. Got 3"):
        unclip.inpaint(images, mask, ["a", "b", "c"])


def test_a_picture_is_drawn_on_around(unclip: Unclip, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(pipeline, "trained_on_shapes", lambda root: False)
    drawn = unclip.outpaint(images, ["a red star"], canvas=2.0, num=2).images
    assert torch.equal(drawn[..., 8:24, 8:24], images.expand(2, -1, -1, -1))
    assert not torch.equal(drawn[0], drawn[1])
    for canvas in (1.0, 100.0):
        with pytest.raises(ValueError, match=f"larger than the picture, such as 1.5. Got {canvas:g}"):
            unclip.outpaint(images, ["a red star"], canvas=canvas)
    monkeypatch.setattr(pipeline, "trained_on_shapes", lambda root: True)
    with pytest.raises(ValueError, match="trained on whole shapes alone"):
        unclip.outpaint(images, ["a red star"])


def test_upsamplers_keep_the_known_at_their_size(unclip: Unclip, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task = UpsamplerTask(UpsamplerUNet(8, [1], 1, dropout=0.0), factor=2).eval()
    monkeypatch.setattr(unclip.decoder, "upsamplers", [Upsampler(UpsamplerSpec("", DDIM(2)), task, task)])
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 21:40, 16:45] = True
    drawn = unclip.inpaint(images, mask, ["a red star"]).images
    kept = ~mask.expand(1, 3, -1, -1)
    assert drawn.shape == images.shape
    assert torch.equal(drawn[kept], images[kept])
    assert not torch.equal(drawn, images)


def test_a_cascade_has_a_schedule_and_a_sampler_for_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's: cosine to 256 px, linear to 1,024 px."""

    def load(path: Path, *_: object) -> UpsamplerTask:
        diffusion = GaussianDiffusion(LinearSchedule()) if path.name == "second.ckpt" else None
        return UpsamplerTask(UpsamplerUNet(8, [1], 1, dropout=0.0), diffusion=diffusion).eval()

    monkeypatch.setattr(decoding, "load_part", load)
    with pytest.raises(ValueError, match=r"last_step first.ckpt to be trained on the noise levels of second.ckpt"):
        UpsamplerSpec("second.ckpt", DDIM(15), last_step="first.ckpt").load(Path())
    specs = [UpsamplerSpec("first.ckpt"), UpsamplerSpec("second.ckpt", DDIM(15))]
    stages = [spec.load(Path()) for spec in specs]
    assert [stage.sampler.steps for stage in stages] == [27, 15]
    image = torch.zeros(1, 3, 2, 2)
    for stage, side in zip(stages, (8, 32), strict=True):
        image = stage.upsample(image, generator=torch.Generator().manual_seed(0))
        assert image.shape == (1, 3, side, side)


@pytest.mark.slow
def test_the_whole_chain_to_1024_pixels(mini_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 → 256 → 1,024 px with the samplers of the paper's upsamplers, at small width."""
    decoder = DecoderSpec("decoder/checkpoints/last.ckpt", 64, DDIM(2)).load(mini_run)

    def load(path: Path, *_: object) -> UpsamplerTask:
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(LinearSchedule()) if path.name == "second.ckpt" else None
        return UpsamplerTask(UpsamplerUNet(8, [1, 1, 2], 1, dropout=0.0), diffusion=diffusion).eval()

    monkeypatch.setattr(decoding, "load_part", load)
    second = UpsamplerSpec("second.ckpt", DDIM(15))
    decoder.upsamplers = [stage.load(Path()) for stage in (UpsamplerSpec("first.ckpt"), second)]
    z_i = torch.randn(1, decoder.part.space.embed_dim, generator=torch.Generator().manual_seed(0))
    image = decoder.decode(z_i, decoder.null_text(1), generator=torch.Generator().manual_seed(1))
    assert image.shape == (1, 3, 1024, 1024)
    assert image.isfinite().all()
    assert image.abs().max() <= 1


def test_one_caption_is_no_list_of_letters(unclip: Unclip) -> None:
    assert torch.equal(unclip.generate("a red star").images, unclip.generate(["a red star"]).images)


def test_embeddings_of_numpy_are_drawn(unclip: Unclip) -> None:
    """Which are of float64; none at all are refused."""
    z_i = unclip.generate(["a red star"]).image_embed.cpu()
    assert torch.equal(unclip.decode(z_i.double(), "a red star").images, unclip.decode(z_i, ["a red star"]).images)
    with pytest.raises(InputError, match="Expected embeddings of shape"):
        unclip.decode(z_i[:0])
