"""``unclip precompute``: frozen CLIP features of every shard of a source, over any number of processes."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.data.precompute import Part, embed_share, launched
from unclip_pl.data.precompute import finish as finish_store
from unclip_pl.errors import InputError


def precompute(
    source: str,
    store: str,
    clip: ClipSpec,
    *,
    caption_key: str = "",
    batch_size: PositiveInt = 256,
    max_bad_fraction: ClosedUnitInterval = 0.01,
    accelerator: str = "auto",
    devices: PositiveInt = 1,
    num_nodes: PositiveInt = 1,
    verify: bool = False,
    states: bool = True,
    part: str = "",
    finish: bool = False,
) -> None:
    """Embed every image and caption of a source once. Run again, it goes on where it stopped.

    With several devices or nodes each process embeds its own shards; Lightning starts them, or finds those of torchrun
    or SLURM. Parts are runs of their own, on any machine and at any time; after them --finish makes the store of what
    they wrote. How many processes and parts there are changes no byte of it.

    Args:
        source: folder of webdataset tars, glob, or range such as train-{000000..000012}.tar; local, or a URL (s3://,
            https://, …) of any file system that fsspec knows.
        store: folder of the embeddings, which all processes see.
        clip: CLIP that embeds.
        caption_key: suffix of the captions' files, such as .caption, or field of the samples' JSON, such as prompt;
            json for its fields captions and caption; empty takes key.txt, and key.json where there is none. Shards
            that were embedded with another caption_key are embedded again.
        batch_size: images, and captions, that CLIP sees at once.
        max_bad_fraction: largest share of samples without a readable image and caption.
        accelerator: auto, cpu, gpu or another of Lightning's names.
        devices: processes on a node, a device each.
        num_nodes: number of nodes.
        verify: read finished files against their checksums, and make again those that differ.
        states: keep the captions' token states; no leaves them out, which saves most of the bytes, and training encodes
            the captions of each batch.
        part: I/N, from 1/N to N/N, to embed every N-th shard alone; empty for all of them and the store's end.
        finish: make the store of what all parts wrote, and embed nothing.

    Raises:
        MissingFileError: no shards at ``source``.
        InputError: too many bad samples, none that is good, the store belongs to another CLIP, or a part is missing.
    """
    ours = _part(part, store, finish=finish, verify=verify)
    fabric = _fabric(accelerator, 1 if finish else devices, 1 if finish else num_nodes)
    share = partial(embed_share, batch_size=batch_size, verify=verify, part=ours)
    make_whole = partial(finish_store, max_bad_fraction=max_bad_fraction)
    kind: dict[str, Any] = {"caption_key": caption_key, "states": states}
    with _stopping_others(fabric):
        fabric.launch()
        encoder = clip.load().to(fabric.device)
        if not finish:
            share(source, store, encoder, rank=fabric.global_rank, world_size=fabric.world_size, **kind)
            _wait_for_all(fabric.world_size)
        if fabric.is_global_zero and ours is None:
            make_whole(source, store, encoder, **kind)


def _part(text: str, store: str, *, finish: bool, verify: bool) -> Part | None:
    """Return the part that ``--part`` names; None where it names none.

    Raises:
        InputError: there is no such part, or the options contradict each other.
    """
    if "://" in store:
        raise InputError(
            f"Expected a folder as --store. Got {store}: give a folder that all processes see, and copy it there later."
        )
    if finish and (text or verify):
        other = "--part" if text else "--verify"
        raise InputError(
            f"Expected --finish without {other}. Got both: run the parts with {other} first, then --finish by itself."
        )
    return Part.parse(text) if text else None


def _fabric(accelerator: str, devices: int, num_nodes: int) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    world_size = devices * num_nodes
    if world_size == 1 and (started := launched()) > 1:
        raise InputError(
            f"Expected --devices times --num_nodes to be the {started} processes that were started. Got 1: set them."
        )
    # Only the end is waited for, and that for as long as the largest share takes.
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=365)) if world_size > 1 else "auto"
    try:
        return Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Expected an accelerator of this machine. Choose --accelerator auto or cpu: {error}"
        ) from error


@contextmanager
def _stopping_others(fabric: Any) -> Iterator[None]:
    """End the processes that this one started, whichever error ends it."""
    try:
        yield
    except BaseException:
        for process in getattr(fabric.strategy.launcher, "procs", []):
            process.terminate()
        raise


def _wait_for_all(world_size: int) -> None:
    """Wait in a barrier that a signal can end."""
    if world_size == 1:
        return
    import torch.distributed

    arrival = torch.distributed.barrier(async_op=True)
    while not arrival.is_completed():
        time.sleep(0.1)
    arrival.wait()
