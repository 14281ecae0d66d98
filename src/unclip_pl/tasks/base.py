"""What every Task shares: one step, one name in the logger, one optimizer, and the record of its training."""

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from unclip_pl.diffusion.process import noise_like
from unclip_pl.errors import InputError
from unclip_pl.generation.priors import TrainedPriorSpec
from unclip_pl.nn.kernels import fast_bfloat16
from unclip_pl.nn.text import mix_text
from unclip_pl.parts.base import EmbeddingPart, Optimization, Part
from unclip_pl.types import TextFeatures

#: Coefficients of the quintic that one Newton-Schulz iteration applies to singular values, and how often it is applied.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 3


class Muon(torch.optim.AdamW):
    """Muon for matrices and AdamW for everything else, as one optimizer (Jordan et al. 2024, kellerjordan.github.io).

    A matrix steps by its momentum with all singular values brought near 1, times max(1, rows / columns)^½. A
    convolution counts as a matrix (out, in · height · width). Where matrices are sharded (FSDP2), each is gathered on
    one process, orthogonalised there and scattered again.

    Args:
        groups: groups of parameters; those of the groups with ``muon: true`` are matrices.
        momentum: decay rate of the matrices' momentum, which is Nesterov's.
        adamw: settings of AdamW, defaults of every group.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__([{"muon": False, **group} for group in groups], **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step once. Parameters without a gradient stay as they are.

        Args:
            closure: computes gradients and returns the loss.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        moved = [p for p in group["params"] if p.grad is not None]
        if not moved:
            return
        for p in moved:
            if not self.state[p]:  # AdamW asks every state for its step when it is loaded
                self.state[p] |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(p)}
        gradients, momenta = [p.grad for p in moved], [self.state[p]["momentum_buffer"] for p in moved]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        directions = torch._foreach_lerp(gradients, momenta, self.momentum)
        steps = orthogonalised([direction.flatten(1) for direction in directions])
        torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
        for p, step in zip(moved, steps, strict=True):
            p.add_(step.view_as(p), alpha=-group["lr"] * max(1.0, step.shape[0] / step.shape[1]) ** 0.5)


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return U f(S) Vᵀ for every matrix U S Vᵀ, where f brings singular values near 1.

    S is divided by its norm first. f is the quintic of Newton and Schulz, three times. As a polynomial in X Xᵀ it is
    worked out on small square matrices, all of one size at once, and meets X once: a third of the plain iteration's
    multiplications for a convolution. In bfloat16, where the device multiplies faster in it.

    Args:
        matrices: matrices of any shapes, at least one, all on one device.
    """
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        shapes[matrix.shape].append(i)
    stacks = [_spread(torch.stack([matrices[i] for i in chosen]), 0) for chosen in shapes.values()]
    fast = matrices[0].dtype == torch.float32 and fast_bfloat16(matrices[0].device.type)
    wide, sides = [], defaultdict(list)
    for i, (shape, stack) in enumerate(zip(shapes, map(_local, stacks), strict=True)):
        x = stack / stack.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
        x = x.mT if shape[0] > shape[1] else x
        wide.append((x.bfloat16() if fast else x).contiguous())
        sides[min(shape)].append(i)
    for chosen in sides.values():
        factors = _newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in chosen]))
        for i, factor in zip(chosen, factors.split([len(wide[i]) for i in chosen]), strict=True):
            wide[i] = factor @ wide[i]
    results: dict[int, Tensor] = {}
    for (shape, chosen), stack, x in zip(shapes.items(), stacks, wide, strict=True):
        _local(stack).copy_(x.mT if shape[0] > shape[1] else x)
        results |= zip(chosen, _spread(stack, 1).unbind(), strict=True)
    return [results[i] for i in range(len(matrices))]


def _newton_schulz(gram: Tensor) -> Tensor:
    """Return the matrices that X Xᵀ, (n, k, k), turns into all iterations' factor of X."""
    a, b, c = QUINTIC
    product = None
    for i in range(ITERATIONS):
        factor = (gram @ gram).mul_(c).add_(gram * b)  # not `alpha=b`, which rounds by place in a batch
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < ITERATIONS:
            gram = factor @ gram @ factor  # they commute
    assert product is not None
    return product


def _spread(stack: Any, dim: int) -> Any:
    """Spread (n, rows, columns) over the processes by matrix (0) or by row (1), where it is sharded at all."""
    if not hasattr(stack, "redistribute"):
        return stack
    from torch.distributed.tensor import Shard  # takes a while

    return stack.redistribute(placements=[Shard(dim)])


def _local(stack: Any) -> Tensor:
    """Return what this process has of it."""
    return stack.to_local() if hasattr(stack, "to_local") else stack


