"""Measure what each upsampler adds: a decoder's pictures brought to full size through ever more of a cascade."""

from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.drawing import Painter, gather, join_views
from unclip_pl.evaluation.inputs import check_judge, judge_of, parts_of, streams_for
from unclip_pl.evaluation.measures import within_shares
from unclip_pl.evaluation.scores import View, accuracy_by_attribute, true_attributes
from unclip_pl.evaluation.sheet import REAL
from unclip_pl.files import write_json
from unclip_pl.generation.decoding import DecoderSpec, UpsamplerSpec, resize
from unclip_pl.generation.pictures import grid, save_png
from unclip_pl.generation.provenance import provenance, settings
from unclip_pl.metrics.attributes import captions_right
from unclip_pl.metrics.frechet import FrechetDistance, frechet_interval
from unclip_pl.metrics.interval import mean_interval
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import EvaluationBatch


class Seen(NamedTuple):
    """A batch at one stage: drawn up to some side, enlarged to full size by bicubic interpolation."""

    view: View
    tiles: Tensor  # (B · T, F) unit norm: the judge's features of the pictures' tiles


class Shared(NamedTuple):
    """What belongs to a batch at every stage."""

    truth: Tensor  # (B, A) true attributes
    captions: list[str]  # of the pictures shown
    small: Tensor  # (n, 3, h, h) as the decoder drew them, of the pictures shown


