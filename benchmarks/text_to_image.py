"""Text → 64 px picture against diffusers, with the same weights; writes results/text-to-image.

python benchmarks/text_to_image.py runs/karlo-tiny    # clip, store, prior and decoder of configs/*/karlo-tiny.yaml

diffusers draws by its own UnCLIPPipeline, 25 + 25 ancestral steps, interrupted where its super-resolution begins. Ours
draws by DPM-Solver++(2M) with few steps. Both begin at the caption's text.

The rule, stated before anything was measured. Both sides draw the same held-out captions in bf16, with guidance 1 of
the prior and 1.5 of the decoder, the quickstart's. An oracle reads what the captions state, at 64 px. The CLIP of the
packaged weights, which neither side has seen, gives the features of a Fréchet distance to the true pictures, without
its bias. Ours takes the fewest steps whose stated match is not below, and whose distance is not above, the 95 %
interval over captions of diffusers' own. Then both sides draw one batch in turns, on one thread; the fastest call
counts.

One thing was changed after a first look: the learned variance is fixed to the smallest, on both sides. A network that
predicts x0 misses it by more than the noise of the last of 1,000 training steps, and learns a variance far above beta.
At one of 25 steps the same fraction overflows, in diffusers and in ours.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias

import diffusers
import numpy as np
import torch
from diffusers import UnCLIPPipeline
from lightning.pytorch.cli import instantiate_module
from measure import expect_equal, side_by_side
from solvers import distance
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion import Ancestral, DPMSolver, Sampler
from unclip_pl.evaluation.scores import stated_indices
from unclip_pl.files import read_checkpoint, replacing, write_json
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.pictures import grid, save_png
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.generation.provenance import provenance
from unclip_pl.interop.export import write_diffusers
from unclip_pl.interop.runs import write_checkpoint
from unclip_pl.metrics.attributes import stated_match
from unclip_pl.metrics.interval import Interval, mean_interval
from unclip_pl.settings import read_yaml
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.tasks import UpsamplerTask

ROOT = Path(__file__).parent.parent
OUT, CHECKPOINT = ROOT / "results" / "text-to-image", "checkpoints/last.ckpt"
CAPTIONS, BATCH, SHOWN, SIDE = 192, 32, 8, 64
GUIDANCE, STEPS = {"prior": 1.0, "decoder": 1.5}, (25, 25)
#: Steps of our prior and of our decoder, fewest first.
FEW = ((4, 4), (4, 6), (6, 8), (8, 12), (15, 25))
#: Captions of a timed call, and calls.
TIMED, ROUNDS = 4, 3

Precision: TypeAlias = Literal["32-true", "bf16-mixed"]
Draw: TypeAlias = Callable[[list[str], int, Precision], Tensor]  # captions, seed, precision


def with_fixed_variance(run: Path) -> Path:
    """Write the decoder again with a variance output that says beta_tilde everywhere, and return the file."""
    checkpoint, file = read_checkpoint(run / "decoder" / CHECKPOINT), run / "decoder" / "fixed-variance.ckpt"
    for name, value in {"net.conv_out.weight": 0.0, "net.conv_out.bias": -1.0}.items():
        checkpoint["state_dict"][name][3:] = value
    with replacing(file) as temporary:
        torch.save(checkpoint, temporary)
    return file.resolve()


class Ours:
    """Our networks: CLIP, prior and decoder."""

    def __init__(self, run: Path, decoder: Path) -> None:
        self.clip = ClipSpec("karlo-tiny", f"clip/{CHECKPOINT}").within(run).load()
        own = {"guidance": GUIDANCE["prior"], "candidates": 1, "keep_norm": True}
        self.prior = DiffusionPriorSpec(f"prior/{CHECKPOINT}", **own).load(run)
        self.decoder = DecoderSpec(str(decoder), SIDE, guidance=GUIDANCE["decoder"]).load(run)

    def draw(self, of_prior: Sampler, of_decoder: Sampler, captions: list[str], seed: int, how: Precision) -> Tensor:
        """Return pictures (B, 3, 64, 64) in [-1, 1]. In bf16 the prior stays in float32, as in the package."""
        generator, text = torch.Generator().manual_seed(seed), self.clip.describe(captions)
        z_i = self.prior.adjusted(sampler=of_prior).embed(text, generator=generator)
        decoder = Decoder(replace(self.decoder.spec, precision=how, sampler=of_decoder), self.decoder.part)
        return decoder.decode(z_i, text, generator=generator)


class DrawnError(Exception):
    """The pipeline has come to its super-resolution."""


class Theirs:
    """diffusers' pipeline on our weights. Its super-resolution, which is never asked, has random ones."""

    def __init__(self, run: Path, decoder: Path) -> None:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            export(run, decoder, folder)
            self.pipeline = UnCLIPPipeline.from_pretrained(folder / "diffusers")
        self.pipeline.set_progress_bar_config(disable=True)
        self.step = self.pipeline.decoder_scheduler.step
        self.pipeline.decoder_scheduler.step = self.keep
        self.pipeline.super_res_scheduler.set_timesteps = self.stop
        self.kept: Any = None

    def keep(self, *args: Any, **options: Any) -> Any:
        """Take a step of the decoder, and keep where it leads."""
        self.kept = self.step(*args, **options)
        return self.kept

    def stop(self, *_: Any, **__: Any) -> None:
        """Stop the pipeline."""
        raise DrawnError

    def draw(self, of_prior: int, of_decoder: int, captions: list[str], seed: int, how: Precision) -> Tensor:
        """Return pictures (B, 3, 64, 64) in [-1, 1]. In bf16 all of its networks are."""
        options: dict[str, Any] = {f"{part}_guidance_scale": scale for part, scale in GUIDANCE.items()}
        options |= {"prior_num_inference_steps": of_prior, "decoder_num_inference_steps": of_decoder}
        stream = torch.Generator().manual_seed(seed)
        with suppress(DrawnError), torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16-mixed"):
            self.pipeline(captions, generator=stream, **options)
        return self.kept.prev_sample.float().clamp(-1, 1)

    def compute_tables_in_float64(self) -> None:
        """Replace the schedulers' tables, products of a thousand float32 numbers, so that outputs can be compared."""
        index = torch.arange(1001, dtype=torch.float64)
        level = ((index / 1000 + 0.008) / 1.008 * torch.pi / 2).cos().square()
        for scheduler in (self.pipeline.prior_scheduler, self.pipeline.decoder_scheduler):
            scheduler.betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
            scheduler.alphas = 1 - scheduler.betas
            scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


