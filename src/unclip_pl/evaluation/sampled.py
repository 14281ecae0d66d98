"""What every test of priors does first: embed all held-out captions with each of them, and, given a decoder, draw."""

import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.assemble import Cost, Heldout, join_heldout, true_attributes
from unclip_pl.evaluation.drawing import Painter, gather
from unclip_pl.evaluation.flops import sampling_flops
from unclip_pl.evaluation.task import store_fingerprint, streams_for
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.generation.run import open_parts
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures

#: Captions of a batch when many are embedded.
EMBED_BATCH = 256


class SampledPriors(LightningModule):
    """Nothing is trained and nothing is checkpointed: networks are loaded when the test starts, and never registered.

    Args:
        run: folder that CLIP, judge and decoder are named relative to.
        weights: folder that the priors' checkpoints are named relative to.
        clip: the CLIP that conditions everything.
        judge: another CLIP, for the scores of images; None where nothing is drawn.
        decoder: shared by all priors; None where nothing is drawn.
        priors: by name.
        oracle: reads shapes back; None for other data.
        captions: held-out captions of which images are decoded.
        seeds: samples per caption for what needs no decoder, over all held-out rows; at least 2.
        batch_size: images decoded at once.
        seed: of all noise.

    Raises:
        ValueError: fewer than 2 seeds, the judge is the CLIP that it is to judge, or a decoder without a judge.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        weights: str,
        clip: ClipSpec,
        judge: ClipSpec | None,
        decoder: DecoderSpec | None,
        priors: dict[str, PriorSpec],
        oracle: ShapesOracle | None,
        captions: int,
        seeds: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        if seeds < 2:
            raise InputError(f"Expected seeds >= 2: the cosine between two samples needs two. Got {seeds}.")
        if judge == clip:
            raise InputError(f"Expected another CLIP as judge than the one that conditions the decoder. Got {clip}.")
        if decoder is not None and judge is None:
            raise InputError("Expected a judge beside the decoder: somebody must look at its images. Got none.")
        self.run = Path(run)
        self.decoder_run = self.run
        self.weights = Path(weights)
        self.clip = clip
        self.judge = judge
        self.decoder_spec = decoder
        self.prior_specs = priors
        self.oracle = oracle
        self.captions = captions
        self.seeds = seeds
        self.batch_size = batch_size
        self.seed = seed

    def on_test_start(self) -> None:
        """Loads every network, and refuses to mix CLIPs."""
        self._started = time.perf_counter()
        parts = open_parts(
            self.run,
            self.clip,
            device=self.device,
            store_fingerprint=store_fingerprint(self),
            decoder=self.decoder_spec,
            decoder_run=self.decoder_run,
            priors=self.prior_specs,
            weights=self.weights,
        )
        self.decoder, self.priors = parts.decoder, parts.priors
        # A plain dict keeps them out of the module tree: nobody should find a CLIP in a state dict.
        self._encoders: dict[str, ClipEncoder] = {"clip": parts.clip}
        if self.judge is not None:
            self._encoders["judge"] = self.judge.within(self.run).load().to(self.device)
        for name, prior in self.priors.items():
            if prior.keeps_norm:
                raise InputError(f"Expected priors of unit-norm embeddings to compare. Got {name!r} with keep_norm.")
        self._heldout: list[Heldout] = []
        self._samples: dict[str, list[Tensor]] = {name: [] for name in self.priors}
        self._costs = {name: Cost() for name in self.priors}

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Embeds the captions with every prior and every seed, and keeps what the judge says of the truth."""
        if self.oracle is not None:
            true_attributes(batch.metadata)  # now, not after all is drawn
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
        for name, prior in self.priors.items():
            if not self._samples[name]:
                self._costs[name] = self._costs[name]._replace(flops=sampling_flops(prior, pairs))
            streams = [streams_for(pairs, self.seed, s) for s in range(self.seeds)]  # the same for every prior
            started = time.perf_counter()
            draws = [prior.embed_batch(pairs, generator=stream).cpu() for stream in streams]
            self._costs[name] = self._costs[name].plus(time.perf_counter() - started, self.seeds * len(batch.captions))
            self._samples[name].append(torch.stack(draws).float())

    def gathered(self) -> tuple[Heldout, dict[str, Tensor]]:
        """All ranks' rows, and each prior's samples of them, (S, N, d)."""
        world = self.trainer.world_size
        samples = {
            name: torch.cat([part for parts in gather(own, world) for part in parts], dim=1)
            for name, own in self._samples.items()
        }
        return join_heldout(chain.from_iterable(gather(self._heldout, world))), samples

    def painter(self, decoder: Decoder) -> Painter:
        """What draws and looks, over all ranks."""
        return Painter(
            decoder,
            self._encoders["judge"],
            self.oracle,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )

    def embed_many(self, prior: Prior, text: TextFeatures) -> Tensor:
        """(N, d) samples of N captions, on the CPU."""
        parts = []
        for start in range(0, len(text.embed), EMBED_BATCH):
            words = text.rows(slice(start, start + EMBED_BATCH)).to(self.device)
            generator = torch.Generator().manual_seed(self.seed + 104_729 + start)
            parts.append(prior.embed(words, generator=generator).float().cpu())
        return torch.cat(parts)

    def _judged(self, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """The judge's features of true images and captions, (B, F) each; F is 0 where nothing is drawn."""
        if "judge" not in self._encoders:
            return torch.empty(len(batch.captions), 0), torch.empty(len(batch.captions), 0)
        judge = self._encoders["judge"]
        both = judge.encode_image(batch.image), judge.describe(batch.captions).embed
        return F.normalize(both[0].float(), dim=-1).cpu(), F.normalize(both[1].float(), dim=-1).cpu()


def shown_rows(metadata: list[dict[str, Any]], rows: int, licenses: list[str] | None) -> list[int]:
    """The first rows that a report may show: of those whose json names a `license`, what ``licenses`` begin with."""
    allowed = None if licenses is None else tuple(licenses)
    names = [sample.get("license") for sample in metadata]
    return [i for i, name in enumerate(names) if allowed is None or not name or str(name).startswith(allowed)][:rows]


def resize(images: Tensor, size: int) -> Tensor:
    """For the eye: (N, 3, H, H) at another side."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
