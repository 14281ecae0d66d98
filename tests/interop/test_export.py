"""`unclip export diffusers`: the small Karlo, ours, in diffusers' pipeline, and back, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UnCLIPPipeline
from lightning.pytorch.cli import instantiate_module
from torch import Tensor

from unclip_pl.cli import main
from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.clip.encoder import build_clip
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.interop.runs import write_checkpoint
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.parts import load_part
from unclip_pl.settings import read_yaml
from unclip_pl.tasks import DecoderTask, DiffusionPriorTask, Task, UpsamplerTask

KINDS: dict[str, type[Any]] = {"prior": DiffusionPriorTask, "decoder": DecoderTask, "upsampler": UpsamplerTask}
STEPS = {"prior": 5, "decoder": 4, "super_res": 7}
CAPTIONS = ["A large, red star in the 2nd corner!", "", "ein grüner Kreis: naïve ☂ it's " + "very " * 20]


class Run(NamedTuple):
    folder: Path
    clip: ClipEncoder


def small_karlo(folder: Path, reference: Any) -> Run:
    """A run of the networks of `*/karlo-tiny.yaml` with random weights, as fits of them leave it."""
    torch.manual_seed(0)
    torch.save({"state_dict": build_clip("karlo-tiny").state_dict()}, folder / "clip.pt")
    spec = ClipSpec("karlo-tiny", str(folder / "clip.pt"))
    clip, statistics = spec.load(), folder / "statistics.safetensors"
    embeds = 3 * torch.randn(500, spec.embed_dim) * torch.rand(spec.embed_dim).add(0.1) + torch.randn(spec.embed_dim)
    told = {"null_text": clip.describe([""]), "fingerprint": clip.fingerprint}
    write_statistics(statistics, moments=Moments.of(embeds), **told)
    for part, kind in KINDS.items():
        config = read_yaml(Path("configs") / part / "karlo-tiny.yaml")["model"]["init_args"]
        sizes = config["net"]["init_args"]
        sizes |= {"embed_dim": spec.embed_dim, "text_width": spec.text_width} if part != "upsampler" else {}
        sizes |= {"context_length": spec.context_length} if part == "prior" else {}
        config |= {"statistics": str(statistics)} if part != "upsampler" else {}
        task = instantiate_module(kind, config)
        reference.randomised(task.net)
        names = {"_class_path": f"unclip_pl.tasks.{kind.__name__}"}
        write_checkpoint(folder / part / "checkpoints" / "last.ckpt", task, names | config)

    def stage(part: str, name: str, variance: str, **more: Any) -> dict[str, Any]:
        sampler = {"steps": STEPS[name], "variance": variance}
        sampler = {"class_path": "unclip_pl.diffusion.Ancestral", "init_args": sampler}
        return {"checkpoint": f"{part}/checkpoints/last.ckpt", "sampler": sampler} | more

    spec_of = "unclip_pl.generation"
    upsampler = {
        "class_path": f"{spec_of}.decoding.UpsamplerSpec",
        "init_args": stage("upsampler", "super_res", "small"),
    }
    decoder = stage("decoder", "decoder", "learned", image_size=32, guidance=2.5, upsamplers=[upsampler])
    prior = stage("prior", "prior", "small", guidance=1.5, candidates=1, x0_bound=4.0, keep_norm=True)
    description = {
        "clip": {"name": "karlo-tiny", "pretrained": "clip.pt"},
        "decoder": {"class_path": f"{spec_of}.decoding.DecoderSpec", "init_args": decoder},
        "priors": {"diffusion": {"class_path": f"{spec_of}.priors.DiffusionPriorSpec", "init_args": prior}},
    }
    (folder / "run.json").write_text(json.dumps(description))
    return Run(folder, clip)


@pytest.fixture(scope="module")
def run(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_karlo(tmp_path_factory.mktemp("small-karlo"), reference)


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    out = run.folder.parent / "exported"
    assert main(["export", "diffusers", str(run.folder), str(out)]) == 0
    return out


def exact(scheduler: Any) -> None:
    """Replace tables that are products of 1,000 numbers in float32."""
    index = torch.arange(1001, dtype=torch.float64)
    level = ((index / 1000 + 0.008) / 1.008 * torch.pi / 2).cos().square()
    scheduler.betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


@torch.no_grad()
def test_the_pipeline_draws_what_the_run_draws(run: Run, folder: Path) -> None:
    pipeline = UnCLIPPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        exact(getattr(pipeline, name))
    unclip, generator = Unclip.load(run.folder), torch.Generator().manual_seed(5)
    text = unclip.clip.describe(CAPTIONS)
    z_i = unclip.prior("diffusion").embed(text, generator=generator)
    ours = unclip.decoder.decode(z_i, text, generator=generator)
    steps = {f"{name}_num_inference_steps": count for name, count in STEPS.items()}
    guidance = {"prior_guidance_scale": 1.5, "decoder_guidance_scale": 2.5}
    same = torch.Generator().manual_seed(5)
    theirs = pipeline(CAPTIONS, generator=same, output_type="np", **steps, **guidance).images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1
    assert ours.shape == (3, 3, 64, 64)
    assert ours.std() > 0.1
    # float32, and the first step of an eps-predicting network multiplies its rounding by sigma / alpha = 20,291.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    words = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    tokens = unclip.clip.tokenize(CAPTIONS)
    assert torch.equal(words.input_ids * words.attention_mask, tokens)


def test_the_import_of_the_export_has_our_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    clip = ["--clip.name", "karlo-tiny", "--clip.pretrained", str(run.folder / "clip.pt")]
    assert main(["import", "karlo", str(folder), "--out", str(tmp_path / "run"), *clip]) == 0

    def weights(root: Path, part: str) -> dict[str, Tensor]:
        kind: type[Task] = KINDS[part.removesuffix("_last")]
        return load_part(root / part / "checkpoints" / "last.ckpt", kind).state_dict()

    for part in ("prior", "decoder", "upsampler", "upsampler_last"):
        ours, theirs = weights(run.folder, part.removesuffix("_last")), weights(tmp_path / "run", part)
        names = [name for name in ours if name.startswith("net.")]
        assert names
        assert all(torch.equal(ours[name], theirs[name]) for name in names), part
        if part == "prior":
            for name in ("space.raw_mean", "space.raw_std", "space.null_states", "space.fingerprint_bytes"):
                assert torch.equal(ours[name], theirs[name])


def test_what_does_not_map_is_named(
    run: Run, mini_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", "diffusers", *words]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "Expected a run and a folder" in refused("runs/x")
    assert "holds files already" in refused(str(run.folder), str(folder))
    assert "1 diffusion priors and 0 upsamplers" in refused(str(mini_run), str(tmp_path / "a"))
    other = tmp_path / "other"
    shutil.copytree(mini_run, other, ignore=shutil.ignore_patterns("data", "store", "cells"))
    shutil.copytree(run.folder / "upsampler", other / "upsampler")
    description = json.loads((other / "run.json").read_text())
    own = json.loads((run.folder / "run.json").read_text())
    description["decoder"]["init_args"]["upsamplers"] = own["decoder"]["init_args"]["upsamplers"]
    (other / "run.json").write_text(json.dumps(description))
    said = refused(str(other), str(tmp_path / "a"))
    for fault in (
        "decoder has image_map 4, not 0",
        "decoder has patch 2, not 1",
        "the decoder's embeddings are scaled 'whiten', not 'raw'",
        "prior has heads of 32 channels, not 64",
        "the prior's embeddings are scaled 'unit'",
        "CLIP's text states have 128 dimensions and its embeddings 64",
    ):
        assert fault in said
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".export-*"))
