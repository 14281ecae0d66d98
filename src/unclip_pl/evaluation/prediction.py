"""Write what a trained run makes of the held-out captions: ``unclip predict --config configs/predict/…``."""

import re
from pathlib import Path

import torch
from lightning import LightningModule
from torch import Tensor

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.inputs import parts_of, streams_for
from unclip_pl.files import write_tensors
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.pictures import to_bytes
from unclip_pl.generation.priors import PriorSpec, TrueEmbeddingSpec
from unclip_pl.packing.pack import write_shards
from unclip_pl.packing.samples import Sample
from unclip_pl.types import EvaluationBatch, PriorBatch


class PriorPrediction(LightningModule):
    """Draws ``out/image_embed-RANK.safetensors``: (N, d), unit norm, one per held-out caption in the store's order.

    Args:
        run: folder of the run; the checkpoint is named relative to it.
        clip: the CLIP whose embeddings these are; None trusts what the store says.
        prior: the prior to sample.
        out: folder to write.
        seed: base seed of every random draw.
    """

    batch_type = PriorBatch

    def __init__(self, run: str, clip: ClipSpec | None, prior: PriorSpec, out: str, seed: int = 0) -> None:
        super().__init__()
        self.run = Path(run)
        self.clip = clip
        self.prior = prior
        self.out = Path(out)
        self.seed = seed

    def on_predict_start(self) -> None:
        """Load the prior, and refuse another CLIP's."""
        refuse_other_ranks(self.out, "image_embed-*", self.trainer.world_size)
        self._embeds: list[Tensor] = []
        self._parts = parts_of(self, priors={"prior": self.prior})

    def predict_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Draw one embedding for each caption."""
        generator = streams_for(batch, self.seed)
        self._embeds.append(self._parts.priors["prior"].embed_batch(batch, generator=generator).float().cpu())

    def on_predict_end(self) -> None:
        """Write this rank's embeddings, whole or not at all."""
        path = self.out / f"image_embed-{self.global_rank:05d}.safetensors"
        metadata = {"fingerprint": self._parts.fingerprint}
        write_tensors(path, {"image_embed": torch.cat(self._embeds)}, metadata)


class ImagePrediction(LightningModule):
    """Draws pictures of all held-out captions, packed as shards with these: ``out/predicted-RANK-000000.tar``, ….

    Args:
        run: folder of the run; checkpoints are named relative to it.
        clip: the CLIP that conditions everything.
        decoder: the decoder that draws.
        out: folder to write.
        prior: draws the embeddings that are decoded; None decodes the true ones.
        seed: base seed of every random draw.
    """

    batch_type = EvaluationBatch

    def __init__(
        self, run: str, clip: ClipSpec, decoder: DecoderSpec, out: str, prior: PriorSpec | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.run = Path(run)
        self.clip = clip
        self.decoder = decoder
        self.out = Path(out)
        self.prior = prior or TrueEmbeddingSpec(keep_norm=True)
        self.seed = seed

    def on_predict_start(self) -> None:
        """Load every network, and refuse to mix CLIPs."""
        refuse_other_ranks(self.out, "predicted-*", self.trainer.world_size)
        self._samples: list[Sample] = []
        self._parts = parts_of(self, decoder=self.decoder, priors={"prior": self.prior})

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw one picture for each caption."""
        generator = streams_for(batch, self.seed)
        decoder, prior = self._parts.decoder, self._parts.priors["prior"]
        assert decoder is not None
        z_i = prior.embed_batch(PriorBatch(batch.image_embed, batch.text), generator=generator)
        images = to_bytes(decoder.decode(z_i, batch.text, generator=generator)).permute(0, 2, 3, 1).cpu().numpy()
        for image, caption in zip(images, batch.captions, strict=True):
            self._samples.append(Sample(f"{self.global_rank:05d}_{len(self._samples):07d}", image, [caption], {}))

    def on_predict_end(self) -> None:
        """Write this rank's shards."""
        write_shards(self._samples, self.out, f"predicted-{self.global_rank:05d}")


def refuse_other_ranks(folder: Path, pattern: str, world_size: int) -> None:
    """Refuse a folder that holds what more processes wrote: their files would count as this run's.

    Args:
        folder: folder to write.
        pattern: names of the files, in which the rank is the first number.
        world_size: number of processes.

    Raises:
        InputError: there is a file of a rank that this run does not have.
    """
    for path in sorted(folder.glob(pattern)):
        rank = re.search(r"-(\d{5})", path.name)
        if rank and int(rank[1]) >= world_size:
            raise InputError(
                f"Expected files of {world_size} processes in {folder}. Got {path.name}, which more of them wrote: "
                "remove the old files, or name another folder."
            )
