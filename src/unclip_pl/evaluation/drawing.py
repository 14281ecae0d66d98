"""Decode embeddings batch by batch, over all ranks, and keep of each picture only what the scores need."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.evaluation.scores import View
from unclip_pl.generation.decoding import Decoder
from unclip_pl.shapes.oracle import Oracle
from unclip_pl.types import TextFeatures

T = TypeVar("T")

#: Between the seeds of two batches: more than there are training seeds, so that no two seeds of a study share one.
STRIDE = 7919


def gather(own: T, world_size: int) -> list[T]:
    """Return every rank's object, in the order of ranks."""
    if world_size == 1:
        return [own]
    everyone: list[T] = [own] * world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "", style="progress.data.speed")


class Painter(AbstractContextManager["Painter"]):
    """Draws, and looks at what it drew. A context: the progress bar stands while it is open.

    Picture i starts from the same noise for every embedding, so two priors differ by their embeddings alone.

    Args:
        decoder: loaded decoder.
        judge: CLIP whose features are kept.
        oracle: reader of shapes, whose readings are kept; None where the data are no shapes.
        batch_size: number of pictures decoded at once.
        seed: base seed of the noise.
        rank: number of this process, which draws every ``world_size``-th batch.
        world_size: number of processes.
    """

    def __init__(
        self,
        decoder: Decoder,
        judge: ClipEncoder,
        oracle: Oracle | None,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.decoder = decoder
        self.judge = judge
        self.oracle = oracle
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        parts = [TextColumn(part) if isinstance(part, str) else part for part in columns]
        self.progress = Progress(*parts, disable=rank > 0)
        self.bar = self.progress.add_task("decoding", total=None)

    def __enter__(self) -> "Painter":
        """Show the bar."""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar on the screen."""
        self.progress.stop()

    def expect(self, images: int) -> None:
        """Tell the bar how many pictures there will be."""
        self.progress.update(self.bar, total=images)

    def paint(self, image_embed: Tensor, text: TextFeatures, *, what: str, keep: Sequence[int] = ()) -> View:
        """Decode embeddings and look at the pictures.

        Args:
            image_embed: (N, d) embeddings, on the CPU.
            text: features of N captions, on the CPU.
            what: description of the pictures, for the bar.
            keep: rows of which the pictures themselves are kept, ascending.
        """
        self.progress.update(self.bar, description=f"decoding: {what}")
        device = self.judge.preprocess.mean.device
        parts: dict[int, View] = {}
        for batch in range(self.rank, -(-len(image_embed) // self.batch_size), self.world_size):
            start = batch * self.batch_size
            rows = slice(start, start + self.batch_size)
            generator = torch.Generator().manual_seed(self.seed + STRIDE * batch)
            words = text.rows(rows).to(device)
            images = self.decoder.decode(image_embed[rows].to(device), words, generator=generator)
            parts[batch] = self.look(images, keep=[row - start for row in keep if 0 <= row - start < len(images)])
            # Other ranks draw the batches in between in the same time.
            everyone = min(len(image_embed), start + self.batch_size * self.world_size) - start
            self.progress.advance(self.bar, everyone)
        joined = {batch: view for own in gather(parts, self.world_size) for batch, view in own.items()}
        return join_views([joined[batch] for batch in sorted(joined)])

    def look(self, images: Tensor, *, keep: Sequence[int] = ()) -> View:
        """Look at pictures (N, 3, H, H) in [-1, 1]; the view lies on the CPU."""
        judge = F.normalize(self.judge.encode_image(images).float(), dim=-1)
        if self.oracle is None:
            read, residual = torch.empty(len(images), 0, dtype=torch.long), torch.full((len(images),), torch.nan)
        else:
            read, _, residual = self.oracle(images)
        return View(judge.cpu(), read.cpu(), residual.cpu(), images[list(keep)].float().cpu())


def join_views(views: list[View]) -> View:
    """Return batches as one."""
    return View(*(torch.cat(parts) for parts in zip(*views, strict=True)))
