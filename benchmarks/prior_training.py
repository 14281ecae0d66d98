"""Training of the diffusion prior, by the clock: against dalle2-pytorch's DiffusionPriorTrainer, and against our own
network with one draw of noise a caption, all captions padded to 77 tokens.

The data are made up, so that what can be learned of them is known and nothing has to be trained before. A picture has
16 attributes of 8 values; a caption states 6 to 14 of them in any order, 12 tokens on average with its ends. z_i is a
fixed nonlinear function of all attributes, so a caption leaves some of it open. Every learner sees the same embeddings,
scaled alike, in batches of 128, has 192 × 4 and the tiny config's learning rate, warm-up, decay and clipping, without
a decay of the learning rate: so a run may end anywhere. Each is measured by the same loss: x0 at the same times and
noises, of the averaged weights (of dalle2-pytorch the better of averaged and plain). Measuring does not count.
"""

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from measure import Row, clock, show
from parts import stored_space
from peers import dalle2_prior
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from unclip_pl.commands.reproduce import precision
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.parts import Optimization, count_parameters
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.training.callbacks import WarmupEMA
from unclip_pl.types import PriorBatch, TextFeatures

D, CONTEXT, WIDTH, LAYERS, HEADS, BATCH = 192, 77, 192, 4, 6, 128
ATTRIBUTES, VALUES, DRAWS = 16, 8, 4
RATE = Optimization(lr=1e-3, weight_decay=6e-2, betas=(0.9, 0.96), eps=1e-6, warmup_steps=50)
CLIP, DECAY = 1.0, 0.995
STEPS, EVERY = 100, 25
PATIENCE = 4.5  # times as long as ours, and we stop waiting for the peer


class World:
    """Pictures, captions and their embeddings."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.words = torch.randn(ATTRIBUTES * VALUES + 2, D, generator=g)  # the last two begin and end a caption
        self.image = torch.randn(ATTRIBUTES, VALUES, D, generator=g)
        self.mix = torch.randn(D, D, generator=g) / D**0.5

    def batch(self, seed: int, n: int = BATCH) -> PriorBatch:
        """Text padded to the longest of the batch, as the embedding store gives it."""
        g = torch.Generator().manual_seed(seed)
        values = torch.randint(VALUES, (n, ATTRIBUTES), generator=g)
        hidden = self.image[torch.arange(ATTRIBUTES), values].sum(1) / ATTRIBUTES**0.5
        z_i = F.normalize(hidden + (hidden @ self.mix).tanh(), dim=-1)
        stated = torch.randint(6, 15, (n, 1), generator=g)
        order = torch.rand(n, ATTRIBUTES, generator=g).argsort(1)
        tokens = order * VALUES + values.gather(1, order)
        length = stated + 2
        position = torch.arange(int(length.max()))
        begin, end = ATTRIBUTES * VALUES, ATTRIBUTES * VALUES + 1
        tokens = F.pad(F.pad(tokens, (1, 0), value=begin), (0, 1))[:, : len(position)]
        tokens = torch.where(position == length - 1, end, tokens)
        mask = position < length
        states = self.words[tokens] * mask[..., None]
        z_t = F.normalize(states.sum(1) @ self.mix, dim=-1)
        return PriorBatch(z_i, TextFeatures(tokens, states, mask, z_t))


class Stream(IterableDataset[PriorBatch]):
    """Batches of training, without end; ``pad``: to the whole context."""

    def __init__(self, world: World, pad: bool) -> None:
        self.world = world
        self.pad = pad

    def __iter__(self) -> Iterator[PriorBatch]:
        for seed in itertools.count(1):
            batch = self.world.batch(seed)
            yield batch._replace(text=batch.text.pad(CONTEXT)) if self.pad else batch


class Probe:
    """The loss that every learner is measured by: E ‖f(z_i^(t), t, y) − z_i‖² / d over unseen captions and all t."""

    def __init__(self, world: World, task: DiffusionPriorTask) -> None:
        batch = world.batch(0, 1000)
        g = torch.Generator().manual_seed(0)
        t = torch.arange(1, 1001) / 1000
        self.x0 = task.space.scale(batch.image_embed)
        self.text = task.space.scale_text(batch.text)
        self.x_t = task.diffusion.add_noise(self.x0, t, torch.randn(self.x0.shape, generator=g))
        self.index = task.diffusion.index(t).round()

    @torch.no_grad()
    def __call__(self, predict: Callable[[Tensor, Tensor, TextFeatures], Tensor]) -> float:
        return F.mse_loss(predict(self.x_t, self.index, self.text).float(), self.x0).item()


class Point(NamedTuple):
    """Where a training stands."""

    seconds: float
    targets: int  # (caption, t, noise) triples that it has seen
    loss: float


class Curve(Callback):
    """Measures while Lightning trains, and stops it after so many seconds."""

    def __init__(self, probe: Probe, seconds: float = math.inf) -> None:
        self.probe = probe
        self.limit = seconds
        self.seconds = 0.0
        self.points: list[Point] = []

    def on_train_start(self, *_: Any) -> None:
        self.resumed = clock()

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        if not trainer.sanity_checking:
            self.seconds += clock() - self.resumed

    def on_validation_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        """The averaged weights are in place here."""

        def predict(x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
            return task.net(x_t[:, None], index[:, None], task.net.encode_prefix(text))[:, 0]

        loss = self.probe(predict)
        self.points.append(Point(self.seconds, trainer.global_step * BATCH * task.draws_per_caption, loss))

    def on_validation_end(self, trainer: Trainer, task: Any) -> None:
        self.resumed = clock()
        trainer.should_stop = self.seconds >= self.limit


def new_task(draws: int) -> DiffusionPriorTask:
    torch.manual_seed(1)
    net = PriorTransformer(D, D, CONTEXT, WIDTH, LAYERS, HEADS)
    return DiffusionPriorTask(net, stored_space(D, D), draws_per_caption=draws, optimization=RATE)


def ours(world: World, probe: Probe, draws: int, *, pad: bool, seconds: float = math.inf) -> list[Point]:
    """Train like ``unclip fit``, until a number of steps or of seconds."""
    curve = Curve(probe, seconds)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision(),
        max_steps=STEPS if seconds == math.inf else -1,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=CLIP,
        callbacks=[curve, WarmupEMA(DECAY)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    unseen = DataLoader([world.batch(0, 8)], batch_size=None)
    trainer.fit(new_task(draws), DataLoader(Stream(world, pad), batch_size=None), unseen)
    return curve.points


class Peer:
    """dalle2-pytorch's trainer with our settings; its own where we have none."""

    def __init__(self, task: DiffusionPriorTask) -> None:
        from dalle2_pytorch import DiffusionPriorTrainer

        self.space = task.space
        self.trainer = DiffusionPriorTrainer(
            dalle2_prior(count_parameters(task.net), D, LAYERS, HEADS, CONTEXT),
            lr=RATE.lr,
            wd=RATE.weight_decay,
            eps=RATE.eps,
            betas=RATE.betas,
            warmup_steps=RATE.warmup_steps,
            max_grad_norm=CLIP,
            ema_beta=DECAY,
            accelerator_cpu=True,
            accelerator_mixed_precision="bf16" if precision() == "bf16-mixed" else "no",
        )

    def step(self, batch: PriorBatch) -> None:
        text = self.space.scale_text(batch.text)
        z_i = self.space.scale(batch.image_embed)
        self.trainer(text_embed=text.embed, text_encodings=text.states, image_embed=z_i)
        self.trainer.update()

    def loss(self, probe: Probe) -> float:
        """Return the lower loss of its weights and of their average."""
        nets = (self.trainer.diffusion_prior.net, self.trainer.ema_diffusion_prior.ema_model.net)

        def predict(net: nn.Module) -> Callable[[Tensor, Tensor, TextFeatures], Tensor]:
            return lambda x_t, index, text: net(x_t, index.long(), text_embed=text.embed, text_encodings=text.states)

        return min(probe(predict(net)) for net in nets)


