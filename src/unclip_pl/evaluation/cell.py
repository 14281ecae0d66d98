"""Measure one cell of a study: priors, sampled, drawn and scored caption by caption.

What it writes is small enough to be committed, and enough for every interval, win rate, curve and table of the report:
no network is asked again. A comparison is a study of one cell, which has every prior.
"""

import math
import time
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.errors import InputError
from unclip_pl.evaluation.costs import Cost, costs_of, sampling_flops, training_of
from unclip_pl.evaluation.drawing import Painter, gather
from unclip_pl.evaluation.foundations import foundations
from unclip_pl.evaluation.inputs import check_judge, check_seeds, judge_of, parts_of, streams_for
from unclip_pl.evaluation.measures import ASKED
from unclip_pl.evaluation.probe import AttributeProbe
from unclip_pl.evaluation.scores import (
    Heldout,
    View,
    accuracy_by_attribute,
    binding,
    caption_scores,
    diversity_scores,
    embedding_values,
    join_heldout,
    open_captions,
    resampled_means,
    resampler,
    spectrum,
    stated_indices,
    states_unseen_pair,
    true_attributes,
)
from unclip_pl.evaluation.sheet import FORMAT, REAL, Sheet, sheet_path
from unclip_pl.files import write_json
from unclip_pl.generation.decoding import DecoderSpec, resize
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.generation.provenance import provenance, settings
from unclip_pl.generation.run import RUN, base_hash
from unclip_pl.metrics.attributes import stated_match
from unclip_pl.metrics.frechet import frechet_resamples
from unclip_pl.metrics.kernel import kernel_values
from unclip_pl.metrics.neighbours import neighbour_values
from unclip_pl.metrics.two_sample import told_apart
from unclip_pl.shapes.oracle import Oracle, SceneOracle, ShapesOracle
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures

#: Significant digits of a stored number: those of a float32.
DIGITS = 7
#: Captions of a batch when many samples are drawn.
EMBED_BATCH = 256
#: Between the seeds of single samples and those of many of a caption.
MANY = 104_729
#: The cell of a comparison, in its run.
COMPARISON = Path("cells") / "comparison.json"
ALONE = "embedding alone"

Kind = Literal["prior", "matched", "table", "curve", "ablation", "frontier"]


class Drawn(NamedTuple):
    """Pictures of a cell, as the judge and the oracle saw them."""

    views: dict[str, View]  # arm → one picture of each of n captions
    many: dict[str, View]  # arm → K pictures of each of some captions
    captions: list[str]  # those captions
    real: View | None  # the true pictures, and
    alone: View | None  # those decoded from true embeddings without a caption: where foundations are measured


class Counts(NamedTuple):
    """How much a cell was measured on."""

    rows: int  # held-out captions
    captions: int  # of which pictures were drawn
    many: int = 0  # of which many pictures were drawn
    seeds: int = 1  # samples of a caption
    resamples: int = 0
    many_samples: int = 0  # pictures of each of the many


