"""`unclip import karlo`: random weights in both layouts become one run, which draws what Karlo's pipeline draws."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.cli import main
from unclip_pl.clip import ClipSpec
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.run import read_run
from unclip_pl.interop.files import read_karlo
from unclip_pl.parts import load_part
from unclip_pl.tasks import DecoderTask, DiffusionPriorTask, UpsamplerTask
from unclip_pl.types import TextFeatures

D, CONTEXT, CONTEXT_WIDTH = 64, 16, 48
#: Karlo's CLIP has d = W: nothing tiny of ours does.
CLIP = {
    "embed_dim": D,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": D, "heads": 2, "layers": 1},
}


class Karlo(NamedTuple):
    """diffusers' modules, and the same weights on disk."""

    prior: Any
    decoder: Any
    projection: Any
    first: Any
    last: Any
    diffusers: Path  # the pipeline's folder
    original: list[str]  # Karlo's own files
    clip: list[str]  # words of the command line


@pytest.fixture(scope="module")
def karlo(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Karlo:
    root = tmp_path_factory.mktemp("karlo")
    (root / "clip").mkdir()
    (root / "clip" / "karlo-test.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(root / "clip")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("karlo-test").state_dict(), root / "clip.pt")

    prior = reference.prior(2, 64, 2, D, CONTEXT)
    with torch.no_grad():
        prior.clip_std.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    decoder, projection = reference.decoder([32, 64], 1, embed_dim=D, context_width=CONTEXT_WIDTH)
    first, last = (reference.upsampler([32, 64], 1, seed=seed) for seed in (1, 2))
    folders = {"prior": prior, "decoder": decoder, "text_proj": projection}
    folders |= {"super_res_first": first, "super_res_last": last}
    for name, net in folders.items():
        (root / "diffusers" / name).mkdir(parents=True)
        save_file(net.state_dict(), root / "diffusers" / name / "diffusion_pytorch_model.safetensors")
    torch.save(last.state_dict(), root / "diffusers" / "super_res_last" / "diffusion_pytorch_model.bin")
    (root / "diffusers" / "super_res_last" / "diffusion_pytorch_model.safetensors").unlink()

    def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}.{key}": value for key, value in state.items()}

    original = {
        "prior.ckpt": under("model", reference.original_prior(prior.state_dict())),
        "decoder.ckpt": under("model", reference.original_unet(decoder.state_dict()))
        | under("model", reference.original_projection(projection.state_dict())),
        "improved-sr.ckpt": under("model_first_steps", reference.original_unet(first.state_dict()))
        | under("model_last_step", reference.original_unet(last.state_dict())),
    }
    for name, state in original.items():
        torch.save({"state_dict": state}, root / name)
    torch.save((prior.clip_mean[0].detach(), prior.clip_std[0].detach()), root / "stats.th")
    files = [str(root / name) for name in (*original, "stats.th")]
    clip = ["--clip.name", "karlo-test", "--clip.pretrained", str(root / "clip.pt")]
    return Karlo(prior, decoder, projection, first, last, root / "diffusers", files, clip)


@pytest.fixture(scope="module")
def runs(karlo: Karlo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs imported from diffusers' layout and from Karlo's own."""
    root = tmp_path_factory.mktemp("imported")
    for name, paths in {"diffusers": [str(karlo.diffusers)], "original": karlo.original}.items():
        assert main(["import", "karlo", *paths, "--out", str(root / name), *karlo.clip]) == 0
    return root / "diffusers", root / "original"


def test_both_layouts_are_one_run(runs: tuple[Path, Path]) -> None:
    a, b = runs
    assert (a / "run.json").read_text() == (b / "run.json").read_text()
    kinds = {"prior": DiffusionPriorTask, "decoder": DecoderTask}
    for part in ("prior", "decoder", "upsampler", "upsampler_last"):
        tasks = [load_part(run / part / "checkpoints" / "last.ckpt", kinds.get(part, UpsamplerTask)) for run in runs]
        states = [task.state_dict() for task in tasks]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), part
    assert read_run(a).decoder.guidance == 8


def pipeline(karlo: Karlo, captions: list[str], steps: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """diffusers' UnCLIPPipeline, without its text encoder: guidance 4 and 8, the prior clamped as Karlo clamps it."""
    clip = ClipSpec("karlo-test", karlo.clip[-1]).load()
    n = len(captions)
    cond = clip.describe(captions).pad(CONTEXT)
    text = TextFeatures.cat([clip.describe([""]).repeat(n), cond])

    def walk(steps: int, shape: tuple[int, ...], predict: Any, **settings: Any) -> Tensor:
        scheduler = UnCLIPScheduler(**settings)
        # Its tables are products of 1,000 numbers in float32: make them exact.
        index = torch.arange(1001, dtype=torch.float64)
        level = ((index / 1000 + 0.008) / 1.008 * torch.pi / 2).cos().square()
        scheduler.betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.set_timesteps(steps)
        x = torch.randn(shape, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            before = scheduler.timesteps[i + 1] if i + 1 < steps else None
            x = scheduler.step(predict(x, t, before is None), t, x, before, generator=generator).prev_sample
        return x

    def predict_z(x: Tensor, t: Tensor, ends: bool) -> Tensor:
        z = karlo.prior(torch.cat([x, x]), t, text.embed, text.states, text.mask).predicted_image_embedding
        return z[:n].lerp(z[n:], 4.0)

    settings = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 10.0}
    z_i = karlo.prior.post_process_latents(walk(steps[0], (n, D), predict_z, **settings))
    context, time_bias = karlo.projection(
        image_embeddings=z_i,
        prompt_embeds=text.embed,
        text_encoder_hidden_states=text.states,
        do_classifier_free_guidance=True,
    )
    visible = F.pad(text.mask, (4, 0), value=True)

    def predict_small(x: Tensor, t: Tensor, ends: bool) -> Tensor:
        both = karlo.decoder(torch.cat([x, x]), t, context, class_labels=time_bias, attention_mask=visible).sample
        uncond, cond = both.chunk(2)
        return torch.cat([uncond[:, :3].lerp(cond[:, :3], 8.0), cond[:, 3:]], dim=1)

    small = walk(steps[1], (n, 3, 16, 16), predict_small, variance_type="learned_range").clamp(-1, 1)
    large = F.interpolate(small, size=64, mode="bicubic", antialias=True)

    def predict_large(x: Tensor, t: Tensor, ends: bool) -> Tensor:
        return (karlo.last if ends else karlo.first)(torch.cat([x, large], dim=1), t).sample

    return walk(steps[2], (n, 3, 64, 64), predict_large, variance_type="fixed_small_log").clamp(-1, 1)


@torch.no_grad()
def test_the_run_draws_what_karlos_pipeline_draws(karlo: Karlo, runs: tuple[Path, Path], tmp_path: Path) -> None:
    steps = (25, 6, 7)
    description = json.loads((runs[1] / "run.json").read_text())
    decoder = description["decoder"]["init_args"]
    decoder |= {"image_size": 16}
    decoder["sampler"]["init_args"]["steps"] = steps[1]
    assert description["priors"]["diffusion"]["init_args"]["sampler"]["init_args"]["steps"] == steps[0]
    assert decoder["upsamplers"][0]["init_args"]["sampler"]["init_args"]["steps"] == steps[2]
    for part in ("prior", "decoder", "upsampler", "upsampler_last"):
        (tmp_path / part).symlink_to(runs[1] / part)
    (tmp_path / "run.json").write_text(json.dumps(description))

    captions = ["a red star", "a ring at the top of it all", ""]
    unclip, generator = Unclip.load(tmp_path), torch.Generator().manual_seed(5)
    text = unclip.clip.describe(captions)
    z_i = unclip.prior("diffusion").embed(text, generator=generator)
    ours = unclip.decoder.decode(z_i, text, generator=generator)
    theirs = pipeline(karlo, captions, steps, torch.Generator().manual_seed(5))
    assert ours.shape == (3, 3, 64, 64)
    assert ours.std() > 0.1
    # float32, and the first step of an eps-predicting network multiplies its rounding by sigma / alpha = 20,291.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_fit_goes_on_from_an_imported_part(
    karlo: Karlo, runs: tuple[Path, Path], mini_run: Path, tmp_path: Path
) -> None:
    """On embeddings of Karlo's CLIP, with Karlo's statistics: the first loss is the imported network's own."""
    source, store = f"{mini_run}/data", f"{tmp_path}/store"
    assert main(["precompute", "--source", source, "--store", store, *karlo.clip]) == 0
    net = {
        "prior": {"width": 128, "layers": 2, "heads": 2},
        "decoder": {"channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "attention_levels": [1]}
        | {"context_width": CONTEXT_WIDTH},
        "upsampler": {"channels": 32, "channel_mult": [1, 2], "res_blocks": 1},
    }
    for part, sizes in net.items():
        imported = runs[0] / part / "checkpoints" / "last.ckpt"
        words = ["fit", "--config", f"configs/{part}/karlo.yaml", "--ckpt_path", str(imported)]
        words += [
            "--data.init_args.source",
            source,
            "--data.init_args.store",
            store,
            "--data.init_args.batch_size",
            "8",
        ]
        words += ["--data.init_args.clip.name", "karlo-test", "--data.init_args.clip.pretrained", karlo.clip[-1]]
        words += ["--data.init_args.image_size", "32", "--data.init_args.num_workers", "0"]
        for key, value in sizes.items():
            words += [f"--model.init_args.net.init_args.{key}", str(value)]
        words += [
            "--trainer.max_steps",
            "2",
            "--trainer.accumulate_grad_batches",
            "1",
            "--trainer.precision",
            "32-true",
        ]
        words += ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
        words += ["--trainer.val_check_interval", "2", "--trainer.enable_model_summary", "false"]
        words += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.name", part]
        words += ["--trainer.logger.init_args.version", "", "--model.init_args.optimization.lr", "1e-6"]
        words += ["--model.init_args.optimization.warmup_steps", "0"]
        assert main(words) == 0, part
        before = torch.load(imported, weights_only=True)["state_dict"]
        after = torch.load(tmp_path / part / "checkpoints" / "last.ckpt", weights_only=True)
        assert after["global_step"] == 2
        trained = after["current_model_state"]
        moved = [(trained[key] - before[key]).abs().max().item() for key in before if key.startswith("net.")]
        assert 0 < max(moved) <= 2.5e-6  # two steps of AdamW, rounded: it started from the imported weights
        if part != "upsampler":
            assert torch.equal(trained["space.raw_std"], karlo.prior.clip_std[0])


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    assert main(["import", "karlo", *words]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for fragment in fragments:
        assert fragment in said


def test_what_cannot_be_imported(
    karlo: Karlo, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run"), *karlo.clip]
    refused(out, capsys, "Expected Karlo's files")
    refused([str(tmp_path / "nowhere"), *out], capsys, "No file or folder at")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    refused([str(tmp_path / "junk.ckpt"), *out], capsys, "holds no plain weights")
    torch.save({"trap": Path("x")}, tmp_path / "trap.ckpt")
    refused([str(tmp_path / "trap.ckpt"), *out], capsys, "holds no plain weights")
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    refused([str(tmp_path / "other.ckpt"), *out], capsys, "holds no part of Karlo")
    refused([str(tmp_path), *out], capsys, "holds no part of Karlo")
    refused(karlo.original[:1], capsys, "Expected Karlo's statistics")
    refused([*karlo.original, karlo.original[0], *out], capsys, "leave one out")
    refused([*karlo.original, "--out", str(runs[0]), *karlo.clip], capsys, "holds a run already")
    refused([*karlo.original, "--out", out[1], "--clip.name", "tiny-rn-24"], capsys, "Expected a CLIP of 64 dimensions")
    broken = torch.load(karlo.original[1], weights_only=True)
    del broken["state_dict"]["model.middle_block.2.out_layers.3.bias"]
    broken["state_dict"]["model.text_tower.bias"] = torch.zeros(1)
    torch.save(broken, tmp_path / "broken.ckpt")
    words = [str(tmp_path / "broken.ckpt"), karlo.original[3], *out]
    refused(words, capsys, "1 missing (middle_block.2.out_layers.3.bias)", "1 unexpected (text_tower.bias)")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_prior_without_the_norm_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    description = json.loads((runs[0] / "run.json").read_text())
    description["priors"]["diffusion"]["init_args"]["keep_norm"] = False
    for part in ("prior", "decoder", "upsampler", "upsampler_last"):
        (tmp_path / part).symlink_to(runs[0] / part)
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="without CLIP's norm"):
        Unclip.load(tmp_path).generate(["a red star"])


@pytest.mark.parametrize("name", ["fp16.safetensors", "fp16.bin", "bf16.safetensors"])
def test_variants_in_half_precision_are_read_where_there_is_nothing_else(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"variant such as .*Got no such file: download"):
        read_karlo([tmp_path])
    weights = {"proj_in.weight": torch.ones(64, 2, dtype=torch.half)}
    save = torch.save if name.endswith("bin") else save_file
    save(weights, folder / f"diffusion_pytorch_model.{name}")
    save_file(weights, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    assert read_karlo([tmp_path]).parts["prior"].weights["proj_in.weight"].dtype == torch.half
    save_file({"proj_in.weight": torch.ones(64, 2)}, folder / "diffusion_pytorch_model.safetensors")
    assert read_karlo([tmp_path]).parts["prior"].weights["proj_in.weight"].dtype == torch.float32
