"""CLIP from scratch on one's own shards, so that the whole story runs offline."""

import math
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from unclip_pl.clip.encoder import ClipSpec, Preprocess, build_clip
from unclip_pl.tasks.base import Optimization, Task
from unclip_pl.types import ClipBatch

#: CLIP clips its temperature so that logits never exceed 100 times the cosine (Radford et al. 2021, §2.5).
MAX_LOGIT_SCALE = math.log(100)


class ClipTask(Task):
    """Trains an open_clip architecture with open_clip's contrastive loss.

    Args:
        name: architecture (linked from ``data.clip.name``).
        optimization: of both towers and the temperature.
    """

    batch_type = ClipBatch
    net: Any  # open_clip's CLIP or CustomTextCLIP: they share methods and no type

    def __init__(self, name: str, optimization: Optimization | None = None) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.net = build_clip(name)
        self.preprocess = Preprocess(self.net, ClipSpec(name).image_size)
        self.contrastive = self.local_contrastive = ClipLoss()

    def on_fit_start(self) -> None:
        """In training, the batches of all ranks are each other's negatives; in validation their sizes may differ."""
        rank, world_size = self.global_rank, self.trainer.world_size
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def loss(self, batch: ClipBatch, generator: torch.Generator | None = None) -> Tensor:
        """Symmetric cross-entropy over the batch's pairs."""
        image_embed, text_embed, scale = self.net(self.preprocess(batch.image), batch.tokens)
        contrastive = self.contrastive if self.training else self.local_contrastive
        return contrastive(image_embed, text_embed, scale)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clamps the temperature, as CLIP does; with the step, so that no checkpoint falls between the two."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
