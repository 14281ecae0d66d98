"""Score one model, for `unclip test --config configs/evaluate/…`: a prior by its embeddings, a decoder or a whole
pipeline by its pictures.

Metrics pool over batches and ranks by themselves. Networks are loaded when the test starts, and never registered.
"""

from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.data.datamodule import StoreDataModule
from unclip_pl.errors import InputError
from unclip_pl.evaluation.extractors import load_inception
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import PriorSpec, TrueEmbeddingSpec
from unclip_pl.generation.run import Parts, open_parts
from unclip_pl.metrics import FrechetDistance, Rows
from unclip_pl.metrics.clip_score import clip_scores, retrieval_recall
from unclip_pl.metrics.embedding import Calibration, calibration
from unclip_pl.metrics.neighbours import precision_recall
from unclip_pl.types import EvaluationBatch, PriorBatch


class PriorEvaluation(LightningModule):
    """Sampled embeddings beside the true ones: Fréchet distance, precision and recall, and the calibration cosines.

    Args:
        run: folder of the run; the checkpoint is named relative to it.
        clip: the CLIP whose embeddings these are; None takes the data's word for it.
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
        self.inception_weights = inception_weights
        self.seed = seed
        self.distance = FrechetDistance(judge.embed_dim)
        self.rows = Rows("real", "fake", "text")
        self.fid = FrechetDistance(2048) if inception_weights else None

    def on_test_start(self) -> None:
        """Load every network, and refuse to mix CLIPs."""
        judge = self.judge.within(self.run).load().to(self.device)
        inception = load_inception(self.inception_weights).to(self.device) if self.inception_weights else None
        # A tuple keeps them out of the module tree: nobody should find a CLIP in a state dict.
        self._judges = Judges(judge, inception)
        self._parts = parts_of(self, decoder=self.decoder, priors={"prior": self.prior})

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw one picture for each caption and look at it."""
        generator = streams_for(batch, self.seed)
        decoder, prior = self._parts.decoder, self._parts.priors["prior"]
        assert decoder is not None
        z_i = prior.embed_batch(PriorBatch(batch.image_embed, batch.text), generator=generator)
        images = decoder.decode(z_i, batch.text, generator=generator)
        judge, inception = self._judges
        real, fake = (F.normalize(judge.encode_image(x).float(), dim=-1) for x in (batch.image, images))
        self.distance.update(real, real=True)
        self.distance.update(fake, real=False)
        self.rows.update(real=real, fake=fake, text=judge.describe(batch.captions).embed)
        if self.fid is not None and inception is not None:
            self.fid.update(inception(to_bytes(batch.image))[0], real=True)
            self.fid.update(inception(to_bytes(images))[0], real=False)

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


class Judges(NamedTuple):
    """Frozen networks that look at images."""

    clip: ClipEncoder
    inception: nn.Module | None


def check_seeds(seeds: int) -> None:
    """Refuse fewer than two samples of a caption.

    Raises:
        InputError: there are fewer.
    """
    if seeds < 2:
        raise InputError(f"Expected seeds >= 2, for the cosine between two samples. Got {seeds}: give 2 or more.")


def check_judge(judge: ClipSpec | None, clip: ClipSpec | None) -> None:
    """Refuse a judge that conditions what it is to judge.

    Raises:
        InputError: judge and CLIP are the same.
    """
    if judge is not None and judge == clip:
        raise InputError(f"Expected another CLIP as judge than the conditioning one. Got {clip}: name a second one.")


def parts_of(module: Any, **named: Any) -> Parts:
    """Load the networks that a test-module names, and refuse to mix CLIPs, also with the embeddings that it is given.

    Args:
        module: LightningModule with a ``run`` and a ``clip``.
        **named: specs and folders, see :func:`unclip_pl.generation.run.open_parts`.
    """
    data = getattr(module.trainer, "datamodule", None)  # Lightning attaches it without declaring it
    store = data.embeddings.fingerprint if isinstance(data, StoreDataModule) else None
    return open_parts(module.run, module.clip, device=module.device, store_fingerprint=store, **named)


def streams_for(batch: PriorBatch | EvaluationBatch, *numbers: int) -> list[torch.Generator]:
    """Return a generator for each pair of a batch, which its embeddings and some numbers alone decide.

    A pair draws the same in any batch, on any rank.
    """
    pairs = torch.cat([batch.image_embed, batch.text.embed], dim=-1).float().cpu().numpy()
    key = repr(numbers).encode()
    seeds = [int.from_bytes(blake2b(pair.tobytes(), digest_size=8, key=key).digest()) for pair in pairs]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def to_bytes(images: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, the way an image file holds them."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