class Task(Part, LightningModule):
    """A part with its loss, its batch and its optimizer: what Lightning trains. Sampling has no settings here.

    Args:
        optimization: settings of the optimizer.
    """

    #: Type of the batches. The DataModule asks for it, so data and tasks meet in types alone.
    batch_type: ClassVar[type]

    _rank, _world_size = 0, 1  # in a training

    #: First and last layers, which Muon leaves to AdamW: their rows or columns are pixels, values or codes.
    edges: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimization: Optimization | None = None) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.train_samples, self.train_seconds = 0, 0.0
        self._started = 0.0
        self._configured: list[dict[str, Any]] = []
        self._fits = False

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean loss of a batch."""

    def share(self, draw: Callable[[int], Tensor], n: int) -> Tensor:
        """Return this rank's n rows of a draw for the whole global batch.

        All ranks draw the same numbers from the same seed. So N processes train as one does with all their batches.
        Every random draw of a loss has to come through here.

        Args:
            draw: draws for the given number of rows.
            n: number of rows of the batch, the same on every rank.
        """
        if not self.training or self._world_size == 1:
            return draw(n)
        first = self._rank * n
        return draw(n * self._world_size)[first : first + n]

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw standard normal noise for (B, …), this rank's share of it (:meth:`share`)."""
        return self.share(lambda n: noise_like(x[:1].expand(n, *x.shape[1:]), generator=generator), len(x))

    def setup(self, stage: str) -> None:
        """Learn which of how many processes this is, and whether it trains."""
        self._rank, self._world_size = self.trainer.global_rank, self.trainer.world_size
        self._fits = stage == "fit"

    def _step(self, batch: Any, stage: str, generator: torch.Generator | None = None) -> Tensor:
        loss = self.loss(batch, generator)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(batch[0]), sync_dist=stage != "train")
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss with the same noise at every call, so that its curve is the network's and not the draw's."""
        self._step(batch, "val", self._fixed_noise(batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss on the test split, with the same noise at every call."""
        self._step(batch, "test", self._fixed_noise(batch_idx))

    def gathered(self, rows: Tensor) -> Tensor:
        """Return such rows (B, …) of all processes, (processes · B, …)."""
        every: Any = self.all_gather(rows)
        return every.flatten(0, 1)

    def _fixed_noise(self, batch_idx: int) -> torch.Generator:
        """Return the stream of a batch; each process has others, which together try more times and noises."""
        return torch.Generator().manual_seed(batch_idx * self._world_size + self._rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the samples of all ranks and start the clock: validation and waiting for data do not count."""
        self.train_samples += len(batch[0]) * self._world_size
        self._started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        self.train_seconds += time.perf_counter() - self._started

    def matrices(self) -> list[nn.Parameter]:
        """Return what :class:`Muon` may train: weights of linear layers and convolutions that are no edges."""
        found: list[Any] = []
        for name, module in self.named_modules():
            if any(f"{name}.".startswith(f"{edge}.") for edge in self.edges):
                continue
            if isinstance(module, nn.Linear | nn.Conv2d):
                found.append(module.weight)
            elif isinstance(module, nn.MultiheadAttention):
                found.append(module.in_proj_weight)
        return [p for p in dict.fromkeys(found) if p is not None and p.requires_grad]

    def optimizer(self, *, fused: bool = True) -> torch.optim.Optimizer:
        """Return AdamW with decay on matrices, or Muon beside it.

        Args:
            fused: compute a step as one kernel. Under float16's loss scale it would hide the gradients from clipping.
        """
        spec = self.optimization
        matrices = self.matrices() if spec.muon_lr else []
        numbers = {id(p) for p in matrices}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in numbers]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
        if spec.muon_lr:
            kind = Muon
            groups += [{"params": matrices, "weight_decay": spec.weight_decay, "lr": spec.muon_lr, "muon": True}]
        return kind(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer, and the schedule of its learning rate, which advances at every step."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer, total = self.optimizer(fused=not scaled), self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optimization.factor(step, total))
        fresh = [dict(group) for group in optimizer.param_groups]
        self._configured = [{key: group[key] for key in group.keys() - {"params", "lr"}} for group in fresh]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient as Lightning does, and with a fused optimizer in bfloat16 too.

        Lightning refuses that for every mixed precision, since float16's loss scale would be clipped along.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            super(MixedPrecision, plugin).clip_gradients(optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the cost of training beside the weights."""
        checkpoint |= {"train_samples": self.train_samples, "train_seconds": self.train_seconds}
        if self.diffusion is not None:
            checkpoint["diffusion"] = str(self.diffusion)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the cost of training back.

        Raises:
            InputError: the weights mean something else here, or a fit would go on with another optimizer.
        """
        super().on_load_checkpoint(checkpoint)
        self.train_samples = checkpoint.get("train_samples", 0)
        self.train_seconds = checkpoint.get("train_seconds", 0.0)
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        theirs, ours = any(group.get("muon") for group in groups), bool(self.optimization.muon_lr)
        if self._fits and groups and theirs != ours:
            names = {True: "Muon", False: "AdamW alone"}
            raise InputError(
                f"The checkpoint was trained with {names[theirs]}, and this fit asks for {names[ours]}: change "
                "model.optimization.muon_lr, or train from the start."
            )

    def on_train_start(self) -> None:
        """Restore the config's learning rate, decay and betas, which a resumed checkpoint has overwritten."""
        scheduler = self.lr_schedulers()
        if not self._configured or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # a subclass brings its own
        scheduler.base_lrs = [group["initial_lr"] for group in self._configured]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, configured, factor in zip(scheduler.optimizer.param_groups, self._configured, factors, strict=True):
            group.update(configured, lr=configured["initial_lr"] * factor)


class EmbeddingTask(EmbeddingPart, Task):
    """A Task that lives in one CLIP's embedding space."""

    #: Spec of the prior that it trains, by which validation draws; None where it trains none.
    spec: ClassVar[type[TrainedPriorSpec] | None] = None

    def drop_text(self, text: TextFeatures, generator: torch.Generator | None) -> TextFeatures:
        """Scale z_t, and replace a share of the captions, states and z_t together, by the null caption."""
        device, p = text.embed.device, 1 - self.text_drop
        keep = self.share(lambda n: bernoulli(n, p, device, generator), len(text.embed))
        return mix_text(self.space.scale_text(text), self.null_text, keep)


def bernoulli(n: int, p: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw n booleans, (n,), True with probability p; see :func:`uniform`."""
    return uniform(n, device, generator) < p


def uniform(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw n numbers from 0 to 1, (n,), on the generator's device, and move them."""
    source = device if generator is None else generator.device
    return torch.rand(n, generator=generator, device=source).to(device)
