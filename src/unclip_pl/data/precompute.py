"""Frozen CLIP features of a source, shard by shard: what is done stays done, whatever happens next.

A shard is done when its file is in its place; the file's head says what it is of. When all are, the store's statistics
and its manifest are written, and it can be opened.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.embed import embed_shards, features_file
from unclip_pl.data.features import map_features, moments_of, read_contents, read_moments, read_record
from unclip_pl.data.manifest import ShardRecord, read_manifest, require_one_clip, write_manifest
from unclip_pl.data.sources import Shard, list_shards
from unclip_pl.data.store import STATISTICS
from unclip_pl.errors import InputError
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)


def precompute(
    source: str,
    store: str,
    clip: ClipSpec,
    *,
    batch_size: int = 256,
    max_bad_fraction: float = 0.01,
    device: str = "auto",
    verify: bool = False,
) -> None:
    """Embed every image and caption of a source once, in this process. Run again, it goes on where it stopped.

    Args:
        source: see ``list_shards``.
        store: folder of the embeddings.
        clip: the CLIP that embeds.
        batch_size: images, and captions, that CLIP sees at once.
        max_bad_fraction: largest share of samples without a readable image and caption.
        device: auto, cpu, cuda, cuda:1, …
        verify: read what is done against its checksums, and make again what differs.

    Raises:
        FileNotFoundError: no shards at ``source``.
        ValueError: too many bad samples, none that is good, or the store belongs to another CLIP.
    """
    encoder = clip.load().to(resolve_device(device))
    embed_share(source, store, encoder, batch_size=batch_size, verify=verify)
    finish(source, store, encoder, max_bad_fraction=max_bad_fraction)


def embed_share(
    source: str,
    store: str,
    encoder: ClipEncoder,
    *,
    batch_size: int,
    verify: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Embed one rank's shards. Ranks need not know of each other: no file has two writers.

    Args:
        source: see ``list_shards``.
        store: folder of the embeddings.
        encoder: CLIP, on the device that shall do the work.
        batch_size: images, and captions, that CLIP sees at once.
        verify: read what is done against its checksums, and make again what differs.
        rank: of this process, below ``world_size``.
        world_size: number of processes.

    Raises:
        FileNotFoundError: no shards at ``source``.
        ValueError: the store belongs to another CLIP.
    """
    shards, folder = deal(list_shards(source), rank, world_size), Path(store)
    manifest = read_manifest(folder)
    records = {shard: read_record(features_file(folder, shard)) for shard in shards}
    require_one_clip(folder, [*manifest.values(), *filter(None, records.values())], encoder.fingerprint)
    todo = [shard for shard, record in records.items() if not _is_done(shard, folder, record)]
    if verify:
        done = [shard for shard in shards if shard not in set(todo)]
        todo += [shard for shard in done if not _is_whole(features_file(folder, shard), manifest.get(shard.name))]
        log.info("%s: %d of %d shards are as they were written.", folder, len(shards) - len(todo), len(shards))
    _embed(todo, folder, encoder, batch_size, quiet=rank > 0)


def deal(shards: list[Shard], rank: int, world_size: int) -> list[Shard]:
    """A rank's shards: the counts of two ranks differ by one at most."""
    return shards[rank::world_size]


def finish(source: str, store: str, encoder: ClipEncoder, *, max_bad_fraction: float = 0.01) -> None:
    """Make a store of the embedded shards: statistics first, then the manifest, by which it opens.

    Args:
        source: see ``list_shards``.
        store: folder of the embeddings.
        encoder: the CLIP that embedded them.
        max_bad_fraction: largest share of samples without a readable image and caption.

    Raises:
        ValueError: a shard is missing, too many samples are bad, or none is good.
    """
    shards, folder = list_shards(source), Path(store)
    found = {shard: read_record(features_file(folder, shard)) for shard in shards}
    records = [record for record in found.values() if record]
    if len(records) < len(shards):
        missing = [str(shard) for shard, record in found.items() if not record]
        raise InputError(
            f"{len(missing)} of {len(shards)} shards have no embeddings in {folder}, such as {missing[0]}: "
            "run `unclip precompute` again."
        )
    _require_good(source, records, max_bad_fraction)
    moments, null_text = _moments(folder, records), _null_text(encoder)
    write_statistics(folder / STATISTICS, moments=moments, null_text=null_text, fingerprint=encoder.fingerprint)
    write_manifest(folder, (read_manifest(folder) | {record.shard: record for record in records}).values())