class Cell(LightningModule):
    """``unclip test --config configs/compare/…``: writes one JSON file of measurements, and pictures beside it.

    Nothing is trained and nothing is checkpointed. Networks are loaded when the test starts, and never registered.
    It decodes captions · priors pictures, and diversity_captions · diversity_samples for each prior that sees the
    caption alone.

    Args:
        run: folder that CLIP, judge and decoder are named relative to.
        clip: the CLIP that conditions everything; None where embeddings are all there is.
        priors: the cell's arms by name: several priors, or one prior sampled in several ways.
        weights: folder that the priors' files are named relative to; None means ``run``.
        out: file to write; pictures lie beside it. None is ``cells/comparison.json`` in the run: the command line then
            draws the run's report.
        kind: place of the arms in the report: ``prior`` (a row of the main tables), ``matched`` (a second row of that
            prior, at settings equal to the others'), ``table`` (a row of a further table), ``curve``, ``ablation``, or
            ``frontier`` (further settings of the contender that ``series`` names, fidelity against diversity).
        title: name of the table, curve or ablation.
        series: name of the row, line or side, where it is not the arm's own name.
        x: place on a curve; None where the arms are named by it.
        judge: another CLIP, for the scores of pictures; None where nothing is drawn.
        decoder: draws every arm; None measures embeddings alone.
        decoder_run: folder that the decoder is named relative to; None means ``run``.
        oracle: reads shapes back, from pictures and by probes from embeddings, or scenes from pictures; None for other
            data.
        captions: number of held-out captions of which pictures are decoded.
        seeds: number of samples per caption for what needs no decoder, over all held-out rows; at least 2.
        diversity_captions: number of captions of which many pictures are decoded; 0 leaves diversity out.
        diversity_samples: number of pictures of each of those.
        foundations: measure the oracle, the decoder alone, both CLIPs and the codec as well.
        grid_rows: number of captions whose pictures are kept.
        grid_many: number of captions of which many pictures are kept.
        grid_licenses: beginnings of the licences under which real pictures may be shown, since a published report holds
            other people's pictures. A picture whose json names no `license` is shown too. None shows all pictures.
        batch_size: number of pictures decoded at once.
        resamples: number of bootstrap resamples of the captions; every cell draws the same ones.
        seed: training seed of the weights; the noise of the samples follows from it too.

    Raises:
        InputError: fewer than 2 seeds, the judge is the CLIP that it is to judge, a decoder without a judge or a CLIP,
            foundations without a decoder, a table, curve or ablation without a title, or a frontier without a series.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec | None,
        priors: dict[str, PriorSpec],
        weights: str | None = None,
        out: str | None = None,
        kind: Kind = "prior",
        title: str = "",
        series: str = "",
        x: float | None = None,
        judge: ClipSpec | None = None,
        decoder: DecoderSpec | None = None,
        decoder_run: str | None = None,
        oracle: Oracle | None = None,
        captions: int = 512,
        seeds: int = 2,
        diversity_captions: int = 32,
        diversity_samples: int = 16,
        foundations: bool = False,
        grid_rows: int = 8,
        grid_many: int = 0,
        grid_licenses: list[str] | None = None,
        batch_size: int = 96,
        resamples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.run = Path(run)
        self.clip = clip
        self.priors = priors
        self.weights = Path(weights) if weights else self.run
        self.out = Path(out) if out else self.run / COMPARISON
        self.draws = None if out else self.run
        self.kind, self.title, self.series, self.x = kind, title, series, x
        self.judge = judge
        self.decoder = decoder
        self.decoder_run = Path(decoder_run) if decoder_run else self.run
        self.oracle = oracle
        self.captions = captions
        self.seeds = seeds
        self.diversity_captions, self.diversity_samples = diversity_captions, diversity_samples
        self.foundations = foundations
        self.grid_rows, self.grid_many, self.grid_licenses = grid_rows, grid_many, grid_licenses
        self.batch_size = batch_size
        self.resamples = resamples
        self.seed = seed
        self._check()

    def _check(self) -> None:
        check_seeds(self.seeds)
        check_judge(self.judge, self.clip)
        if self.decoder is not None and self.judge is None:
            raise InputError("Expected a judge beside the decoder, to look at its pictures. Got none: name one.")
        if self.decoder is not None and self.clip is None:
            raise InputError("Expected the CLIP that conditions the decoder. Got none: name it.")
        if self.foundations and self.decoder is None:
            raise InputError("Expected a decoder where foundations are measured. Got none: name one.")
        if self.foundations and isinstance(self.oracle, SceneOracle):
            raise InputError(
                "Expected pictures of one shape where foundations are measured. Got scenes: leave them out."
            )
        if self.kind in ("table", "curve", "ablation") and not self.title:
            raise InputError(f"Expected a title for a cell of kind {self.kind!r}. Got none: give one.")
        if self.kind == "frontier" and not self.series:
            raise InputError("Expected a contender as series of a frontier. Got none: name one.")

    def on_test_start(self) -> None:
        """Load every network, refuse to mix CLIPs, and fit the probes of embeddings where attributes are known."""
        self._started = time.perf_counter()
        self._parts = parts_of(
            self,
            decoder=self.decoder,
            decoder_run=self.decoder_run,
            priors=self.priors,
            weights=self.weights,
        )
        for name, prior in self._parts.priors.items():
            if prior.keeps_norm:
                raise InputError(
                    f"Expected priors of unit-norm embeddings to compare. Got {name!r} with keep_norm: leave it out."
                )
        self._judge = judge_of(self, self._parts.fingerprint)
        data = getattr(self.trainer, "datamodule", None)
        known = isinstance(self.oracle, ShapesOracle) and isinstance(data, UnclipDataModule)
        self._probe = AttributeProbe.fit(data.embeddings) if known and data is not None else None
        self._heldout: list[Heldout] = []
        self._samples: dict[str, list[Tensor]] = {name: [] for name in self.priors}
        self._costs = {name: Cost() for name in self.priors}

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Embed the captions with every prior and every seed, and keep what the judge says of the truth."""
        if self.oracle is not None:
            true_attributes(batch.metadata, self.oracle)  # fails now, not after everything is drawn
        room = max(0, self.captions - sum(len(part.captions) for part in self._heldout))
        judge_image, judge_text = self._judged(batch)
        self._heldout.append(
            Heldout(
                image_embed=batch.image_embed.float().cpu(),
                text=batch.text.to("cpu"),
                captions=batch.captions,
                metadata=batch.metadata,
                judge_image=judge_image,
                judge_text=judge_text,
                images=batch.image[:room].float().cpu(),
            )
        )
        pairs = PriorBatch(batch.image_embed, batch.text)
        for name, prior in self._parts.priors.items():
            if not self._samples[name]:
                self._costs[name] = self._costs[name]._replace(flops=sampling_flops(prior, pairs))
            streams = [streams_for(pairs, self.seed, s) for s in range(self.seeds)]  # the same for every prior
            started = time.perf_counter()
            draws = [prior.embed_batch(pairs, generator=stream).cpu() for stream in streams]
            self._costs[name] = self._costs[name].plus(time.perf_counter() - started, self.seeds * len(batch.captions))
            self._samples[name].append(torch.stack(draws).float())

    def _judged(self, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return the judge's features of true pictures and captions, (B, F) each; F is 0 where nothing is drawn."""
        if not self._judge:
            return torch.empty(len(batch.captions), 0), torch.empty(len(batch.captions), 0)
        judge = self._judge[0]
        both = judge.encode_image(batch.image), judge.describe(batch.captions).embed
        return F.normalize(both[0].float(), dim=-1).cpu(), F.normalize(both[1].float(), dim=-1).cpu()

    def on_test_epoch_end(self) -> None:
        """Draw and score every arm, and write the files."""
        world = self.trainer.world_size
        heldout = join_heldout(chain.from_iterable(gather(self._heldout, world)))
        samples = {
            name: torch.cat([part for parts in gather(own, world) for part in parts], dim=1)
            for name, own in self._samples.items()
        }
        shown = shown_rows(heldout.metadata[: self.captions], self.grid_rows, self.grid_licenses)
        drawn = self._draw(heldout, samples, shown) if self._parts.decoder is not None else None
        if not self.trainer.is_global_zero:
            return
        arms = self._arms(heldout, samples)
        if drawn is not None:
            self._score(arms, heldout, drawn)
        self._write(arms, heldout, drawn, self._sheets(heldout, drawn, shown))

    def _draw(self, heldout: Heldout, samples: dict[str, Tensor], shown: list[int]) -> Drawn:
        """Draw all pictures, over all ranks."""
        decoder, n = self._parts.decoder, min(self.captions, len(heldout.captions))
        assert decoder is not None
        few = heldout.text.rows(slice(n))
        chosen = open_captions(heldout.captions, self.diversity_captions, shapes=isinstance(self.oracle, ShapesOracle))
        many = heldout.text.rows(torch.tensor(chosen, dtype=torch.long)).repeat(self.diversity_samples)
        drawers = {name: prior for name, prior in self._parts.priors.items() if chosen and not prior.needs_image}
        kept = range(self.grid_many * self.diversity_samples)
        rank, world = self.global_rank, self.trainer.world_size
        options = {"batch_size": self.batch_size, "seed": self.seed, "rank": rank, "world_size": world}
        with Painter(decoder, self._judge[0], self.oracle, **options) as painter:
            painter.expect(n * (len(samples) + self.foundations) + len(many.embed) * len(drawers))
            return Drawn(
                real=painter.look(heldout.images[:n].to(self.device), keep=shown) if self.foundations else None,
                alone=painter.paint(
                    heldout.image_embed[:n], decoder.null_text(n).to("cpu"), what="from the embedding alone", keep=shown
                )
                if self.foundations
                else None,
                views={
                    name: painter.paint(drawn[0, :n], few, what=name, keep=shown) for name, drawn in samples.items()
                },
                many={
                    name: painter.paint(self._embed(prior, many), many, what=f"{name}, many of a caption", keep=kept)
                    for name, prior in drawers.items()
                },
                captions=[heldout.captions[row] for row in chosen],
            )

    def _embed(self, prior: Prior, text: TextFeatures) -> Tensor:
        """Draw (N, d) samples for N captions, on the CPU."""
        parts = []
        for start in range(0, len(text.embed), EMBED_BATCH):
            words = text.rows(slice(start, start + EMBED_BATCH)).to(self.device)
            generator = torch.Generator().manual_seed(self.seed + MANY + start)
            parts.append(prior.embed(words, generator=generator).float().cpu())
        return torch.cat(parts)

    def _arms(self, heldout: Heldout, samples: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Return every arm with its settings, its costs and its scores without a decoder."""
        true = F.normalize(heldout.image_embed, dim=-1)
        distances = frechet_resamples(true, samples, self.resamples, generator=resampler())
        kernels = kernel_values(true, samples)
        pairs = PriorBatch(heldout.image_embed.to(self.device), heldout.text.to(self.device))
        stated = stated_indices(heldout.captions) if self._probe is not None else None
        arms: dict[str, dict[str, Any]] = {}
        for name, prior in self._parts.priors.items():
            values = embedding_values(samples[name], heldout.image_embed, heldout.text.embed)
            values["embed_kid"] = kernels[name]
            if self._probe is not None and stated is not None:
                read = [stated_match(self._probe.read(z), stated) for z in samples[name]]
                values["probe_match"] = torch.stack(read).mean(0)
            if self.kind in ("prior", "matched"):
                values |= self._asked(prior, pairs)
            arms[name] = {
                "values": {},
                "resamples": {"embed_fd": distances[name]} | {key: self._resampled(x) for key, x in values.items()},
                "class": type(prior).__name__,
                "reference": prior.reference,
                **costs_of(prior, self._costs[name], pairs),
                **training_of(self._trained(name))._asdict(),
                "sampling": settings(self.priors[name]),
            }
        return arms

    def _asked(self, prior: Prior, pairs: PriorBatch) -> dict[str, Tensor]:
        """Return what a prior says of the first captions: how far it obeys, and its likelihood."""
        found: dict[str, list[Tensor]] = {"dot_obedience": [], "nats": []}
        for start in range(0, min(ASKED, len(pairs.image_embed)), EMBED_BATCH):
            rows = slice(start, min(start + EMBED_BATCH, ASKED))
            batch = PriorBatch(pairs.image_embed[rows], pairs.text.rows(rows))
            obeyed = prior.obedience(batch.text, generator=streams_for(batch, self.seed))
            for name, values in (("dot_obedience", obeyed), ("nats", prior.nats(batch))):
                if values is not None:
                    found[name].append(values.cpu())
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def _trained(self, name: str) -> Path:
        """Return the folder of the fit whose checkpoint a prior reads."""
        path = self.weights / getattr(self.priors[name], "checkpoint", "")
        return path.parent.parent if path.parent.name == "checkpoints" else self.weights

    def _score(self, arms: dict[str, dict[str, Any]], heldout: Heldout, drawn: Drawn) -> None:
        """Add the scores of pictures to the arms."""
        n = len(next(iter(drawn.views.values())).judge)
        real, oracle = heldout.judge_image[:n], self.oracle or ShapesOracle
        stated = stated_indices(heldout.captions[:n], oracle)
        fd_judge = self._distances(real, drawn.views)
        kernels = kernel_values(real, {name: view.judge for name, view in drawn.views.items()})
        for name, view in drawn.views.items():
            values = caption_scores(view, real, heldout.judge_text[:n], stated)
            values |= neighbour_values(real, view.judge)._asdict()
            if "stated_match" in values:
                arms[name]["attributes"] = accuracy_by_attribute(view.read, stated, oracle.values)
            if isinstance(self.oracle, ShapesOracle):
                values["unseen_match"] = values["stated_match"].where(states_unseen_pair(stated), torch.nan)
            if isinstance(self.oracle, SceneOracle):
                bound = binding(view.read, stated)
                values["parts_right"] = bound.parts.float()
                means = {key: self._resampled(x.float()) for key, x in bound._asdict().items()}
                arms[name]["resamples"]["swapped"] = means["swapped"] / means["parts"]
                arms[name]["resamples"]["colors_swapped"] = means["colors_swapped"] / means["colors"]
            if name in drawn.many:
                values |= diversity_scores(drawn.many[name], drawn.captions, self.diversity_samples)
            arms[name]["values"] = values
            arms[name]["resamples"] |= {
                "fd_judge": fd_judge[name],
                "kid_judge": self._resampled(kernels[name]),
                "told_apart": self._resampled(told_apart(real, view.judge)),
            }

    def _distances(self, real: Tensor, views: dict[str, View]) -> dict[str, Tensor]:
        """Return the Fréchet distance of each view's pictures and its resamples, (1 + R,)."""
        features = {name: view.judge for name, view in views.items()}
        return frechet_resamples(real, features, self.resamples, generator=resampler())

    def _foundations(self, heldout: Heldout, drawn: Drawn | None) -> dict[str, Any] | None:
        if drawn is None or drawn.real is None or drawn.alone is None or self._parts.clip is None:
            return None
        distance = self._distances(heldout.judge_image[: len(drawn.alone.judge)], {ALONE: drawn.alone})[ALONE]
        codec = next((prior.codec for prior in self._parts.priors.values() if prior.codec is not None), None)
        return foundations(heldout, drawn.real, drawn.alone, distance, self._parts.clip, codec)

    def _sheets(self, heldout: Heldout, drawn: Drawn | None, shown: list[int]) -> dict[str, Sheet]:
        """Return the pictures that are kept: captions × arms, and many pictures of a few captions."""
        if drawn is None:
            return {}
        columns = {name: view.images for name, view in drawn.views.items()}
        columns |= {ALONE: drawn.alone.images} if drawn.alone is not None else {}
        sheets = {}
        if shown:
            size = next(iter(columns.values())).shape[-1]
            columns = {REAL: resize(heldout.images[shown], size), **columns}
            rows = [heldout.captions[row] for row in shown]
            sheets["grid"] = Sheet(torch.stack(list(columns.values()), dim=1), rows, list(columns))
        if drawn.many and self.grid_many:
            images = torch.stack([view.images for view in drawn.many.values()])  # (P, captions · K, 3, H, H)
            images = images.unflatten(1, (-1, self.diversity_samples)).transpose(0, 1)
            rows = [f"{name}: {caption}" for caption in drawn.captions[: len(images)] for name in drawn.many]
            sheets["many"] = Sheet(images.flatten(0, 1), rows, [str(i + 1) for i in range(self.diversity_samples)])
        return sheets

    def _write(self, arms: dict[str, Any], heldout: Heldout, drawn: Drawn | None, sheets: dict[str, Sheet]) -> None:
        counts = Counts(
            rows=len(heldout.captions),
            captions=min(self.captions, len(heldout.captions)) if drawn else 0,
            many=len(drawn.captions) if drawn else 0,
            seeds=self.seeds,
            resamples=self.resamples,
            many_samples=self.diversity_samples,
        )._asdict()
        cell = {
            "kind": self.kind,
            "title": self.title,
            "series": self.series,
            "x": self.x,
            "seed": self.seed,
            "base": self._base(),
            "judge": self._judge[0].fingerprint if self._judge else "",
            "heldout": blake2b("\n".join(heldout.captions).encode(), digest_size=6).hexdigest(),
            "counts": counts,
            "settings": settings({"clip": self.clip, "judge": self.judge, "decoder": self.decoder}) | counts,
            "space": spectrum(heldout.image_embed),
            "foundations": self._foundations(heldout, drawn),
            "arms": arms,
            "meta": provenance(self.device) | {"seconds": time.perf_counter() - self._started},
        }
        write_cell(self.out, cell, sheets)

    def _base(self) -> str:
        """Return the hash of what all cells of a study share; before a run is described, that is its CLIP."""
        return base_hash(self.run) if (self.run / RUN).is_file() else self._parts.fingerprint

    def _resampled(self, values: Tensor) -> Tensor:
        return resampled_means(values, self.resamples, generator=resampler())


def write_cell(out: Path, cell: dict[str, Any], sheets: dict[str, Sheet]) -> None:
    """Write a cell, and its pictures beside it.

    Args:
        out: JSON file.
        cell: its content; tensors become lists.
        sheets: its pictures by name.
    """
    for name, sheet in sheets.items():
        sheet.save(sheet_path(out, name))
    labels = {name: {"rows": sheet.rows, "columns": sheet.columns} for name, sheet in sheets.items()}
    write_json(out, _plain({"format": FORMAT, "pictures": labels, **cell}))


def shown_rows(metadata: list[dict[str, Any]], rows: int, licenses: list[str] | None) -> list[int]:
    """Return the first rows whose pictures a report may show: those without a licence, or with one of ``licenses``."""
    allowed = None if licenses is None else tuple(licenses)
    names = [sample.get("license") for sample in metadata]
    return [i for i, name in enumerate(names) if allowed is None or not name or str(name).startswith(allowed)][:rows]


def _plain(node: Any) -> Any:
    """Return tensors as lists of numbers of few digits, and what is not finite as None."""
    if isinstance(node, Tensor):
        return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in node.double().tolist()]
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node
