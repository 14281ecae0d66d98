"""CLIP from scratch on one's own shards, so that the whole story runs offline."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from open_clip.loss import ClipLoss
from torch import Tensor

from unclip_pl.clip.encoder import ClipSpec, Preprocess, architecture, build_clip
from unclip_pl.errors import InputError
from unclip_pl.nn.kernels import training_attention
from unclip_pl.parts.base import Optimization
from unclip_pl.tasks.base import Task
from unclip_pl.tasks.sam import check_strategy, perturbed
from unclip_pl.types import ClipBatch

#: CLIP clips its temperature so that logits never exceed 100 times the cosine (Radford et al. 2021, §2.5).
MAX_LOGIT_SCALE = math.log(100)


class ClipTask(Task):
    """Trains an open_clip architecture with open_clip's contrastive loss.

    Args:
        name: open_clip architecture (linked from ``data.clip.name``).
        sam_rho: radius of sharpness-aware minimisation, at twice the cost of a step; the paper (0.1) finds that it
            lowers the rank of the embeddings. 0 is off.
        optimization: settings of the optimizer, for both towers and the temperature.

    Raises:
        InputError: ``sam_rho`` is negative, or the architecture is trained with another loss.
    """

    batch_type = ClipBatch
    edges = ("net.visual.conv1", "net.visual.attnpool.c_proj")
    net: Any  # open_clip's CLIP or CustomTextCLIP: they share methods and no type
    _nearby = False  # whether the weights are the perturbed ones

    def __init__(self, name: str, sam_rho: float = 0.0, optimization: Optimization | None = None) -> None:
        if not sam_rho >= 0:
            raise InputError(f"Expected sam_rho >= 0. Got {sam_rho}: give 0 to turn it off, or 0.1 as in the paper.")
        config = architecture(name)
        if "multimodal_cfg" in config or config.get("init_logit_bias") is not None:
            raise InputError(
                f"Expected a CLIP with the softmax loss. Got {name!r}, which is trained with CoCa's or SigLIP's: "
                "train it with open_clip, and name its weights as clip.pretrained."
            )
        super().__init__(optimization)
        self.sam_rho = sam_rho
        self.net = build_clip(name)
        self.preprocess = Preprocess(self.net, ClipSpec(name).image_size)
        self.contrastive = self.local_contrastive = ClipLoss()

    def on_fit_start(self) -> None:
        """Make the batches of all ranks each other's negatives in training; in validation their sizes may differ."""
        if self.sam_rho > 0:
            check_strategy(self.trainer.strategy, self.trainer.accumulate_grad_batches)
        rank, world_size = self.global_rank, self.trainer.world_size
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def loss(self, batch: ClipBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return the symmetric cross-entropy over the batch's pairs."""
        # In this format a tiny ResNet's step takes 0.35 s of a core instead of 0.42.
        image = self.preprocess(batch.image).contiguous(memory_format=torch.channels_last)
        with training_attention(image.device):
            image_embed, text_embed, scale = self.net(image, batch.tokens)
        contrastive = self.contrastive if self.training else self.local_contrastive
        return contrastive(image_embed, text_embed, scale)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; only the loss at the weights themselves is logged."""
        return self.loss(batch) if self._nearby else super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step and clamp the temperature, as CLIP does; together, so that no checkpoint falls between the two."""
        closure = partial(self._worst_nearby, optimizer_closure) if self.sam_rho > 0 else optimizer_closure
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def _worst_nearby(self, closure: Callable[[], Any]) -> Any:
        """Run Lightning's closure at w, then at w + e(w), whose gradient the optimizer gets.

        The first gradient stays unreduced: every rank moves by its own (Appendix C of the paper).
        """
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            loss = closure()
        with perturbed(self, self.sam_rho):
            self._nearby = True
            try:
                closure()
            finally:
                self._nearby = False
        return loss