class CascadeEvaluation(LightningModule):
    """``unclip test --config configs/evaluate/cascade.yaml``: writes ``cascade.json`` and ``cascade.png``.

    The decoder draws from the true embeddings, without captions. Its pictures are compared at the side of the data's:
    enlarged by bicubic interpolation alone, then by the first upsampler and bicubic for the rest, and so on. The judge
    sees whole pictures at its own side, where detail is lost, and therefore also their tiles of that side.

    Args:
        run: folder that CLIP, judge and decoder are named relative to.
        weights: folder that the upsamplers are named relative to.
        clip: the CLIP that conditions the decoder.
        judge: another CLIP, for the Fréchet distances.
        decoder: decoder without upsamplers.
        upsamplers: stages after it, smallest first.
        oracle: reads shapes of the data's side.
        out: folder to write.
        shown: number of pictures in the grid.
        resamples: number of bootstrap resamples of the pictures, for intervals of Fréchet distances.
        seed: base seed of every random draw.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        weights: str,
        clip: ClipSpec,
        judge: ClipSpec,
        decoder: DecoderSpec,
        upsamplers: list[UpsamplerSpec],
        oracle: ShapesOracle,
        out: str,
        shown: int = 8,
        resamples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_judge(judge, clip)
        self.run = Path(run)
        self.weights = Path(weights)
        self.clip = clip
        self.judge = judge
        self.decoder = decoder
        self.upsamplers = upsamplers
        self.oracle = oracle
        self.out = Path(out)
        self.shown = shown
        self.resamples = resamples
        self.seed = seed
        self.settings = settings({"decoder": decoder, "upsamplers": upsamplers, "resamples": resamples, "seed": seed})

    def on_test_start(self) -> None:
        """Load every network, and refuse to mix CLIPs."""
        parts = parts_of(self, decoder=self.decoder)
        assert parts.decoder is not None
        self._stages = [upsampler.load(self.weights, str(self.device)) for upsampler in self.upsamplers]
        (judge,) = judge_of(self, parts.fingerprint)
        self._painter = Painter(parts.decoder, judge, self.oracle, batch_size=0, seed=self.seed)
        self._seen: dict[str, list[Seen]] = {}
        self._rows: list[Shared] = []

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw a batch through the cascade and look at it at every stage."""
        noise = streams_for(batch, self.seed)
        decoder = self._painter.decoder
        text = decoder.null_text(len(batch.image))
        drawn = [decoder.decode(batch.image_embed, text, generator=noise)]
        for upsampler in self._stages:
            drawn.append(upsampler.upsample(drawn[-1], generator=noise))
        side = batch.image.shape[-1]
        stages = {str(image.shape[-1]): resize(image, side) for image in drawn} | {REAL: batch.image}
        keep = range(min(len(batch.image), max(0, self.shown - sum(len(rows.captions) for rows in self._rows))))
        for name, images in stages.items():
            tiles = self._painter.judge.encode_image(tiles_of(images, self.judge.image_size))
            seen = Seen(self._painter.look(images, keep=keep), F.normalize(tiles.float(), dim=-1).cpu())
            self._seen.setdefault(name, []).append(seen)
        truth = true_attributes(batch.metadata)
        self._rows.append(Shared(truth, [batch.captions[row] for row in keep], drawn[0][: len(keep)].float().cpu()))

    def on_test_epoch_end(self) -> None:
        """Score every stage, and write and log the scores."""
        ranks = gather((self._rows, self._seen), self.trainer.world_size)
        rows = [part for own, _ in ranks for part in own]
        seen = {name: [part for _, own in ranks for part in own[name]] for name in self._seen}
        views = {name: join_views([part.view for part in parts]) for name, parts in seen.items()}
        truth = torch.cat([part.truth for part in rows])
        noise = torch.Generator().manual_seed(self.seed)
        drawn = {name: view.judge for name, view in views.items() if name != REAL}
        distances = frechet_interval(views[REAL].judge, drawn, self.resamples, generator=noise)
        stages: dict[str, dict[str, Any]] = {}
        for name, view in views.items():
            stages[name] = {
                "accuracy": accuracy_by_attribute(view.read, truth),
                "all_right": within_shares(mean_interval(captions_right(view.read, truth)), len(truth))._asdict(),
                "residual": mean_interval(view.residual)._asdict(),
            }
            if name != REAL:
                stages[name]["fd_judge"] = distances[name]._asdict()
                stages[name]["fd_judge_tiles"] = _distance(seen[REAL], seen[name])
        if self.trainer.is_global_zero:
            self._write({"pictures": len(truth), "stages": stages}, views, rows)
        for name in drawn:
            means = {key: stages[name][key]["mean"] for key in ("all_right", "residual", "fd_judge")}
            means["fd_judge_tiles"] = stages[name]["fd_judge_tiles"]
            self.log_dict({f"{name}/{key}": value for key, value in means.items()})

    def _write(self, report: dict[str, Any], views: dict[str, View], rows: list[Shared]) -> None:
        meta = {**provenance(self.device), "settings": self.settings}
        write_json(self.out / "cascade.json", {**report, "meta": meta}, indent=2)
        captions = list(chain.from_iterable(part.captions for part in rows))[: self.shown]  # each rank has kept as many
        small = torch.cat([part.small for part in rows])
        first, *rest = views
        columns = [f"{first} px, as drawn", "bicubic", *(f"to {name} px" for name in rest if name != REAL), REAL]
        pictures = [small, *(view.images for view in views.values())]
        picture = grid([(caption, [column[i] for column in pictures]) for i, caption in enumerate(captions)], columns)
        facts = {"seed": self.seed, "run": self.weights.resolve().name, "commit": meta["commit"]}
        save_png(picture, self.out / "cascade.png", facts)


def tiles_of(images: Tensor, side: int) -> Tensor:
    """Cut (B, 3, H, H) into (B · (H / side)², 3, side, side), picture by picture; a rest at the border is left out."""
    tiles = images.unfold(2, side, side).unfold(3, side, side)  # (B, 3, n, n, side, side)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def _distance(real: list[Seen], fake: list[Seen]) -> float:
    distance = FrechetDistance(real[0].tiles.shape[1])
    for parts, is_real in ((real, True), (fake, False)):
        for part in parts:
            distance.update(part.tiles, real=is_real)
    return distance.compute().item()
