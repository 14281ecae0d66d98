"""The comparison that the paper reports: priors side by side on the same captions, with the same CLIP and decoder."""

import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.evaluation.assemble import Cost, Heldout, Material, assemble, join_heldout, true_attributes
from unclip_pl.evaluation.drawing import Painter, gather
from unclip_pl.evaluation.flops import sampling_flops
from unclip_pl.evaluation.provenance import provenance, settings
from unclip_pl.evaluation.report import Atlas, print_summary, scalars, write_report
from unclip_pl.evaluation.scores import View, open_captions, select_text
from unclip_pl.evaluation.task import check_store
from unclip_pl.nn.text import repeat_text
from unclip_pl.pipeline import Decoder, check_clip, check_norm
from unclip_pl.priors import Prior, TrueEmbedding
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures

#: Captions whose many images the report shows, and captions of a batch when many are embedded.
SHOWN, EMBED_BATCH = 3, 256


class Comparison(LightningModule):
    """``unclip test --config configs/compare/…``: writes ``report.{json,md,html}`` and ``plots/`` into the run.

    Nothing is trained and nothing is checkpointed: networks are loaded when the test starts, and never registered.
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

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec,
        judge: ClipSpec,
        decoder: Decoder,
        priors: dict[str, Prior],
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
        super().__init__()
        if seeds < 2:
            raise ValueError(f"Expected seeds >= 2: the cosine between two samples needs two. Got {seeds}.")
        if judge == clip:
            raise ValueError(f"Expected another CLIP as judge than the one that conditions the decoder. Got {clip}.")
        self.run = Path(run)
        self.clip = clip
        self.judge = judge
        self.decoder = decoder
        self.priors = priors
        self.oracle = oracle
        self.captions = captions
        self.seeds = seeds
        self.diversity_captions = diversity_captions
        self.diversity_samples = diversity_samples
        self.rivals = rivals
        self.grid_rows = grid_rows
        self.grid_licenses = grid_licenses
        self.batch_size = batch_size
        self.resamples = resamples
        self.seed = seed
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

    def on_test_start(self) -> None:
        """Loads every network, and refuses to mix CLIPs."""
        self._started = time.perf_counter()
        device = str(self.device)
        encoder = self.clip.within(self.run).load().to(self.device)
        # A plain dict keeps them out of the module tree: nobody should find a CLIP in a state dict.
        self._encoders: dict[str, ClipEncoder] = {
            "clip": encoder,
            "judge": self.judge.within(self.run).load().to(self.device),
        }
        fingerprint = encoder.fingerprint
        check_store(self, fingerprint)
        self.decoder.load(self.run, device)
        check_clip(fingerprint, self.decoder.fingerprint, f"the decoder {self.run / self.decoder.checkpoint}")
        for name, prior in self.priors.items():
            check_clip(fingerprint, prior.load(self.run, device).fingerprint, f"the prior {name!r}")
            check_norm(prior, self.decoder)
            if prior.keeps_norm:
                raise ValueError(f"Expected priors of unit-norm embeddings to compare. Got {name!r} with keep_norm.")
        self._heldout: list[Heldout] = []
        self._samples: dict[str, list[Tensor]] = {name: [] for name in self.priors}
        self._costs = {name: Cost() for name in self.priors}

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Embeds the captions with every prior and every seed, and keeps what the judge says of the truth."""
        if self.oracle is not None:
            true_attributes(batch.metadata)  # now, not after all is drawn
        judge = self._encoders["judge"]
        room = max(0, self.captions - sum(len(part.captions) for part in self._heldout))
        self._heldout.append(
            Heldout(
                image_embed=batch.image_embed.float().cpu(),
                text=TextFeatures(*(part.cpu() for part in batch.text)),
                captions=batch.captions,
                metadata=batch.metadata,
                judge_image=F.normalize(judge.encode_image(batch.image).float(), dim=-1).cpu(),
                judge_text=F.normalize(judge.describe(batch.captions).embed.float(), dim=-1).cpu(),
                images=batch.image[:room].float().cpu(),
            )
        )
        pairs = PriorBatch(batch.image_embed, batch.text)
        for name, prior in self.priors.items():
            if not self._samples[name]:
                self._costs[name] = self._costs[name]._replace(flops=sampling_flops(prior, pairs))
            started = time.perf_counter()
            draws = [prior.embed_batch(pairs, generator=self._generator(batch_idx, s)).cpu() for s in range(self.seeds)]
            self._costs[name] = self._costs[name].plus(time.perf_counter() - started, self.seeds * len(batch.captions))
            self._samples[name].append(torch.stack(draws).float())

    def on_test_epoch_end(self) -> None:
        """Decodes, scores and writes the report."""
        world = self.trainer.world_size
        heldout = join_heldout(chain.from_iterable(gather(self._heldout, world)))
        samples = {
            name: torch.cat([part for parts in gather(own, world) for part in parts], dim=1)
            for name, own in self._samples.items()
        }
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

    def _generator(self, *numbers: int) -> torch.Generator:
        """One stream for each combination of numbers, other ones on other ranks, the same for every prior."""
        words = (self.seed, self.global_rank, *numbers)
        return torch.Generator().manual_seed(sum(word * 10_007**i for i, word in enumerate(words)) % 2**63)

    def _draw(self, heldout: Heldout, samples: dict[str, Tensor]) -> Material:
        """Every image of the comparison."""
        n = min(self.captions, len(heldout.captions))
        few = select_text(heldout.text, slice(n))
        chosen = open_captions(heldout.captions, self.diversity_captions, shapes=self.oracle is not None)
        many = repeat_text(select_text(heldout.text, torch.tensor(chosen, dtype=torch.long)), self.diversity_samples)
        drawers = {name: prior for name, prior in self.priors.items() if not isinstance(prior, TrueEmbedding)}
        painter = Painter(
            self.decoder,
            self._encoders["judge"],
            self.oracle,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )
        with painter:
            painter.expect(n * (len(self.priors) + 1) + len(many.embed) * len(drawers))
            alone = TextFeatures(*(part.cpu() for part in self.decoder.null_text(n)))
            keep = self._shown(heldout.metadata[:n])
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
                        self._embed_many(prior, many),
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

    def _shown(self, metadata: list[dict[str, Any]]) -> list[int]:
        """The first rows that the report may show."""
        allowed = None if self.grid_licenses is None else tuple(self.grid_licenses)
        licences = [sample.get("license") for sample in metadata]
        rows = [i for i, name in enumerate(licences) if allowed is None or not name or str(name).startswith(allowed)]
        return rows[: self.grid_rows]

    def _embed_many(self, prior: Prior, text: TextFeatures) -> Tensor:
        """(N, d) samples of N captions, on the CPU."""
        parts = []
        for start in range(0, len(text.embed), EMBED_BATCH):
            words = select_text(text, slice(start, start + EMBED_BATCH))
            words = TextFeatures(*(part.to(self.device) for part in words))
            generator = torch.Generator().manual_seed(self.seed + 104_729 + start)
            parts.append(prior.embed(words, generator=generator).float().cpu())
        return torch.cat(parts)

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


def resize(images: Tensor, size: int) -> Tensor:
    """For the eye: (N, 3, H, H) at another side."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