def pending(source: str, store: str, fingerprint: str) -> list[Shard]:
    """Shards of a source whose embeddings by this CLIP are not in the store, or all if its statistics are missing.

    Whether a remote shard has changed is for ``unclip precompute`` to ask: here it would take a request each.

    Raises:
        ValueError: the store belongs to another CLIP.
    """
    shards, folder = list_shards(source), Path(store)
    records = read_manifest(folder)
    require_one_clip(folder, records.values(), fingerprint)
    if not (folder / STATISTICS).is_file():
        return shards
    known = [(shard, records.get(shard.name)) for shard in shards]
    return [shard for shard, record in known if not (record and shard.remote) and not _is_done(shard, folder, record)]


def resolve_device(name: str) -> torch.device:
    """``auto`` is the machine's accelerator, or its CPU if there is none."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _is_done(shard: Shard, folder: Path, record: ShardRecord | None) -> bool:
    if record is None:
        return False
    file = folder / record.file
    return file.is_file() and record.describes(shard, file)


def _is_whole(file: Path, line: ShardRecord | None) -> bool:
    """Whether a file holds what its head, and the manifest's line, say."""
    record = read_record(file)
    try:
        if record is not None and line in (None, record) and read_contents(file).checksum() == record.sha256:
            return True
    except ValueError:
        pass
    log.warning("%s is not as it was written: making it again.", file)
    return False


def _embed(todo: list[Shard], folder: Path, encoder: ClipEncoder, batch_size: int, *, quiet: bool) -> None:
    """Embed shards under a progress bar."""
    seen, begin = 0, time.perf_counter()
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=quiet or not todo) as progress:
        task = progress.add_task("", total=len(todo), rate="")

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            progress.update(task, rate=f"{seen / (time.perf_counter() - begin):,.0f} images/s")

        for record, skipped in embed_shards(todo, folder, encoder, batch_size=batch_size, advance=advance):
            for reason, keys in skipped.items():
                few = ", ".join(keys[:3])
                log.warning("%s: skipped %d sample(s), %s: %s", record.shard, len(keys), reason, few)
            progress.advance(task)


def _require_good(source: str, records: list[ShardRecord], max_bad_fraction: float) -> None:
    reasons: Counter[str] = sum((Counter(record.skipped) for record in records), Counter())
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    good, bad = sum(record.images for record in records), reasons.total()
    if good == 0:
        raise InputError(
            f"Expected images with captions in {source}. Got no usable sample in {len(records)} shard(s)"
            f" ({named or 'they are empty'}): a sample is key.png or .jpg or .webp, with key.txt or key.json beside it."
        )
    if bad > max_bad_fraction * (good + bad):
        raise InputError(
            f"{bad} of {good + bad} samples of {source} are bad ({named}), more than max_bad_fraction = "
            f"{max_bad_fraction}. What is embedded is kept: mend the shards, or run `unclip precompute` with a larger "
            "--max_bad_fraction."
        )


def _moments(folder: Path, records: Iterable[ShardRecord]) -> Moments:
    """Of the training split; of everything where a source has none, as one that is only for evaluation."""
    files = [folder / record.file for record in records]
    moments = reduce(Moments.plus, map(read_moments, files))
    if moments.total > 0:
        return moments
    log.warning("No training images in %s: its statistics are those of the other splits.", folder)
    return reduce(Moments.plus, (moments_of(map_features(file).image_embed) for file in files))


def _null_text(encoder: ClipEncoder) -> TextFeatures:
    return encoder.describe([""]).to("cpu")
