"""What every part shares: its embedding space, the settings of its training, and the checks of a checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unclip_pl.diffusion.process import GaussianDiffusion
from unclip_pl.errors import InputError
from unclip_pl.files import require_finite
from unclip_pl.nn.space import EmbeddingSpace, Scaling
from unclip_pl.types import TextFeatures


@dataclass
class Optimization:
    """The optimizer: AdamW (the paper's "corrected" weight decay), Muon beside it, warm-up, and what follows it.

    Args:
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of ``Muon``, which then trains the matrices between a network's first and last
            layers; 0 leaves them to AdamW. About 0.01 suits it.
        weight_decay: decay of matrices; biases, gains and embeddings of rank < 2 are left alone.
        betas: decay rates of Adam's moments.
        eps: offset of Adam's denominator.
        warmup_steps: optimizer steps of linear warm-up. The paper gives none.
        decay: learning rate after warm-up: constant as in the paper, or half a cosine to zero at the last step.
    """

    lr: float = 1.2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    muon_lr: float = 0.0

    def factor(self, step: int, total: float) -> float:
        """Return the learning rate at ``step`` as a share of the peak."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant" or not math.isfinite(total):
            return warm
        rest = max(1.0, total - self.warmup_steps)
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / rest))
        return warm * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TrainingRecord:
    """The cost of a part's training.

    Args:
        steps: number of optimizer steps.
        samples: number of samples seen, over all ranks and accumulated batches; a caption counts once, not per draw.
        seconds: wall clock inside training steps.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0


class Part(nn.Module):
    """A network and all that drawing with it takes. Its Task adds the loss, the batch and the optimizer.

    Args:
        optimization: settings of the optimizer, for the Task that trains it.
    """

    #: Cost of the training of a loaded checkpoint; None on a part that was not loaded.
    record: TrainingRecord | None = None
    #: Checkpoint that it was loaded from, if it was.
    checkpoint: Path | None = None

    net: nn.Module
    #: Forward process of a part that denoises.
    diffusion: GaussianDiffusion | None = None

    def __init__(self, optimization: Optimization | None = None) -> None:
        super().__init__()
        self.optimization = optimization or Optimization()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights mean something else here; Lightning calls it, too.

        Raises:
            InputError: the weights were trained on another schedule or number of steps, or to predict something else.
        """
        saved, own = checkpoint.get("diffusion"), str(self.diffusion)
        older = own.rpartition(", ")[0]  # files before 2026-11-29 do not tell the number of steps
        if saved not in (None, own, older):
            raise InputError(
                f"The checkpoint was trained as {saved}, but model.diffusion says {own}: give the config of its "
                "training, or train from the start."
            )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights.

        Raises:
            InputError: they are another network's, or not finite.
        """
        try:
            loaded = super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            raise InputError(
                f"The checkpoint is of another network. Give one that fits, or change model.net: "
                f"{' '.join(str(error).split()):.400}"
            ) from error
        require_finite(dict(self.named_parameters()), "the checkpoint")
        return loaded


def check_drop(name: str, share: float) -> float:
    """Return the share of a condition that training drops.

    Raises:
        InputError: it is no share.
    """
    if not 0 <= share <= 1:
        raise InputError(f"Expected 0 <= {name} <= 1. Got {share}: give a share, such as 0.1 for 10 %.")
    return share


#: Condition that stands for "no caption": CLIP's features of the empty one, or a vector learned in z_t's place.
NullText = Literal["empty", "learned"]


class EmbeddingPart(Part):
    """A part that lives in one CLIP's embedding space.

    Args:
        statistics: file of the embedding store (linked from the data); empty when a checkpoint fills the space.
        scaling: how z_i is scaled for the network, see :class:`~unclip_pl.nn.space.EmbeddingSpace`.
        text_drop: share of captions replaced by the empty one, for classifier-free guidance.
        optimization: settings of the optimizer.
        learned_null: width of the vector that is learned in place of the empty caption's z_t; 0 learns none, and takes
            the empty caption's features from the data. None is for a part that drops no caption.

    Raises:
        InputError: none is learned, and the data have no features of the empty caption.
    """

    def __init__(
        self,
        statistics: str,
        scaling: Scaling,
        text_drop: float,
        optimization: Optimization | None = None,
        *,
        learned_null: int | None = 0,
    ) -> None:
        super().__init__(optimization)
        self.space = EmbeddingSpace(statistics, scaling)
        self.text_drop = check_drop("text_drop", text_drop)
        self.learned_null = nn.Parameter(torch.zeros(learned_null)) if learned_null else None
        if statistics and learned_null == 0 and not self.space.null_embed.numel():
            raise InputError(
                f"{statistics} has no features of the empty caption: set model.init_args.null_text to learned."
            )

    @property
    def null_text(self) -> TextFeatures:
        """Features of no caption, batch size 1, z_t scaled."""
        if self.learned_null is None:
            return self.space.scale_text(self.space.null_text)
        nothing = self.learned_null.new_zeros(1, 0)
        return TextFeatures(nothing.long(), nothing[..., None], nothing.bool(), self.learned_null[None])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with weights that were trained in another CLIP's space."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["state_dict"].get("space.fingerprint_bytes")
        if saved is None:
            raise InputError(
                f"Expected a checkpoint of a {type(self).__name__}. Got one without embedding space: give another file."
            )
        saved = bytes(saved.tolist()).decode()
        if self.space.fingerprint not in ("", saved):
            raise InputError(
                f"The checkpoint was trained on embeddings of CLIP {saved!r}, but the data are of "
                f"{self.space.fingerprint!r}: give the data of its CLIP, or train from the start."
            )


def count_parameters(module: nn.Module) -> int:
    """Return how many trainable numbers a module has."""
    return sum(p.numel() for p in module.parameters())