def theirs(world: World, probe: Probe, target: float, seconds: float) -> list[Point]:
    """Until the loss ``target`` or so many seconds."""
    peer = Peer(new_task(1))
    points: list[Point] = []
    took = 0.0
    for step, batch in enumerate(Stream(world, pad=False), 1):
        start = clock()
        peer.step(batch)
        took += clock() - start
        if step % EVERY == 0:
            points.append(Point(took, step * BATCH, peer.loss(probe)))
            if points[-1].loss <= target or took >= seconds:
                break
    return points


def loss_at(points: list[Point], value: float, key: Callable[[Point], float]) -> float:
    """Where ``key`` reaches ``value``, on straight lines between the points."""
    return float(np.interp(value, [key(point) for point in points], [point.loss for point in points]))


def tokens(world: World, draws: int, *, pad: bool) -> float:
    """That the transformer runs over for one target, padding and all."""
    lengths = [batch.text.mask.shape[1] for batch in itertools.islice(Stream(world, pad), 20)]
    return (statistics.fmean(lengths) + 1 + 3 * draws) / draws


def rows() -> list[Row]:
    """Seconds to the same loss, tokens for a target, losses after the same time and after as many targets."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    world = World()
    probe = Probe(world, new_task(1))
    many = ours(world, probe, DRAWS, pad=False)
    end = many[-1]
    one = ours(world, probe, 1, pad=True, seconds=end.seconds)
    peer = theirs(world, probe, end.loss, PATIENCE * end.seconds)[-1]

    note = f"loss {end.loss:.4f} on unseen captions, {STEPS} steps against {peer.targets // BATCH}, both {precision()}"
    if peer.loss > end.loss:
        note += f"; theirs, stopped at {peer.loss:.4f}, would take longer still"
    few, full = tokens(world, DRAWS, pad=False), tokens(world, 1, pad=True)
    same_time = loss_at(one, end.seconds, lambda point: point.seconds)
    seen = one[-1].targets
    gap = loss_at(many, seen, lambda point: point.targets) / one[-1].loss - 1
    against = f"{DRAWS} draws, captions cut, against one draw, captions padded to {CONTEXT}"
    return [
        Row(
            "prior training to the same loss, 192 × 4, against dalle2-pytorch",
            end.seconds,
            peer.seconds,
            "s",
            peer.seconds / end.seconds,
            4,
            note,
        ),
        Row(
            "prior training, tokens for a target: captions of 12",
            few,
            full,
            "tokens",
            full / few,
            8,
            f"{against}; padding to the longest of a batch counted",
        ),
        Row(
            "prior training, loss after the same time",
            end.loss,
            same_time,
            "MSE",
            same_time / end.loss,
            1,
            f"{against}; {end.seconds:.0f} s each. After {seen:,} targets each, ours is {gap:+.1%}",
        ),
    ]


if __name__ == "__main__":
    show(rows)