def export(run: Path, decoder: Path, folder: Path) -> None:
    """Write the run as diffusers' pipeline, into a folder of that name."""
    config = read_yaml(ROOT / "configs/upsampler/karlo-tiny.yaml")["model"]["init_args"]
    task = instantiate_module(UpsamplerTask, config)
    write_checkpoint(folder / "upsampler.ckpt", task, {"_class_path": "unclip_pl.tasks.UpsamplerTask"} | config)
    prior = {"checkpoint": str((run / "prior" / CHECKPOINT).resolve()), "candidates": 1, "keep_norm": True}
    own = {"checkpoint": str(decoder), "image_size": SIDE}
    own["upsamplers"] = [of("decoding.UpsamplerSpec", {"checkpoint": "upsampler.ckpt"})]
    description = {
        "clip": {"name": "karlo-tiny", "pretrained": str((run / "clip" / CHECKPOINT).resolve())},
        "decoder": of("decoding.DecoderSpec", own),
        "priors": {"diffusion": of("priors.DiffusionPriorSpec", prior)},
    }
    write_json(folder / "run.json", description)
    write_diffusers(folder, folder / "diffusers")


def of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says of an object."""
    return {"class_path": f"unclip_pl.generation.{name}", "init_args": settings}


class Point(NamedTuple):
    """What was read in the pictures of one side."""

    steps: tuple[int, int]
    stated_match: Interval
    distance: Interval

    def passes(self, reference: "Point") -> bool:
        """Whether it is no worse than the worse end of the reference's interval."""
        within = self.distance.mean <= reference.distance.high
        return within and self.stated_match.mean >= reference.stated_match.low


