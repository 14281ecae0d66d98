"""Choose the learning rate and the guidance that a study uses for a prior, from validation embeddings alone.

The rule, for every prior alike: the lowest Fréchet joint distance, the Fréchet distance of unit-norm pairs (z_i, z_t)
(DeVries et al. 2019, arXiv 1907.08175, with the caption's embedding as the condition). It holds a prior both to the
distribution of embeddings and to the captions; ``embed_fd``, of z_i alone, is blind to captions and would turn guidance
down where samples still lie farther from their captions than the truth does. Where samples are surer of captions never
seen than right, as on emoji, even the joint distance would rather have a network that does not read them. So a
setting whose samples find their captions' true embeddings (R@10) less than half as often as another's is out of the
running. First the learning rate, at guidance 1, so that nothing but what was learned counts; then the guidance of that
network. No decoder, judge or oracle has a say, and test data are out of reach: this is a validation, which gets
validation batches.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning import LightningModule
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.task import parts_of
from unclip_pl.files import write_json
from unclip_pl.generation.priors import PriorSpec
from unclip_pl.generation.provenance import provenance
from unclip_pl.generation.run import check_clip
from unclip_pl.metrics.clip_score import retrieval_ranks
from unclip_pl.metrics.frechet import FrechetDistance
from unclip_pl.types import PriorBatch, TextFeatures


class Trial(NamedTuple):
    """One setting on the validation split."""

    joint_fd: float  # Fréchet distance of pairs (z_i, z_t): it decides
    embed_fd: float  # Fréchet distance of z_i alone
    text_cos: float  # mean z_i·z_t
    retrieval_r10: float  # how often a sample has its caption's true embedding among the ten nearest


def best(trials: dict[Any, Trial]) -> Any:
    """Return the setting with the lowest joint distance, of those that read captions at least half as well as any."""
    enough = 0.5 * max(trial.retrieval_r10 for trial in trials.values())
    return min(
        (name for name in trials if trials[name].retrieval_r10 >= enough), key=lambda name: trials[name].joint_fd
    )


class Choice(LightningModule):
    """``unclip validate --config configs/compare/choice.yaml``: chooses a learning rate and a guidance.

    It writes ``NAME.json`` (every trial, and what was chosen) and two configs to lay over others:
    ``NAME-training.yaml`` with the learning rate, ``NAME-sampling.yaml`` with the guidance.

    Args:
        run: folder that CLIP is named relative to.
        clip: the CLIP whose embeddings these are; None takes the data's word for it.
        priors: the prior by its name in the study; it has a setting ``guidance``. Its checkpoint is named relative to
            the folder of each learning rate.
        weights: learning rate → folder of the network that was trained with it.
        guidance: scales to try on the chosen network.
        out: file to write, NAME.json.
        seed: base seed of every random draw; every trial sees the same noise.

    Raises:
        InputError: not one prior, or one without guidance.
    """

    batch_type = PriorBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec | None,
        priors: dict[str, PriorSpec],
        weights: dict[str, str],
        guidance: list[float],
        out: str,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(priors) != 1 or not hasattr(next(iter(priors.values())), "guidance"):
            names = ", ".join(priors) or "none"
            raise InputError(f"Expected one prior, with a setting `guidance`. Got {names}: name one such prior.")
        self.run = Path(run)
        self.clip = clip
        self.name, self.prior = next(iter(priors.items()))
        self.weights = weights
        self.guidance = guidance
        self.out = Path(out)
        self.seed = seed
        self._batches: list[PriorBatch] = []

    def validation_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Keep the batch: every setting embeds all of them."""
        if not self.trainer.sanity_checking:
            self._batches.append(batch)

    def on_validation_epoch_end(self) -> None:
        """Try, choose and write.

        Raises:
            InputError: several processes, or embeddings of another CLIP.
        """
        if self.trainer.world_size > 1:
            raise InputError("Expected one process: a choice takes minutes. Got several: use --trainer.devices 1.")
        parts = parts_of(self)
        fingerprint = parts.fingerprint
        text = TextFeatures.cat([batch.text for batch in self._batches])
        pairs = PriorBatch(torch.cat([batch.image_embed for batch in self._batches]), text)
        rates = {rate: self._try(pairs, folder, 1.0, fingerprint) for rate, folder in self.weights.items()}
        rate = best(rates)
        scales = {scale: self._try(pairs, self.weights[rate], scale, fingerprint) for scale in self.guidance}
        scale = best(scales)
        self._write(rates, rate, scales, scale)
        print(f"{self.name}: learning rate {rate}, guidance {scale:g}: {self.out}")

    def _try(self, pairs: PriorBatch, folder: str, guidance: float, fingerprint: str) -> Trial:
        spec = replace(self.prior, guidance=guidance)  # type: ignore[call-arg] # the constructor has looked
        prior = spec.load(Path(folder), str(self.device))
        check_clip(fingerprint, prior.fingerprint, f"the prior in {folder}")
        width = pairs.image_embed.shape[1]
        joint, alone = FrechetDistance(2 * width).to(self.device), FrechetDistance(width).to(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.cat([prior.embed_batch(batch, generator=generator) for batch in self._batches])
        samples, true, z_t = (
            F.normalize(embeds.float(), dim=-1) for embeds in (drawn, pairs.image_embed, pairs.text.embed)
        )
        for z_i, real in ((true, True), (samples, False)):
            alone.update(z_i, real=real)
            joint.update(torch.cat([z_i, z_t], dim=-1), real=real)
        found = (retrieval_ranks(samples, true) < 10).float().mean().item()
        return Trial(joint.compute().item(), alone.compute().item(), (samples * z_t).sum(-1).mean().item(), found)

    def _write(self, rates: dict[str, Trial], rate: str, scales: dict[float, Trial], scale: float) -> None:
        content = {
            "prior": self.name,
            "captions": sum(len(batch.image_embed) for batch in self._batches),
            "learning_rates": {name: trial._asdict() for name, trial in rates.items()},
            "guidance": {f"{value:g}": trial._asdict() for value, trial in scales.items()},
            "chosen": {"lr": float(rate), "guidance": scale},
            "meta": provenance(self.device),
        }
        # The file that `reproduce` looks for comes last.
        sampling = {"priors": {self.name: {"init_args": {"guidance": scale}}}}
        self._overlay("training", {"optimization": {"lr": float(rate)}})
        self._overlay("sampling", sampling)
        write_json(self.out, content)

    def _overlay(self, kind: str, init_args: dict[str, Any]) -> None:
        path = self.out.with_name(f"{self.out.stem}-{kind}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        head = f"# Chosen on validation data, see {self.out.name}.\n"
        path.write_text(head + yaml.safe_dump({"model": {"init_args": init_args}}))
