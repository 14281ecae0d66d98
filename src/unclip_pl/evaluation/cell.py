"""One cell of a study: a trained prior, measured. What it writes is small enough to be committed, and enough for every
interval, win rate, curve and table of the study's report: no network is asked again.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.evaluation.assemble import Heldout
from unclip_pl.evaluation.drawing import Painter
from unclip_pl.evaluation.flops import training_flops
from unclip_pl.evaluation.probe import AttributeProbe
from unclip_pl.evaluation.sampled import SampledPriors, resize, shown_rows
from unclip_pl.evaluation.scores import (
    View,
    caption_scores,
    diversity_scores,
    open_captions,
    resampled_means,
    stated_indices,
    states_unseen_pair,
)
from unclip_pl.files import write_json
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec
from unclip_pl.generation.provenance import provenance, settings
from unclip_pl.metrics.attributes import stated_match
from unclip_pl.metrics.clip_score import clip_scores
from unclip_pl.metrics.embedding import calibration
from unclip_pl.metrics.frechet import frechet_resamples
from unclip_pl.metrics.neighbours import neighbour_values
from unclip_pl.report.report import Atlas
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import PriorBatch

#: Digits that a stored number keeps.
DIGITS = 5


class Cell(SampledPriors):
    """``unclip test --config configs/compare/rematch-….yaml``: writes one JSON file of measurements.

    Args:
        run: folder that CLIP, judge and decoder are named relative to.
        weights: folder that the priors' checkpoints are named relative to; its ``config.yaml`` says how they were
            trained.
        clip: the CLIP that conditions everything.
        priors: by name: the cell's arms, usually one network sampled in several ways.
        group: what the cell belongs to: ``matched``, ``best``, ``reference``, ``curve/TITLE/SERIES`` (arms are named by
            their x), ``need/ARM`` or ``ablation/TITLE/ARM`` (its one arm has another name in the report than here).
        out: the file; pictures lie beside it.
        judge: another CLIP, for the scores of images; None where nothing is drawn.
        decoder: draws every arm; None measures embeddings alone.
        decoder_run: folder that the decoder is named relative to; ``run`` if not given.
        oracle: reads shapes back, from images and by probes from embeddings; None for other data.
        captions: held-out captions of which images are decoded.
        seeds: samples per caption for what needs no decoder, over all held-out rows; at least 2.
        diversity_captions: captions of which many images are decoded.
        diversity_samples: images of each of those.
        grid_rows: captions whose images are kept.
        grid_licenses: see :class:`~unclip_pl.evaluation.comparison.Comparison`.
        batch_size: images decoded at once.
        resamples: of the captions; every cell draws the same ones.
        seed: the training seed of the weights; the samples' noise follows from it too.
    """

    def __init__(
        self,
        run: str,
        weights: str,
        clip: ClipSpec,
        priors: dict[str, PriorSpec],
        group: str,
        out: str,
        judge: ClipSpec | None = None,
        decoder: DecoderSpec | None = None,
        decoder_run: str | None = None,
        oracle: ShapesOracle | None = None,
        captions: int = 512,
        seeds: int = 2,
        diversity_captions: int = 32,
        diversity_samples: int = 16,
        grid_rows: int = 6,
        grid_licenses: list[str] | None = None,
        batch_size: int = 96,
        resamples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(run, weights, clip, judge, decoder, priors, oracle, captions, seeds, batch_size, seed)
        self.decoder_run = Path(decoder_run) if decoder_run else self.run
        self.group = group
        self.out = Path(out)
        self.diversity_captions = diversity_captions
        self.diversity_samples = diversity_samples
        self.grid_rows = grid_rows
        self.grid_licenses = grid_licenses
        self.resamples = resamples
        self.settings = {name: settings(prior) for name, prior in priors.items()}
        self.decoder_settings = settings(decoder)

    def on_test_start(self) -> None:
        """Loads every network; fits the probes of the embeddings where attributes are known."""
        super().on_test_start()
        data = getattr(self.trainer, "datamodule", None)
        known = self.oracle is not None and isinstance(data, UnclipDataModule)
        self._probe = AttributeProbe.fit(data.embeddings) if known and data is not None else None

    def on_test_epoch_end(self) -> None:
        """Measures every arm and writes the file."""
        heldout, samples = self.gathered()
        n = min(self.captions, len(heldout.captions))
        shown = shown_rows(heldout.metadata[:n], self.grid_rows, self.grid_licenses)
        pairs = PriorBatch(heldout.image_embed, heldout.text)
        embed_fd = frechet_resamples(
            F.normalize(heldout.image_embed, dim=-1), samples, self.resamples, generator=self._resampler()
        )
        arms: dict[str, Any] = {}
        for name, drawn in samples.items():
            resampled = {"embed_fd": embed_fd[name], **self._embedding_scores(drawn, heldout)}
            arms[name] = {
                "values": {},
                "resamples": resampled,
                **self._cost(name, pairs),
                "sampling": self.settings[name],
            }
        counts = {"rows": len(heldout.captions), "captions": 0, "many": 0}
        pictures: dict[str, Tensor] = {}
        if self.decoder is not None:
            counts |= {"captions": n, "many": self.diversity_captions}
            with self.painter(self.decoder) as painter:
                views = self._draw(painter, heldout, samples, arms, shown)
            pictures = {name: view.images for name, view in views.items()}
            size = next(iter(pictures.values())).shape[-1]
            pictures = {"real": resize(heldout.images[shown], size), **pictures}
        if self.trainer.is_global_zero:
            rows = [heldout.captions[row] for row in shown]
            self._write(arms, counts, pictures, rows, spectrum(heldout.image_embed))

    def _embedding_scores(self, samples: Tensor, heldout: Heldout) -> dict[str, Tensor]:
        """(1 + R,) means over captions of what needs no decoder."""
        cosines = calibration(samples.transpose(0, 1), heldout.image_embed)
        values = {
            "cos_true": cosines.to_true,
            "cos_samples": cosines.between_samples,
            "cos_mean": cosines.mean_to_true,
            "calibration_gap": cosines.gap,
            "text_cos": clip_scores(samples, heldout.text.embed.expand_as(samples)).mean(0) / 100,
        }
        if self._probe is not None:
            stated = stated_indices(heldout.captions)
            values["probe_match"] = torch.stack([stated_match(self._probe.read(z), stated) for z in samples]).mean(0)
        return {
            name: resampled_means(value, self.resamples, generator=self._resampler()) for name, value in values.items()
        }

    def _draw(
        self,
        painter: Painter,
        heldout: Heldout,
        samples: dict[str, Tensor],
        arms: dict[str, Any],
        shown: list[int],
    ) -> dict[str, View]:
        """Images of every arm; their scores go into ``arms``."""
        n = min(self.captions, len(heldout.captions))
        few = heldout.text.rows(slice(n))
        stated = stated_indices(heldout.captions[:n])
        chosen = open_captions(heldout.captions, self.diversity_captions, shapes=self.oracle is not None)
        captions = [heldout.captions[row] for row in chosen]
        many = heldout.text.rows(torch.tensor(chosen, dtype=torch.long)).repeat(self.diversity_samples)
        given = sum(prior.reference for prior in self.priors.values())
        painter.expect(n * len(samples) + len(many.embed) * (len(samples) - given))
        real = heldout.judge_image[:n]
        views = {name: painter.paint(drawn[0, :n], few, what=name, keep=shown) for name, drawn in samples.items()}
        fd_judge = frechet_resamples(
            real, {name: view.judge for name, view in views.items()}, self.resamples, generator=self._resampler()
        )
        for name, view in views.items():
            arms[name]["resamples"]["fd_judge"] = fd_judge[name]
            values = caption_scores(view, real, heldout.judge_text[:n], stated)
            values |= neighbour_values(real, view.judge)._asdict()
            if "stated_match" in values:
                values["unseen_match"] = values["stated_match"].where(states_unseen_pair(stated), torch.nan)
            prior = self.priors[name]
            if chosen and not prior.reference:
                drawn = painter.paint(self.embed_many(prior, many), many, what=f"{name}, many of a caption")
                values |= diversity_scores(drawn, captions, self.diversity_samples)
            arms[name]["values"] = values
        return views

    def _cost(self, name: str, pairs: PriorBatch) -> dict[str, Any]:
        """What training and sampling took, and how it was trained."""
        prior, cost = self.priors[name], self._costs[name]
        config = training_config(self.weights)
        task = prior.task
        on_device = PriorBatch(pairs.image_embed.to(self.device), pairs.text.to(self.device))
        steps, size = prior.record.steps, config.get("batch_size", 0)
        flops = training_flops(task, on_device) if task is not None and steps else 0
        return {
            "class": type(prior).__name__,
            "reference": prior.reference,
            "parameters": prior.num_parameters,
            "training_steps": steps,
            "training_samples": steps * size,
            "training_seconds": prior.record.seconds,
            "training_flops": flops * steps * size,
            "lr": config.get("lr"),
            "config_hash": config.get("hash"),
            "evaluations": prior.evaluations,
            "flops_per_embedding": cost.flops,
            "seconds_per_embedding": cost.seconds / max(1, cost.embeddings),
        }

    def _write(
        self,
        arms: dict[str, Any],
        counts: dict[str, int],
        pictures: dict[str, Tensor],
        rows: list[str],
        space: dict[str, float],
    ) -> None:
        if pictures and rows:
            images = torch.stack(list(pictures.values()), dim=1)  # (rows, arms, 3, H, H)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            Atlas(images, rows, list(pictures)).save(self.out.with_suffix(".png"))
        cell = {
            "group": self.group,
            "seed": self.seed,
            "counts": counts
            | {"seeds": self.seeds, "resamples": self.resamples, "many_samples": self.diversity_samples},
            "pictures": {"rows": rows, "columns": list(pictures)} if pictures and rows else None,
            "decoder": self.decoder_settings,
            "space": space,
            "meta": provenance(self.device),
            "arms": arms,
        }
        write_json(self.out, _plain(cell))

    def _resampler(self) -> torch.Generator:
        """The same captions in every cell, whatever its seed."""
        return torch.Generator().manual_seed(0)


def spectrum(image_embed: Tensor) -> dict[str, float]:
    """How many directions (N, d) embeddings use: axes for 99 % of the variance, and the effective rank, exp of the
    entropy of its shares (Roy & Vetterli 2007).
    """
    unit = F.normalize(image_embed.double(), dim=-1)
    shares = torch.linalg.svdvals(unit - unit.mean(0)).square()
    shares = shares / shares.sum()
    return {
        "embed_dim": unit.shape[1],
        "axes_for_99": int((shares.cumsum(0) < 0.99).sum()) + 1,
        "effective_rank": (-torch.xlogy(shares, shares).sum()).exp().item(),
    }


def training_config(weights: Path) -> dict[str, Any]:
    """``batch_size``, ``lr`` and a ``hash`` of what trained a folder's checkpoints; empty where nothing says so."""
    path = weights / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    return {
        "batch_size": data.get("batch_size", 0),
        "lr": (model.get("optimization") or {}).get("lr"),
        "hash": settings_hash({"model": model, "batch_size": data.get("batch_size"), "seed": data.get("seed")}),
    }


def settings_hash(config: Any) -> str:
    """Of plain data, without the files that it names: where they lie changes nothing."""
    from hashlib import sha256

    def bare(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: bare(value) for key, value in node.items()}
        return "" if isinstance(node, str) and "/" in node else node

    return sha256(json.dumps(bare(config), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _plain(node: Any) -> Any:
    """Tensors as lists of numbers of few digits."""
    if isinstance(node, Tensor):
        return [None if value != value else float(f"{value:.{DIGITS}g}") for value in node.double().tolist()]
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return node
