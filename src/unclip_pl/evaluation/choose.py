"""Choose the learning rate and the guidance that a study uses for a prior, from embeddings alone, within their noise.

The measure, for every prior alike, is the Fréchet joint distance: the Fréchet distance of unit-norm pairs (z_i, z_t)
(DeVries et al. 2019, arXiv 1907.08175, with the caption's embedding as the condition), without its bias. It weighs z_i
and z_t equally, one to one. It holds a prior both to the distribution of embeddings and to the captions; ``embed_fd``,
of z_i alone, is blind to captions.

One training seed of a setting says little: a perfect prior's joint distance varies by a quarter at 1,024 captions. So a
setting is trained with several seeds, and the rule is that of one standard error (Breiman et al. 1984): of the settings
whose mean lies within one standard error of the best one's, take the likeliest. Of learning rates that is the one with
the lowest validation loss. Of guidance it is the scale nearest to 1, the distribution whose likelihood was trained.
Of a single seed the noise is unknown, so the likeliest of all is taken: the loss varies much less from seed to seed.
First the learning rate, at guidance 1, so that nothing but what was learned counts; then guidance of those networks.
A choice at the end of what was tried is named: the best may lie beyond. No decoder, judge or oracle has a say. Captions
are those of the validation split, or held-out ones that no cell is measured on.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.costs import task_of
from unclip_pl.evaluation.inputs import parts_of
from unclip_pl.evaluation.measures import end_of_grid
from unclip_pl.evaluation.scores import resampler
from unclip_pl.files import write_json, write_text
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.generation.provenance import provenance
from unclip_pl.generation.run import check_clip
from unclip_pl.metrics.clip_score import retrieval_ranks
from unclip_pl.metrics.frechet import frechet_resamples, without_bias
from unclip_pl.types import PriorBatch


class Trial(NamedTuple):
    """One setting of one training seed."""

    joint_fd: float  # Fréchet distance of pairs (z_i, z_t), without its bias: it decides
    embed_fd: float  # Fréchet distance of z_i alone, without its bias
    text_cos: float  # mean z_i·z_t
    retrieval_r10: float  # how often a sample has its caption's true embedding among the ten nearest
    val_loss: float  # the training's loss on the same captions; NaN for a prior that has none


def within_noise(trials: Mapping[str, list[Trial]], unlikely: Mapping[str, float]) -> str:
    """Return the likeliest of the settings that lie within one standard error of the lowest mean joint distance.

    Args:
        trials: setting → its trials, one for each training seed. With one seed alone every setting is within the noise.
        unlikely: setting → how unlikely it makes the data; the lowest is taken, then the lowest distance.

    Raises:
        InputError: no setting has a finite distance with every seed.
    """
    means = {name: _mean([trial.joint_fd for trial in own]) for name, own in trials.items()}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        raise InputError(
            f"Expected a setting whose trainings all stayed finite. Got none of {', '.join(trials)}: try lower "
            "learning rates."
        )
    best = min(means, key=lambda name: means[name])
    distances = [trial.joint_fd for trial in trials[best]]
    most = means[best] + standard_error(distances) if len(distances) > 1 else math.inf
    level = [name for name, mean in means.items() if mean <= most]
    return min(level, key=lambda name: (unlikely[name], means[name]))


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for one value."""
    n = len(values)
    mean = _mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Choice(LightningModule):
    """``unclip validate --config configs/compare/choice.yaml``: chooses a learning rate, and perhaps a guidance.

    It writes ``NAME.json`` (every trial, and what was chosen) and two configs to lay over others:
    ``NAME-training.yaml`` with the learning rate, ``NAME-sampling.yaml`` with the guidance. Where the validation split
    is drawn otherwise than the test split, ``unclip test`` chooses on held-out captions that no cell is measured on.

    Args:
        run: folder that CLIP is named relative to.
        clip: the CLIP whose embeddings these are; None trusts what the store says.
        priors: the prior by its name in the study. Its checkpoint is named relative to the folder of each learning
            rate.
        weights: learning rate → folders of the networks that were trained with it, one for each training seed.
        guidance: scales to try on the chosen networks, where the prior has such a setting.
        out: file to write, NAME.json.
        skip: number of first captions to leave out: those that cells are measured on, under ``unclip test``.
        resamples: number of bootstrap resamples for the bias of a distance.
        seed: base seed of every random draw; every trial sees the same noise.
        rate: setting of ``Optimization`` that the networks differ by: AdamW's learning rate, or Muon's.

    Raises:
        InputError: not one prior, or a learning rate without networks.
    """

    batch_type = PriorBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec | None,
        priors: dict[str, PriorSpec],
        weights: dict[str, list[str]],
        guidance: list[float],
        out: str,
        skip: int = 0,
        resamples: int = 20,
        seed: int = 0,
        rate: Literal["lr", "muon_lr"] = "lr",
    ) -> None:
        super().__init__()
        if len(priors) != 1:
            raise InputError(f"Expected one prior. Got {', '.join(priors) or 'none'}: name one.")
        if not weights or not all(weights.values()):
            raise InputError("Expected networks of every learning rate. Got one without: name a folder at least.")
        self.run = Path(run)
        self.clip = clip
        self.name, self.prior = next(iter(priors.items()))
        self.weights = weights
        self.guidance = guidance if hasattr(self.prior, "guidance") else []
        self.out = Path(out)
        self.skip = skip
        self.resamples = resamples
        self.seed = seed
        self.rate: str = rate
        self._batches: list[PriorBatch] = []

    def validation_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Keep the batch: every setting embeds all of them."""
        if not self.trainer.sanity_checking:
            self._batches.append(batch)

    def test_step(self, batch: PriorBatch, batch_idx: int) -> None:
        """Keep a held-out batch."""
        self._batches.append(batch)

    def on_test_epoch_end(self) -> None:
        """Choose on held-out captions."""
        self.on_validation_epoch_end()

    def on_validation_epoch_end(self) -> None:
        """Try, choose and write.

        Raises:
            InputError: several processes, embeddings of another CLIP, or fewer than two captions.
        """
        if self.trainer.world_size > 1:
            raise InputError("Expected one process: a choice takes minutes. Got several: use --trainer.devices 1.")
        fingerprint = parts_of(self).fingerprint
        batches = _after(self._batches, self.skip)
        rates = {
            rate: [self._try(batches, folder, 1.0, fingerprint) for folder in folders]
            for rate, folders in self.weights.items()
        }
        losses = {name: _mean([trial.val_loss for trial in own]) for name, own in rates.items()}
        none = all(map(math.isnan, losses.values()))  # a prior without a loss; else NaN is a training that diverged
        unlikely = {name: 0.0 if none else math.inf if math.isnan(loss) else loss for name, loss in losses.items()}
        rate = within_noise(rates, unlikely)
        scales = {
            f"{scale:g}": [self._try(batches, folder, scale, fingerprint) for folder in self.weights[rate]]
            for scale in self.guidance
        }
        chosen = {self.rate: rate}
        if scales:
            chosen["guidance"] = within_noise(scales, {name: abs(float(name) - 1) for name in scales})
        self._write(batches, rates, scales, chosen)
        tried = {self.rate: ("learning rate", rates), "guidance": ("guidance", scales)}
        for name, taken in chosen.items():
            if end := end_of_grid(list(tried[name][1]), taken):
                print(f"{self.name}: {tried[name][0]} {taken} is the {end} that was tried: try one beyond it.")
        print(f"{self.name}: {', '.join(f'{tried[name][0]} {taken}' for name, taken in chosen.items())}: {self.out}")

    def _try(self, batches: list[PriorBatch], folder: str, guidance: float, fingerprint: str) -> Trial:
        settings: dict[str, Any] = {"guidance": guidance} if self.guidance else {}
        prior = replace(self.prior, **settings).load(Path(folder), str(self.device))
        check_clip(fingerprint, prior.fingerprint, f"the prior in {folder}")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.cat([prior.embed_batch(batch, generator=generator) for batch in batches])
        true, z_t = torch.cat([b.image_embed for b in batches]), torch.cat([b.text.embed for b in batches])
        samples, true, z_t = (F.normalize(embeds.float(), dim=-1) for embeds in (drawn, true, z_t))
        joint = self._distance(torch.cat([true, z_t], dim=-1), torch.cat([samples, z_t], dim=-1))
        found = (retrieval_ranks(samples, true) < 10).float().mean().item()
        text_cos = (samples * z_t).sum(-1).mean().item()
        return Trial(joint, self._distance(true, samples), text_cos, found, validation_loss(prior, batches))

    def _distance(self, real: Tensor, fake: Tensor) -> float:
        distances = frechet_resamples(real, {"": fake}, self.resamples, generator=resampler())[""]
        return without_bias(distances)[0].item()

    def _write(
        self,
        batches: list[PriorBatch],
        rates: dict[str, list[Trial]],
        scales: dict[str, list[Trial]],
        chosen: dict[str, str],
    ) -> None:
        content = {
            "prior": self.name,
            "captions": sum(len(batch.image_embed) for batch in batches),
            "learning_rates": {name: summed_up(own) for name, own in rates.items()},
            "guidance": {name: summed_up(own) for name, own in scales.items()},
            "chosen": {name: float(taken) for name, taken in chosen.items()},
            "meta": provenance(self.device),
        }
        # The file that `reproduce` looks for comes last.
        guidance = {name: float(taken) for name, taken in chosen.items() if name == "guidance"}
        sampling = {"priors": {self.name: {"init_args": guidance}}} if guidance else {}
        self._overlay("training", {"optimization": {self.rate: float(chosen[self.rate])}})
        self._overlay("sampling", sampling)
        write_json(self.out, content)

    def _overlay(self, kind: str, init_args: dict[str, Any]) -> None:
        path = self.out.with_name(f"{self.out.stem}-{kind}.yaml")
        head = f"# Chosen on validation data, see {self.out.name}.\n"
        write_text(path, head + yaml.safe_dump({"model": {"init_args": init_args}}))


def summed_up(trials: list[Trial]) -> dict[str, Any]:
    """Return the means over training seeds, the joint distance of each, and its standard error."""
    joint = [trial.joint_fd for trial in trials]
    means = {name: _mean([getattr(trial, name) for trial in trials]) for name in Trial._fields}
    known = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
    return known | {"joint_fd_error": standard_error(joint), "joint_fd_of_seeds": joint}


@torch.no_grad()
def validation_loss(prior: Prior, batches: list[PriorBatch]) -> float:
    """Return the training's loss with every caption kept and the same noise for every prior; NaN without a Task."""
    if prior.part is None:
        return math.nan
    task = task_of(prior.part)
    task.text_drop = 0.0
    losses = [
        len(batch.image_embed) * task.loss(batch, torch.Generator().manual_seed(i)).item()
        for i, batch in enumerate(batches)
    ]
    return sum(losses) / sum(len(batch.image_embed) for batch in batches)


def _after(batches: list[PriorBatch], skip: int) -> list[PriorBatch]:
    """Return batches without their first captions.

    Raises:
        InputError: fewer than two captions are left.
    """
    left = []
    for batch in batches:
        rows = slice(min(skip, len(batch.image_embed)), None)
        skip -= rows.start
        left.append(PriorBatch(batch.image_embed[rows], batch.text.rows(rows)))
    left = [batch for batch in left if len(batch.image_embed)]
    if sum(len(batch.image_embed) for batch in left) < 2:
        raise InputError("Expected captions behind the first `skip`. Got fewer than 2: leave out fewer.")
    return left
