"""The comparison that the paper reports: priors side by side on the same captions, with the same CLIP and decoder."""

import time

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.assemble import Heldout, Material, assemble
from unclip_pl.evaluation.sampled import SampledPriors, resize, shown_rows
from unclip_pl.evaluation.scores import View, open_captions
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec
from unclip_pl.generation.provenance import provenance, settings
from unclip_pl.report.report import Atlas, print_summary, scalars, write_report
from unclip_pl.shapes.oracle import ShapesOracle

#: Captions whose many images the report shows.
SHOWN = 3


class Comparison(SampledPriors):
    """``unclip test --config configs/compare/…``: writes ``report.{json,md,html}`` and ``plots/`` into the run.

    It decodes captions · (priors + 1) + diversity_captions · diversity_samples · (priors without the ceiling) images.

    Args:
        run: folder of the run; every checkpoint is named relative to it.
        clip: the CLIP that conditions everything.
        judge: another CLIP, for the scores.
        decoder: shared by all priors.
        priors: by name, in the report's order.
        oracle: reads shapes back; None for other data.
        captions: held-out captions of which every prior's images are decoded.
        seeds: samples per caption for what needs no decoder, over all held-out rows; at least 2.
        diversity_captions: captions of which many images are decoded; 0 leaves diversity out.
        diversity_samples: images of each of those.
        rivals: two of the priors, for the head to head; the first is the one that the paper calls better.
        grid_rows: captions in the report's picture.
        grid_licenses: of the real images whose json names a `license`, show those alone whose licence begins with one
            of these; None shows any. A report that is published holds the pictures of others.
        batch_size: images decoded at once.
        resamples: of the captions, for intervals of Fréchet distances.
        seed: of all noise.

    Raises:
        ValueError: fewer than 2 seeds, or the judge is the CLIP that it is to judge.
    """

    def __init__(
        self,
        run: str,
        clip: ClipSpec,
        judge: ClipSpec,
        decoder: DecoderSpec,
        priors: dict[str, PriorSpec],
        oracle: ShapesOracle | None = None,
        captions: int = 512,
        seeds: int = 3,
        diversity_captions: int = 64,
        diversity_samples: int = 16,
        rivals: tuple[str, str] = ("diffusion", "ar"),
        grid_rows: int = 8,
        grid_licenses: list[str] | None = None,
        batch_size: int = 96,
        resamples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(run, run, clip, judge, decoder, priors, oracle, captions, seeds, batch_size, seed)
        self.diversity_captions = diversity_captions
        self.diversity_samples = diversity_samples
        self.rivals = rivals
        self.grid_rows = grid_rows
        self.grid_licenses = grid_licenses
        self.resamples = resamples
        self.settings = settings(
            {
                "clip": clip,
                "judge": judge,
                "decoder": decoder,
                "priors": priors,
                "captions": captions,
                "seeds": seeds,
                "diversity_captions": diversity_captions,
                "diversity_samples": diversity_samples,
                "resamples": resamples,
                "seed": seed,
            }
        )

    def on_test_epoch_end(self) -> None:
        """Decodes, scores and writes the report."""
        heldout, samples = self.gathered()
        embedded = time.perf_counter()
        material = self._draw(heldout, samples)
        if not self.trainer.is_global_zero:
            return
        drawn = time.perf_counter()
        report = assemble(material, self.priors, self.rivals, self.resamples, self._encoders["clip"], self.seed)
        scored = time.perf_counter()
        seconds = {
            "embed": embedded - self._started,
            "decode and look": drawn - embedded,
            "score": scored - drawn,
        }
        report["meta"] = {
            **provenance(self.device),
            "config": self.settings,
            "counts": material.counts(),
            "comparison_seconds": seconds,
        }
        atlases = self._atlases(material)
        report = write_report(self.run, report, atlases)
        self._log(report, atlases)
        print_summary(self.run, report)

    def _draw(self, heldout: Heldout, samples: dict[str, Tensor]) -> Material:
        """Every image of the comparison."""
        n = min(self.captions, len(heldout.captions))
        few = heldout.text.rows(slice(n))
        chosen = open_captions(heldout.captions, self.diversity_captions, shapes=self.oracle is not None)
        many = heldout.text.rows(torch.tensor(chosen, dtype=torch.long)).repeat(self.diversity_samples)
        drawers = {name: prior for name, prior in self.priors.items() if not prior.reference}
        assert self.decoder is not None
        painter = self.painter(self.decoder)
        with painter:
            painter.expect(n * (len(self.priors) + 1) + len(many.embed) * len(drawers))
            alone = self.decoder.null_text(n).to("cpu")
            keep = shown_rows(heldout.metadata[:n], self.grid_rows, self.grid_licenses)
            return Material(
                heldout=heldout,
                samples=samples,
                costs=self._costs,
                real=painter.look(heldout.images[:n].to(self.device), keep=keep),
                reconstruction=painter.paint(
                    heldout.image_embed[:n], alone, what="from the embedding alone", keep=keep
                ),
                views={name: painter.paint(drawn[0, :n], few, what=name, keep=keep) for name, drawn in samples.items()},
                many={
                    name: painter.paint(
                        self.embed_many(prior, many),
                        many,
                        what=f"{name}, {self.diversity_samples} of a caption",
                        keep=range(SHOWN * self.diversity_samples),
                    )
                    for name, prior in drawers.items()
                    if chosen
                },
                many_captions=[heldout.captions[row] for row in chosen],
                shown=keep,
            )

    def _atlases(self, material: Material) -> dict[str, Atlas]:
        """The report's pictures: captions × priors, and many images of a few captions."""
        columns: dict[str, View] = {"real": material.real, **material.views, "embedding alone": material.reconstruction}
        size = material.reconstruction.images.shape[-1]
        atlases = {}
        if material.shown:
            atlases["grid"] = Atlas(
                torch.stack([resize(view.images, size) for view in columns.values()], dim=1),
                rows=[material.heldout.captions[row] for row in material.shown],
                columns=list(columns),
            )
        if material.many:
            shown = torch.stack([view.images for view in material.many.values()])  # (P, SHOWN · K, 3, H, H)
            shown = shown.unflatten(1, (-1, self.diversity_samples)).transpose(0, 1).flatten(0, 1)
            captions = material.many_captions[: len(shown) // len(material.many)]
            rows = [f"{name}: {caption}" for caption in captions for name in material.many]
            atlases["many"] = Atlas(shown, rows, [str(i + 1) for i in range(self.diversity_samples)])
        return atlases

    def _log(self, report: dict[str, object], atlases: dict[str, Atlas]) -> None:
        """Into every logger; pictures into TensorBoard."""
        for logger in self.loggers:
            logger.log_metrics(scalars(report))
            if isinstance(logger, TensorBoardLogger):
                for name, atlas in atlases.items():
                    logger.experiment.add_image(f"compare/{name}", atlas.sheet())
