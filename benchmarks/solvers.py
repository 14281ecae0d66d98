"""Measure quality against network evaluations for every solver, and choose the defaults; writes results/solvers.

python benchmarks/solvers.py shapes --run runs/quickstart              # its source is RUN/data
python benchmarks/solvers.py emoji --run runs/emoji --source DIR

A run that has flow-decoder/ or flow-prior/, networks on a straight path, gets them beside the others.

Points that results/solvers/NAME.json has are not measured again, unless the weights are others.

The rule. Its captions are those of the validation split, on which no result is measured.

1. The reference is 50 steps at the guidance with the lowest distance between what is drawn and the truth. (The AR prior
   has no steps to choose: its reference is the guidance alone.)
2. A setting passes if none of its measures is worse than the worse end of the reference's 95 % interval.
3. Of those that pass, the fewest network evaluations win. A tie goes to the lowest distance.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion import DDIM, Ancestral, DPMSolver, Heun, Sampler, in_interval
from unclip_pl.evaluation.drawing import Painter
from unclip_pl.evaluation.probe import AttributeProbe
from unclip_pl.evaluation.scores import embedding_values, stated_indices, true_attributes
from unclip_pl.files import replacing, sha256, write_json
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import ARPrior, ARPriorSpec, DiffusionPrior, DiffusionPriorSpec, Prior
from unclip_pl.generation.provenance import provenance
from unclip_pl.metrics.attributes import stated_match
from unclip_pl.metrics.clip_score import retrieval_ranks
from unclip_pl.metrics.frechet import frechet_resamples, without_bias
from unclip_pl.metrics.interval import Interval, mean_interval, recentred_interval
from unclip_pl.report.plots import FAINT, INK, PALETTE, clean, new_figure, to_png
from unclip_pl.shapes.oracle import ShapesOracle

OUT = Path(__file__).parent.parent / "results" / "solvers"
CHECKPOINT = "checkpoints/last.ckpt"
#: CLIP and judge of each run.
CLIPS = {"shapes": ("tiny-rn", "tiny-judge"), "emoji": ("tiny-rn-24", "tiny-judge-24")}
#: Captions that are embedded, those of them whose pictures are drawn, and resamples of a distance.
CAPTIONS, PICTURES, RESAMPLES = 512, {"shapes": 384, "emoji": 256}, 100
#: Network evaluations of a solver without guidance, and those of the reference.
LOOKS, MANY = (4, 6, 8, 12, 20), 50
#: Solvers by the number of times that they look at the network.
SOLVERS: dict[str, Callable[[int], Sampler]] = {
    "DDIM": DDIM,
    "ancestral": Ancestral,
    "DPM-Solver++(2M)": DPMSolver,
    "DPM-Solver++(2M), SDE": partial(DPMSolver, eta=1.0),
    "DPM-Solver++(2M), Karras' levels": partial(DPMSolver, grid="karras"),
    "Heun": lambda looks: Heun((looks + 1) // 2),
}
#: Those of the networks on a straight path, at even times; DDIM is Euler's method there.
STRAIGHT: dict[str, Callable[[int], Sampler]] = {
    "straight path, Euler": partial(DDIM, grid="uniform"),
    "straight path, DPM-Solver++(2M)": partial(DPMSolver, grid="uniform"),
}
#: What stands for a solver in an AR prior.
CODES = "code by code"
#: Noise levels of guidance, Kynkäänniemi et al. (2024); decoders here decide what to draw between them.
INTERVAL = (0.2, 3.0)


class Measure(NamedTuple):
    """What a panel shows."""

    label: str
    sign: int  # 1: more is better; -1: less is; 0: what is nearer to 0
    scale: float = 1


MEASURES = {
    "joint_fd": Measure("Fréchet distance of (z_i, z_t) × 1000 ↓", -1, 1000),
    "probe_match": Measure("stated, by probes % ↑", 1, 100),
    "gap": Measure("calibration gap → 0", 0),
    "fd_judge": Measure("Fréchet distance, judge × 1000 ↓", -1, 1000),
    "shape_right": Measure("shape right % ↑", 1, 100),
    "stated_match": Measure("stated match % ↑", 1, 100),
    "residual": Measure("residual × 1000 ↓", -1, 1000),
    "retrieval_r10": Measure("true picture among 10 nearest % ↑", 1, 100),
}
#: How the choice is marked.
RING: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "color": INK, "markeredgewidth": 1.2}
#: What chooses the guidance.
DISTANCES = ("joint_fd", "fd_judge")


class Setting(NamedTuple):
    """One way to sample a network: ``looks`` at it, each doubled by guidance in its interval, for each candidate."""

    solver: str
    looks: int
    guidance: float
    candidates: int = 1
    interval: tuple[float, float] | None = None

    @property
    def sampler(self) -> Sampler:
        """The solver itself."""
        return (SOLVERS | STRAIGHT)[self.solver](self.looks)

    @property
    def way(self) -> dict[str, Any]:
        """What a prior's spec has, too."""
        return {"guidance": self.guidance, "candidates": self.candidates}

    @property
    def line(self) -> str:
        """Everything but the number of looks."""
        words = [self.solver, f"guidance {self.guidance:g}"]
        words += [f"at levels {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        return ", ".join([*words, *([f"best of {self.candidates}"] if self.candidates > 1 else [])])

    @property
    def key(self) -> str:
        """A name for the file."""
        return f"{self.line}, {self.looks} looks"


class Point(NamedTuple):
    """What came out: evaluations for each embedding or picture, and means with their intervals."""

    setting: Setting
    evaluations: int
    measures: dict[str, Interval]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Point":
        """Return what ``plain`` made."""
        measures = {name: Interval(*values) for name, values in stored["measures"].items()}
        return cls(Setting(**stored["setting"]), stored["evaluations"], measures)

    @property
    def plain(self) -> dict[str, Any]:
        """Return what JSON takes."""
        return {"setting": self.setting._asdict(), "evaluations": self.evaluations, "measures": self.measures}

    @property
    def distance(self) -> float:
        """The measure that chooses the guidance."""
        return next(self.measures[name].mean for name in DISTANCES if name in self.measures)

    def passes(self, reference: "Point") -> bool:
        """Whether no measure is worse than the worse end of the reference's interval."""
        for name, (mean, *_) in self.measures.items():
            low, high = reference.measures[name][1:]
            match MEASURES[name].sign:
                case 1:
                    worse = mean < low
                case -1:
                    worse = mean > high
                case _:
                    worse = abs(mean) > max(abs(low), abs(high))
            if worse:
                return False
        return True


def best(points: Iterable[Point]) -> Point:
    """Return the point of the lowest distance."""
    return min(points, key=lambda point: point.distance)


def chosen(points: Iterable[Point], reference: Point) -> Point:
    """Return the point of the fewest evaluations that passes."""
    passed = [point for point in points if point.passes(reference)]
    return min(passed, key=lambda point: (point.evaluations, point.distance))


class Truth:
    """The captions of a run's validation split, with the networks that look at what is drawn for them."""

    def __init__(self, name: str, run: Path, source: str) -> None:
        self.run = run
        clip, judge = (
            ClipSpec(model, f"{folder}/{CHECKPOINT}").within(run)
            for model, folder in zip(CLIPS[name], ("clip", "judge"), strict=True)
        )
        store = EmbeddingStore(run / "store", source, image_size=clip.image_size)
        rows = store.rows(Split.VAL)[:CAPTIONS]
        self.batch = store.evaluation_batch(RowBatch(rows, np.zeros(len(rows), np.uint64)))
        self.judge = judge.load()
        self.drawn = slice(PICTURES[name])
        self.real = F.normalize(self.judge.encode_image(self.batch.image[self.drawn]).float(), dim=-1)
        shapes = name == "shapes"
        self.oracle = ShapesOracle() if shapes else None
        self.probe = AttributeProbe.fit(store) if shapes else None
        self.stated = stated_indices(self.batch.captions) if shapes else torch.empty(len(rows), 0)

    def pictures(self, decoder: Decoder) -> dict[str, Interval]:
        """Draw from true embeddings and captions, and look."""
        with Painter(decoder, self.judge, self.oracle, batch_size=128, seed=0) as painter:
            painter.expect(len(self.real))
            view = painter.paint(self.batch.image_embed[self.drawn], self.batch.text.rows(self.drawn), what="pictures")
        found = {"fd_judge": distance(self.real, view.judge)}
        if self.oracle is None:
            return {**found, "retrieval_r10": mean_interval(retrieval_ranks(view.judge, self.real) < 10)}
        shape = view.read[:, 0] == true_attributes(self.batch.metadata[self.drawn])[:, 0]
        stated = stated_match(view.read, self.stated[self.drawn])
        values = {"shape_right": shape, "stated_match": stated, "residual": view.residual}
        return found | {key: mean_interval(value) for key, value in values.items()}

    def embeddings(self, prior: Prior) -> dict[str, Interval]:
        """Draw two embeddings of each caption."""
        generator, (true, text) = torch.Generator().manual_seed(0), self.batch[1:3]
        draws = torch.stack([F.normalize(prior.embed(text, generator=generator).float(), dim=-1) for _ in range(2)])
        true, z_t = (F.normalize(x.float(), dim=-1) for x in (true, text.embed))
        pairs = torch.cat([true, z_t], dim=-1), torch.cat([draws, z_t.expand_as(draws)], dim=-1)
        if self.probe is None:
            obeyed = {"retrieval_r10": torch.stack([retrieval_ranks(z, true) < 10 for z in draws])}
        else:
            obeyed = {"probe_match": torch.stack([stated_match(self.probe.read(z), self.stated) for z in draws])}
        values = obeyed | {"gap": embedding_values(draws, true, z_t)["calibration_gap"]}
        return {"joint_fd": distance(*pairs)} | {key: mean_interval(value) for key, value in values.items()}


def distance(real: Tensor, drawn: Tensor) -> Interval:
    """Return the Fréchet distance without its bias."""
    generator = torch.Generator().manual_seed(0)  # the same captions for every setting
    values = without_bias(frechet_resamples(real, {"": drawn}, RESAMPLES, generator=generator)[""])
    return recentred_interval(values[0].item(), values[1:])


Measuring: TypeAlias = Callable[[Setting], Point]


def pictures_of(truth: Truth, checkpoint: str) -> Measuring:
    """Return what measures a decoder."""
    spec = DecoderSpec(checkpoint, 32, DDIM(), precision="bf16-mixed")
    task = spec.load(truth.run).part

    def measure(setting: Setting) -> Point:
        sampler, guidance, interval = setting.sampler, setting.guidance, setting.interval
        own = replace(spec, sampler=sampler, guidance=guidance, guidance_interval=interval)
        looks, schedule = sampler.looks(task.diffusion), task.diffusion.schedule
        twice = 0 if guidance == 1 else sum(in_interval(interval, schedule, t) for t in looks)
        return Point(setting, len(looks) + twice, truth.pictures(Decoder(own, task)))

    return measure


def embeddings_of(truth: Truth, checkpoint: str) -> Measuring:
    """Return what measures a diffusion prior."""
    spec = DiffusionPriorSpec(checkpoint)
    task = spec.load(truth.run).part

    def measure(setting: Setting) -> Point:
        own = replace(spec, sampler=setting.sampler, **setting.way, guidance_interval=setting.interval)
        prior = DiffusionPrior(own, task)
        return Point(setting, prior.evaluations, truth.embeddings(prior))

    return measure


def codes_of(truth: Truth, checkpoint: str) -> Measuring:
    """Return what measures an AR prior."""
    spec = ARPriorSpec(checkpoint)
    task = spec.load(truth.run).part

    def measure(setting: Setting) -> Point:
        prior = ARPrior(replace(spec, **setting.way), task)
        return Point(setting, prior.evaluations, truth.embeddings(prior))

    return measure


class Part(NamedTuple):
    """A network, and how it is sampled."""

    measuring: Callable[[Truth, str], Measuring]
    swept: tuple[str, ...]  # solvers at every guidance; the others take that of the reference
    ways: tuple[tuple[float, int], ...]  # guidance, candidates
    solvers: tuple[str, ...] = ()
    guided: float = 0  # at the levels of INTERVAL alone


PARTS = {
    "decoder": Part(pictures_of, ("DDIM",), ((1, 1), (1.5, 1), (2, 1)), tuple(SOLVERS), 2),
    "prior": Part(embeddings_of, ("DDIM", "ancestral"), ((1, 1), (1, 2), (1.5, 1)), tuple(SOLVERS), 1.5),
    "ar_prior": Part(codes_of, (CODES,), ((1, 1), (1.25, 1), (1.5, 1), (2, 1))),
    # Trained by configs/decoder/flow.yaml and configs/prior/flow.yaml; drawn beside those above.
    "flow-decoder": Part(pictures_of, tuple(STRAIGHT)[:1], ((1, 1), (1.5, 1), (2, 1)), tuple(STRAIGHT)),
    "flow-prior": Part(embeddings_of, tuple(STRAIGHT)[:1], ((1, 1), (1.5, 1)), tuple(STRAIGHT)),
}


class Study:
    """The points of one run, in a file. Points of other weights are dropped."""

    def __init__(self, truth: Truth, path: Path) -> None:
        self.truth, self.path = truth, path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
        self.content |= {
            "captions": len(truth.stated),
            "pictures": len(truth.real),
            "meta": provenance(torch.device("cpu")),
        }

    def points(self, name: str) -> dict[str, Point]:
        """Return what was measured of a network, by key."""
        stored = self.content["parts"].get(name, {"points": {}})["points"]
        return {key: Point.of(point) for key, point in stored.items()}

    def measured(self, name: str, part: Part, settings: Iterable[Setting]) -> list[Point]:
        """Return the points of some settings; those that are new are measured and kept."""
        file, asked = f"{name}/{CHECKPOINT}", list(dict.fromkeys(settings))
        weights = sha256(self.truth.run / file)[:12]
        if self.content["parts"].get(name, {}).get("weights") != weights:
            self.content["parts"][name] = {"weights": weights, "points": {}}
        points, measure = self.content["parts"][name]["points"], None
        for setting in asked:
            if setting.key not in points:
                measure = measure or part.measuring(self.truth, file)
                point = measure(setting)
                print(name, setting.key, point.evaluations, {k: round(v.mean, 4) for k, v in point.measures.items()})
                points[setting.key] = point.plain
                write_json(self.path, self.content, indent=1)
        known = self.points(name)
        return [known[setting.key] for setting in asked]

    def part(self, name: str, part: Part) -> None:
        """Measure a network, choose its sampling, and draw."""
        swept, solvers = [(solver, way) for solver in part.swept for way in part.ways], part.solvers
        many = self.measured(name, part, (Setting(solver, MANY, *way) for solver, way in swept))
        reference = best(many)
        way = reference.setting[2:4]
        few = [Setting(solver, looks, *own) for solver, own in swept if solvers for looks in LOOKS[:-1]]
        few += [Setting(solver, looks, *way) for solver in solvers for looks in LOOKS[::2]]
        few += [Setting("DDIM", looks, part.guided, 1, INTERVAL) for looks in LOOKS[1:-1] if part.guided]
        winner = chosen(many + self.measured(name, part, few), reference)
        self.content["parts"][name] |= {"reference": reference.setting.key, "chosen": winner.setting.key}
        print(f"{name}: reference {reference.setting.key}; chosen {winner.setting.key}")
        write_json(self.path, self.content, indent=1)
        if solvers:
            self.draw(name.removeprefix("flow-"))

    def draw(self, name: str) -> None:
        """Draw a panel for each measure: lines of solvers, the reference's interval as a band, the choice ringed."""
        points, part = self.points(name), self.content["parts"][name]
        reference, winner = points[part["reference"]], points[part["chosen"]]
        drawn, lines = [*points.values(), *self.points(f"flow-{name}").values()], dict[str, list[Point]]()
        for point in drawn:
            lines.setdefault(point.setting.line, []).append(point)
        panels = len(reference.measures)
        figure = new_figure(max(3.4 * panels, 10), 4.6)
        for place, (key, (_, low, high)) in enumerate(reference.measures.items()):
            axes, measure = figure.add_subplot(1, panels, place + 1), MEASURES[key]
            axes.axhspan(measure.scale * low, measure.scale * high, color=FAINT, alpha=0.6, linewidth=0)
            for line, along in lines.items():
                x, y = zip(*sorted((p.evaluations, measure.scale * p.measures[key].mean) for p in along), strict=True)
                axes.plot(x, y, markersize=3.5, linewidth=1, **self.style(line, along[0], reference))
            axes.plot(winner.evaluations, measure.scale * winner.measures[key].mean, "o", **RING)
            if measure.sign:  # the worst tenth, Heun at few steps above all, lies outside
                means = np.array([point.measures[key].mean for point in drawn])
                worst = np.quantile(measure.sign * means, 0.1) * measure.sign
                seen = measure.scale * np.array([worst, low, high, *means[measure.sign * (means - worst) > 0]])
                axes.set_ylim(seen.min() - 0.05 * np.ptp(seen), seen.max() + 0.05 * np.ptp(seen))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("network evaluations", fontsize=8.5)
            axes.set_title(measure.label, fontsize=9, color=INK, loc="left")
            clean(axes, grid="both")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
        with replacing(self.path.with_name(f"{self.path.stem}-{name}.png")) as file:
            file.write_bytes(to_png(figure))

    @staticmethod
    def style(line: str, point: Point, reference: Point) -> dict[str, Any]:
        """Return how a line looks: its solver's colour, and a marker for its way."""
        own = point.setting
        usual = own[2:] == reference.setting[2:]
        solvers = [*SOLVERS, *STRAIGHT]
        ways = sorted({part_way for part in PARTS.values() for part_way in part.ways} - {reference.setting[2:4]})
        return {
            "color": PALETTE[solvers.index(own.solver)],
            "marker": "x" if own.interval else "o" if usual else "s^Dv<>"[ways.index(own[2:4])],
            "linestyle": "-" if usual else ":",
            "label": own.solver if usual else line,
        }


def main() -> None:
    """Measure a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CLIPS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--source", help="its shards; RUN/data if not given")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="those that the run has, if not given")
    options = parser.parse_args()
    truth = Truth(options.name, options.run, options.source or str(options.run / "data"))
    study = Study(truth, options.out / f"{options.name}.json")
    for name in options.parts or [name for name in PARTS if (options.run / name).exists()]:
        study.part(name, PARTS[name])


if __name__ == "__main__":
    main()
