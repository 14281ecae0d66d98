"""Score one model, for `unclip test --config configs/evaluate/…`: a prior by its embeddings, a decoder or a whole
pipeline by its pictures.

Metrics pool over batches and ranks by themselves. Networks are loaded when the test starts, and never registered.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.fid import FID
from unclip_pl.evaluation.inputs import check_judge, check_seeds, judge_of, parts_of, streams_for
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec, TrueEmbeddingSpec
from unclip_pl.metrics import FrechetDistance, Rows
from unclip_pl.metrics.clip_score import clip_scores, retrieval_recall
from unclip_pl.metrics.embedding import Calibration, calibration
from unclip_pl.metrics.neighbours import precision_recall
from unclip_pl.types import EvaluationBatch, PriorBatch


class PriorEvaluation(LightningModule):
    """Sampled embeddings beside the true ones: Fréchet distance, precision and recall, and the calibration cosines.

    Args:
        run: folder of the run; the checkpoint is named relative to it.
        clip: the CLIP whose embeddings these are; None trusts what the store says.
        prior: the prior to score.
        seeds: number of samples per caption, at least 2; the first goes into distance, precision and recall.
        seed: base seed of every random draw.

    Raises:
        InputError: fewer than 2 seeds.
    """

    batch_type = PriorBatch

    def __init__(self, run: str, clip: ClipSpec | None, prior: PriorSpec, seeds: int = 2, seed: int = 0) -> None:
        super().__init__()
        check_seeds(seeds)
        self.run = Path(run)
        self.clip = clip
        self.prior = prior
        self.seeds = seeds
        self.seed = seed
        self.rows = Rows("true", "samples")

    def on_test_start(self) -> None:
        """Load the prior, and refuse another CLIP's."""
        self._parts = parts_of(self, priors={"prior": self.prior})
        data: Any = self.trainer
        width = data.datamodule.embed_dim if self.clip is None else self.clip.embed_dim
        self.distance = FrechetDistance(width).to(self.device)

    def test_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Embed the captions ``seeds`` times."""
        generator = streams_for(batch, self.seed)
        prior = self._parts.priors["prior"]
        draws = [prior.embed_batch(batch, generator=generator).float() for _ in range(self.seeds)]
        samples = F.normalize(torch.stack(draws, dim=1), dim=-1)  # (B, S, d)
        true = F.normalize(batch.image_embed.float(), dim=-1)
        self.distance.update(true, real=True)
        self.distance.update(samples[:, 0], real=False)
        self.rows.update(true=true, samples=samples)

    def on_test_epoch_end(self) -> None:
        """Log all scores."""
        true, samples = self.rows.compute().values()
        cosines = Calibration(*(values.double().mean() for values in calibration(samples, true)))
        inside = precision_recall(true, samples[:, 0])
        self.log_dict(
            {
                "embed_fd": self.distance.compute().float(),
                "precision": inside.precision,
                "recall": inside.recall,
                "cos_true": cosines.to_true.float(),
                "cos_samples": cosines.between_samples.float(),
                "calibration_gap": cosines.gap.float(),
                "mean_norm": cosines.mean_norm.float(),
            }
        )


class ImageEvaluation(LightningModule):
    """Decoded pictures beside the real ones: Fréchet distance, precision, recall (judge's features) and CLIP score.

    Args:
        run: folder of the run; checkpoints are named relative to it.
        clip: the CLIP that conditions everything.
        judge: another CLIP, for the scores.
        decoder: the decoder to score, with its upsamplers.
        prior: draws the embeddings that are decoded; None decodes the true ones, which scores the decoder alone.
        inception_weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``: with it the Fréchet distance
            of Inception features is ``fid``; without it there is no number of that name.
        seed: base seed of every random draw.

    Raises:
        InputError: the judge is the CLIP that it is to judge.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec,
        judge: ClipSpec,
        decoder: DecoderSpec,
        prior: PriorSpec | None = None,
        inception_weights: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_judge(judge, clip)
        self.run = Path(run)
        self.clip = clip
        self.judge = judge
        self.decoder = decoder
        self.prior = prior or TrueEmbeddingSpec(keep_norm=True)
        self.seed = seed
        self.distance = FrechetDistance(judge.embed_dim)
        self.rows = Rows("real", "fake", "text")
        self.fid = FID(inception_weights) if inception_weights else None

    def on_test_start(self) -> None:
        """Load every network, and refuse to mix CLIPs."""
        if self.fid is not None:
            self.fid.load()
        self._parts = parts_of(self, decoder=self.decoder, priors={"prior": self.prior})
        self._judge = judge_of(self, self._parts.fingerprint)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw one picture for each caption and look at it."""
        generator = streams_for(batch, self.seed)
        decoder, prior = self._parts.decoder, self._parts.priors["prior"]
        assert decoder is not None
        z_i = prior.embed_batch(PriorBatch(batch.image_embed, batch.text), generator=generator)
        images = decoder.decode(z_i, batch.text, generator=generator)
        judge = self._judge[0]
        real, fake = (F.normalize(judge.encode_image(x).float(), dim=-1) for x in (batch.image, images))
        self.distance.update(real, real=True)
        self.distance.update(fake, real=False)
        self.rows.update(real=real, fake=fake, text=judge.describe(batch.captions).embed)
        if self.fid is not None:
            self.fid.update(batch.image, real=True)
            self.fid.update(images, real=False)

    def on_test_epoch_end(self) -> None:
        """Log all scores."""
        real, fake, text = self.rows.compute().values()
        inside = precision_recall(real, fake)
        scores = {
            "fd_judge": self.distance.compute().float(),
            "precision": inside.precision,
            "recall": inside.recall,
            "clip_score": clip_scores(fake, text).double().mean().float(),
            "retrieval_r10": retrieval_recall(fake, real, 10).float(),
        }
        if self.fid is not None:
            scores["fid"] = self.fid.compute().float()
        self.log_dict(scores)