class Truth:
    """Held-out captions with their pictures, and what looks at pictures drawn for them."""

    def __init__(self, run: Path) -> None:
        store = EmbeddingStore(run / "store", str(run / "data"), image_size=SIDE)
        rows = store.rows(Split.HELDOUT)[:CAPTIONS]
        batch = store.evaluation_batch(RowBatch(rows, np.zeros(len(rows), np.uint64)))
        self.captions, self.images = batch.captions, batch.image
        self.stated, self.oracle, self.eye = (
            stated_indices(batch.captions),
            ShapesOracle(SIDE),
            Unclip.load("shapes").clip,
        )
        self.real, self.folder = self.features(batch.image), run / "drawn"
        self.folder.mkdir(exist_ok=True)

    def features(self, images: Tensor) -> Tensor:
        """Return unit-norm features of pictures."""
        return F.normalize(self.eye.encode_image(images).float(), dim=-1)

    def drawn(self, name: str, draw: Draw) -> Tensor:
        """Return a side's pictures; those that lie in the run's folder are not drawn again."""
        file = self.folder / f"{name}.pt"
        if not file.is_file():
            parts = []
            for start in range(0, len(self.captions), BATCH):
                parts.append(draw(self.captions[start : start + BATCH], start, "bf16-mixed"))
                print(f"{name}: {start + BATCH} pictures", flush=True)
            torch.save(torch.cat(parts), file)
        return torch.load(file)

    def read(self, steps: tuple[int, int], images: Tensor) -> Point:
        """Look at pictures."""
        match = stated_match(self.oracle(images).indices, self.stated)
        point = Point(steps, mean_interval(match), distance(self.real, self.features(images)))
        print(point, flush=True)
        return point


def timed(what: str, sides: dict[str, Draw], captions: list[str], how: Precision) -> dict[str, Any]:
    """Return seconds of a batch, both sides in turns."""
    seconds = side_by_side({side: partial(draw, captions, 0, how) for side, draw in sides.items()}, ROUNDS)
    print(what, how, seconds, flush=True)
    return {
        "steps": what,
        "precision": how,
        "captions": len(captions),
        "seconds": seconds,
        "ratio": seconds["diffusers"] / seconds["ours"],
    }


def main() -> None:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    torch.set_num_threads(1)
    decoder = with_fixed_variance(run)
    ours, theirs, truth = Ours(run, decoder), Theirs(run, decoder), Truth(run)
    theirs.compute_tables_in_float64()
    captions = truth.captions[:TIMED]
    own = partial(ours.draw, Ancestral(2), Ancestral(2)), partial(theirs.draw, 2, 2)
    equal = expect_equal(*(draw(captions, 0, "32-true") for draw in own), 1e-3)
    print(f"two steps of each part from the same noise, float32: {equal}", flush=True)
    theirs = Theirs(run, decoder)
    draw_theirs = partial(theirs.draw, *STEPS)
    drawn = truth.drawn("diffusers", draw_theirs)
    points, reference = {"the true pictures": truth.read((0, 0), truth.images)}, truth.read(STEPS, drawn)
    points["diffusers"] = reference
    for steps in FEW:
        draw_ours = partial(ours.draw, *(DPMSolver(count) for count in steps))
        few = truth.drawn(f"ours-{steps[0]}-{steps[1]}", draw_ours)
        points[f"ours, {steps[0]} + {steps[1]} steps"] = point = truth.read(steps, few)
        if point.passes(reference):
            break
    sides: dict[str, Draw] = {"ours": draw_ours, "diffusers": draw_theirs}
    times = [timed(f"{steps[0]} + {steps[1]} steps", sides, captions, how) for how in ("32-true", "bf16-mixed")]
    sides["ours"] = partial(ours.draw, *(Ancestral(count) for count in STEPS))
    times.append(timed("diffusers' own steps", sides, captions, "bf16-mixed"))
    meta = provenance(torch.device("cpu"))
    meta["versions"]["diffusers"] = diffusers.__version__
    content = {"equal": equal, "points": {name: p._asdict() for name, p in points.items()}, "times": times}
    write_json(OUT / "measured.json", content | {"passed": point.passes(reference), "meta": meta}, indent=1)
    shown = {"diffusers, 25 + 25 steps": drawn, f"ours, {steps[0]} + {steps[1]} steps": few, "true": truth.images}
    rows = [(name, list(images[:SHOWN])) for name, images in shown.items()]
    save_png(grid(rows, truth.captions[:SHOWN]), OUT / "compared.png", {"commit": meta["commit"]})


if __name__ == "__main__":
    main()
