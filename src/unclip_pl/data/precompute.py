"""Frozen CLIP features of a source, shard by shard: a finished shard stays finished, also after a crash.

A shard is done when its file is in its place; the file's header holds the shard's record. When all shards are done, the
store's statistics and its manifest are written, and it can be opened. While CLIP embeds one shard, a thread reads and
decodes the next, and another one writes the last.
"""

import logging
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.shards import Entry, Shard, ShardIndex, Split, decode_entries, index_shard, list_shards, no_samples
from unclip_pl.data.store import (
    MANIFEST,
    STATISTICS,
    Contents,
    ShardFeatures,
    ShardRecord,
    head_of,
    map_features,
    moments_of,
    offsets_of,
    pack_texts,
    read_contents,
    read_manifest,
    read_moments,
    read_record,
    require_caption_key,
    require_one_clip,
    require_states,
    write_features,
    write_manifest,
)
from unclip_pl.data.transforms import to_pixels
from unclip_pl.errors import InputError
from unclip_pl.files import sha256
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

#: Batches that wait decoded while CLIP is busy.
DEPTH = 2
#: Empty file that a part leaves in the store, so that `finish` can say which parts are missing.
BEGUN = ".part-{}-of-{}"
#: Names that a shard must not have: its features would take the place of the store's own files.
RESERVED = ("statistics", "text-statistics")

Advance = Callable[[int], None]
Skipped = dict[str, list[str]]  # keys of bad samples by reason
T = TypeVar("T")


class Part(NamedTuple):
    """One of several runs that share a source's shards, on any machine and at any time."""

    number: int  # the first is 1
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``3/64``.

        Raises:
            InputError: it is no such pair of numbers.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.total:
            raise InputError(f"Expected --part from 1/N to N/N, such as 3/64. Got {text!r}: correct it.")
        return part


def precompute(
    source: str,
    store: str,
    clip: ClipSpec,
    *,
    caption_key: str = "",
    batch_size: int = 256,
    max_bad_fraction: float = 0.01,
    device: str = "auto",
    verify: bool = False,
    states: bool = True,
) -> None:
    """Embed a source in this process: :func:`embed_share` and :func:`finish`, whose arguments and errors these are.

    Args:
        source: shards, see ``list_shards``.
        store: folder of the embeddings.
        clip: CLIP that embeds.
        caption_key: place of the captions, see ``index_shard``.
        batch_size: images, and captions, that CLIP sees at once.
        max_bad_fraction: largest share of samples without a readable image and caption.
        device: auto, cpu, cuda, cuda:1, …
        verify: read finished files against their checksums, and make again those that differ.
        states: keep the captions' token states, too.
    """
    encoder = clip.load().to(resolve_device(device))
    embed_share(source, store, encoder, caption_key=caption_key, batch_size=batch_size, verify=verify, states=states)
    finish(source, store, encoder, caption_key=caption_key, max_bad_fraction=max_bad_fraction, states=states)


def embed_share(
    source: str,
    store: str,
    encoder: ClipEncoder,
    *,
    caption_key: str = "",
    batch_size: int,
    verify: bool = False,
    states: bool = True,
    part: Part | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Embed one rank's shards. Parts and ranks need not know of each other: no file has two writers.

    Args:
        source: shards, see ``list_shards``.
        store: folder of the embeddings.
        encoder: CLIP, on the device to work on.
        caption_key: place of the captions, see ``index_shard``. What another one gave is embedded again.
        batch_size: images, and captions, that CLIP sees at once.
        verify: read finished files against their checksums, and make again those that differ.
        states: keep the captions' token states, too.
        part: run that this process belongs to; None where one run does all shards.
        rank: number of this process, below ``world_size``.
        world_size: number of processes of this run.

    Raises:
        MissingFileError: no shards at ``source``.
        InputError: the store belongs to another CLIP, or is finished and has token states where none are wanted or the
            reverse, or a part would change its captions; or a shard has a name that the store needs.
    """
    listed, folder = list_shards(source), Path(store)
    _refuse_names_of_the_store(listed)
    shards = deal(deal(listed, part.number - 1, part.total) if part else listed, rank, world_size)
    manifest = read_manifest(folder)
    records = {shard: read_record(features_file(folder, shard)) for shard in shards}
    require_one_clip(folder, [*manifest.values(), *filter(None, records.values())], encoder.fingerprint)
    known = [manifest[shard.name] for shard in listed if shard.name in manifest]
    require_states(folder, known, states)
    if part:
        _begin(part, folder, known, caption_key)
    elif rank == 0:
        _forget_other_captions(folder, listed, manifest, caption_key)
    kind = {"caption_key": caption_key, "states": states}
    todo = [shard for shard, record in records.items() if not _is_done(shard, folder, record, kind)]
    if verify:
        done = [shard for shard in shards if shard not in set(todo)]
        todo += [shard for shard in done if not _is_whole(features_file(folder, shard), manifest.get(shard.name))]
        log.info("%s: %d of %d shards are as they were written.", folder, len(shards) - len(todo), len(shards))
    _embed(todo, folder, encoder, kind, batch_size, quiet=rank > 0)


def _refuse_names_of_the_store(shards: list[Shard]) -> None:
    for shard in shards:
        if shard.name.removesuffix(".tar") in RESERVED:
            raise InputError(
                f"Expected another name than {shard.name}, whose features would overwrite the statistics of "
                f"the store: rename {shard}."
            )


def _begin(part: Part, folder: Path, known: list[ShardRecord], caption_key: str) -> None:
    """Leave a part's mark in the store. The manifest belongs to all parts, so none may change what it says."""
    foreign = sorted({record.caption_key for record in known} - {caption_key})
    if foreign:
        raise InputError(
            f"Expected the caption_key {foreign[0]!r} of the finished store {folder}. Got {caption_key!r}: "
            f"use another --store, or delete {folder / MANIFEST} to have all parts embed it again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN.format(*part)).touch()


def _forget_other_captions(
    folder: Path, shards: list[Shard], manifest: dict[str, ShardRecord], caption_key: str
) -> None:
    """Take the shards whose captions were found elsewhere out of the manifest, before their files change."""
    names = {shard.name for shard in shards}
    stale = {name for name in names & manifest.keys() if manifest[name].caption_key != caption_key}
    if stale:
        log.warning("%s: making %d shard(s) again, with caption_key %r.", folder, len(stale), caption_key)
        write_manifest(folder, [record for name, record in manifest.items() if name not in stale])


def launched() -> int:
    """Count the processes that a launcher (torchrun, SLURM) started, before there is a trainer to ask."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def deal(shards: list[Shard], rank: int, world_size: int) -> list[Shard]:
    """Return a rank's shards: the counts of two ranks differ by one at most."""
    return shards[rank::world_size]


def finish(
    source: str,
    store: str,
    encoder: ClipEncoder,
    *,
    caption_key: str = "",
    max_bad_fraction: float = 0.01,
    states: bool = True,
) -> None:
    """Make a store of the embedded shards: write statistics first, then the manifest, by which it opens.

    A store may hold several sources, such as train shards and held-out ones. Its statistics are those of all of them.
    A shard whose features are gone or damaged is forgotten.

    Args:
        source: shards, see ``list_shards``.
        store: folder of the embeddings.
        encoder: CLIP that embedded them.
        caption_key: place of the captions, see ``index_shard``.
        max_bad_fraction: largest share of samples without a readable image and caption.
        states: token states are kept, too.

    Raises:
        InputError: a shard is missing, has changed or belongs to another CLIP, too many samples are bad, or none is
            good.
    """
    kind = {"caption_key": caption_key, "states": states}
    shards, folder, manifest = list_shards(source), Path(store), read_manifest(Path(store))
    found = {shard: read_record(features_file(folder, shard)) for shard in shards}
    records = [record for record in found.values() if record]
    require_one_clip(folder, [*manifest.values(), *records], encoder.fingerprint)
    missing = [shard for shard, record in found.items() if not _seems_done(shard, folder, record, kind)]
    if missing:
        raise _unfinished(folder, shards, missing)
    _require_good(source, records, max_bad_fraction)
    null_text = TextFeatures(*(value.cpu() for value in encoder.describe([""])))
    names = {shard.name for shard in shards}
    there = (read_record(folder / other.file) for name, other in manifest.items() if name not in names)
    others = [other for other in there if other]
    require_one_clip(folder, others, encoder.fingerprint)
    if others:
        log.warning(
            "%s holds %d more shard(s) than %s, such as %s: its statistics are those of all. If they are no longer "
            "wanted, delete their files in the store, and run `unclip precompute` again.",
            folder, len(others), source, others[0].file,
        )  # fmt: skip
    records = sorted([*others, *records], key=lambda record: record.shard)
    write_statistics(
        folder / STATISTICS,
        moments=_moments(folder, records),
        null_text=null_text,
        fingerprint=encoder.fingerprint,
    )
    write_manifest(folder, records)
    for mark in folder.glob(BEGUN.format("*", "*")):
        mark.unlink(missing_ok=True)


def _unfinished(folder: Path, shards: list[Shard], missing: list[Shard]) -> InputError:
    """Return the error of a store that lacks shards. It names the parts that were to embed them."""
    lack = f"{len(missing)} of {len(shards)} shards have no embeddings in {folder}, or others (caption_key, states), "
    lack += f"or have changed since, such as {missing[0]}"
    begun = sorted(folder.glob(BEGUN.format("*", "*")), key=lambda mark: mark.stat().st_mtime_ns)
    if not begun:
        return InputError(f"{lack}: run `unclip precompute` again.")
    total = int(begun[-1].name.rpartition("-")[2])
    absent = set(missing)
    parts = [str(Part(i + 1, total)) for i in range(total) if not absent.isdisjoint(deal(shards, i, total))]
    named = ", ".join(parts[:20]) + (f" and {len(parts) - 20} more" if len(parts) > 20 else "")
    return InputError(f"Expected all {total} parts. Got none or not all of {named}: run them again ({lack}).")


def pending(source: str, store: str, fingerprint: str, caption_key: str = "") -> list[Shard]:
    """Return the shards that have no embeddings by this CLIP in a store, or all if its statistics are missing.

    Whether a remote shard has changed is for ``unclip precompute`` to ask: here it would take a request each.

    Raises:
        InputError: the store belongs to another CLIP, or its captions were found at another ``caption_key``.
    """
    shards, folder = list_shards(source), Path(store)
    records = read_manifest(folder)
    require_one_clip(folder, records.values(), fingerprint)
    require_caption_key(folder, [records[shard.name] for shard in shards if shard.name in records], caption_key)
    if not (folder / STATISTICS).is_file():
        return shards
    return [shard for shard in shards if not _seems_done(shard, folder, records.get(shard.name), {})]


def resolve_device(name: str) -> torch.device:
    """Return a device by name; ``auto`` is the machine's accelerator, or its CPU if there is none."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def features_file(folder: Path, shard: Shard) -> Path:
    """Return the path of a shard's features in a store."""
    return folder / f"{shard.name.removesuffix('.tar')}.safetensors"


def lacks_states(store: str) -> bool:
    """Say whether the shards that a store holds, finished or not, were embedded without token states."""
    records = filter(None, map(read_record, Path(store).glob("*.safetensors")))
    return any(not record.states for record in records)


def _is_done(shard: Shard, folder: Path, record: ShardRecord | None, kind: dict[str, Any]) -> bool:
    """Say whether a shard is embedded; ``kind`` has what its record must say besides."""
    if record is None or any(getattr(record, name) != value for name, value in kind.items()):
        return False
    file = folder / record.file
    return file.is_file() and record.describes(shard, file)


def _seems_done(shard: Shard, folder: Path, record: ShardRecord | None, kind: dict[str, Any]) -> bool:
    """Say whether a shard is embedded, without a request to the server of a remote one, which may have changed."""
    if record is None or not shard.remote:
        return _is_done(shard, folder, record, kind)
    return all(getattr(record, name) == value for name, value in kind.items())


def _is_whole(file: Path, line: ShardRecord | None) -> bool:
    """Say whether a file agrees with its header and with the manifest's line."""
    record = read_record(file)
    try:
        if record is not None and line in (None, record) and read_contents(file).checksum() == record.sha256:
            return True
    except ValueError:
        pass
    log.warning("%s is not as it was written: making it again.", file)
    return False


def _require_good(source: str, records: list[ShardRecord], max_bad_fraction: float) -> None:
    reasons: Counter[str] = sum((Counter(record.skipped) for record in records), Counter())
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    good, bad = sum(record.images for record in records), reasons.total()
    others = list(dict.fromkeys(name for record in records for name in record.others))
    if good == 0:
        raise no_samples(source, len(records), dict(reasons.most_common()), others)
    if bad > max_bad_fraction * (good + bad):
        raise InputError(
            f"{bad} of {good + bad} samples of {source} are bad ({named}), more than max_bad_fraction = "
            f"{max_bad_fraction}. What is embedded is kept: correct the shards, or run `unclip precompute` with a "
            "larger --max_bad_fraction."
            + (f" Bad samples have {', '.join(others)}: captions there need --caption_key." if others else "")
        )


def _moments(folder: Path, records: Iterable[ShardRecord]) -> Moments:
    """Add up the training split's moments; of a source without one, those of everything."""
    files = [folder / record.file for record in records]
    moments = reduce(Moments.plus, map(read_moments, files))
    if moments.total > 0:
        return moments
    log.warning("No training images in %s: its statistics are those of the other splits.", folder)
    return reduce(Moments.plus, (moments_of(map_features(file).image_embed) for file in files))


# --- Embedding


class Opened(NamedTuple):
    """A shard before its images come."""

    shard: Shard
    opened_ns: int  # time
    size: int  # bytes
    mark: str  # see `Stamp`
    sha256: str
    head: str  # see `head_of`
    samples: ShardIndex


class Decoded(NamedTuple):
    """A batch of a shard."""

    entries: list[Entry]  # those with a good image
    images: Tensor  # (n, 3, H, H) uint8
    bad: list[tuple[str, str]]  # (reason, key) of the others


def _embed(
    todo: list[Shard], folder: Path, encoder: ClipEncoder, kind: dict[str, Any], batch_size: int, *, quiet: bool
) -> None:
    """Embed shards under a progress bar."""
    seen, begin = 0, time.perf_counter()
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=quiet or not todo) as progress:
        task = progress.add_task("", total=len(todo), rate="")

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            progress.update(task, rate=f"{seen / (time.perf_counter() - begin):,.0f} images/s")

        embedded = embed_shards(todo, folder, encoder, **kind, batch_size=batch_size, advance=advance)
        for record, skipped in embedded:
            for reason, keys in skipped.items():
                few = ", ".join(keys[:3])
                log.warning("%s: skipped %d sample(s), %s: %s", record.shard, len(keys), reason, few)
            progress.advance(task)


def embed_shards(
    shards: Iterable[Shard],
    folder: Path,
    encoder: ClipEncoder,
    *,
    caption_key: str = "",
    states: bool = True,
    batch_size: int,
    advance: Advance,
) -> Iterator[tuple[ShardRecord, Skipped]]:
    """Embed shards into their files, reading the next and writing the last one meanwhile.

    A batch never holds images of two shards: a shard's features are the same whichever shards are done beside it.

    Args:
        shards: shards to embed.
        folder: the store's folder.
        encoder: CLIP, on the device to work on.
        caption_key: place of the captions, see ``index_shard``.
        states: keep the captions' token states, too.
        batch_size: images, or captions, at a time.
        advance: told the number of images of each batch, good or bad.

    Yields:
        Records that are written, each with the keys of its bad samples by reason.
    """
    made_by = {"clip": encoder.fingerprint, "caption_key": caption_key, "states": states}
    written: list[Future[tuple[ShardRecord, Skipped]]] = []
    read = _ahead(_read(shards, folder, caption_key, encoder.image_size, batch_size), DEPTH)
    with ThreadPoolExecutor(1) as writer, closing(read) as events:
        for opened in events:
            assert isinstance(opened, Opened)
            batches = iter(lambda: next(events), None)  # of this shard: None ends them
            contents = embed_shard(opened, batches, encoder, batch_size, advance, states)  # type: ignore[arg-type]
            written.append(writer.submit(_write, opened, contents, folder, made_by))
            if len(written) > 1:
                yield written.pop(0).result()
        for last in written:
            yield last.result()


def _read(
    shards: Iterable[Shard], folder: Path, caption_key: str, size: int, batch_size: int
) -> Iterator[Opened | Decoded | None]:
    """Yield each shard, its batches, and None after the last of them."""
    for shard in shards:
        opened_ns, mark = time.time_ns(), shard.stamp().mark
        with shard.fetched(folder / f".{shard.name}.incoming") as path:
            index = index_shard(path, caption_key)
            yield Opened(shard, opened_ns, path.stat().st_size, mark, sha256(path), head_of(path), index)
            for batch in decode_entries(path, index.entries, size, batch_size):
                good = [(entry, image) for entry, image in batch if isinstance(image, Tensor)]
                images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, size, size)
                bad = [(str(image), entry.key) for entry, image in batch if not isinstance(image, Tensor)]
                yield Decoded([entry for entry, _ in good], images, bad)
        yield None


def embed_shard(
    opened: Opened, batches: Iterator[Decoded], encoder: ClipEncoder, batch_size: int, advance: Advance, states: bool
) -> Contents:
    """Embed a shard's good samples; each distinct caption is encoded once, and its token states kept or not."""
    device = next(encoder.parameters()).device
    skipped = {reason: list(keys) for reason, keys in opened.samples.skipped.items()}
    entries: list[Entry] = []
    embeds = [torch.empty(0, encoder.embed_dim, device=device)]
    for batch in batches:
        if batch.entries:
            embeds.append(encoder.encode_image(to_pixels(batch.images.to(device, non_blocking=True))))
        entries += batch.entries
        for reason, key in batch.bad:
            skipped.setdefault(reason, []).append(key)
        advance(len(batch.entries) + len(batch.bad))

    distinct = list(dict.fromkeys(caption for entry in entries for caption in entry.captions))
    width = encoder.text_width if states else 0
    captions, text_embed, token_states, tokens, lengths = _embed_captions(
        distinct, encoder, batch_size, opened.shard, width
    )
    place = {caption: row for row, caption in enumerate(captions)}
    packed_captions, captions_offsets = pack_texts(captions)
    packed_keys, keys_offsets = pack_texts([entry.key for entry in entries])
    features = ShardFeatures(
        image_embed=_half(torch.cat(embeds), opened.shard),
        text_embed=text_embed,
        text_states=token_states,
        text_tokens=tokens,
        text_offsets=offsets_of(lengths),
        caption_rows=np.array([place[caption] for entry in entries for caption in entry.captions], np.int32),
        caption_offsets=offsets_of(len(entry.captions) for entry in entries),
        captions=packed_captions,
        captions_offsets=captions_offsets,
        keys=packed_keys,
        keys_offsets=keys_offsets,
        image_offset=np.array([entry.image.offset for entry in entries], np.int64),
        image_size=np.array([entry.image.size for entry in entries], np.int64),
        json_offset=np.array([entry.json.offset for entry in entries], np.int64),
        json_size=np.array([entry.json.size for entry in entries], np.int64),
        split=np.array([entry.split for entry in entries], np.uint8),
    )
    moments = moments_of(features.image_embed[features.split == Split.TRAIN])
    return Contents(features, moments, skipped)


def _embed_captions(
    captions: list[str], encoder: ClipEncoder, batch_size: int, shard: Shard, width: int
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Embed captions from short to long, so that a batch is hardly padded.

    Returns:
        The captions in that order, their z_t (M, d), the real tokens' states (T, width) and ids (T,), and the number of
        tokens of each.
    """
    embeds = [np.empty((0, encoder.embed_dim), np.float16)]
    states, ids = [np.empty((0, width), np.float16)], [np.empty(0, np.int32)]
    lengths: list[int] = []
    tokens = encoder.tokenize(captions)
    order = encoder.lengths(tokens).argsort(stable=True)
    for chunk in tokens[order].split(batch_size) if captions else ():
        text = encoder.encode_text(chunk.to(next(encoder.parameters()).device))
        embeds.append(_half(text.embed, shard))
        states.append(_half(text.states[text.mask][:, :width], shard))
        ids.append(text.tokens[text.mask].to("cpu", torch.int32).numpy())
        lengths += text.mask.sum(1).tolist()
    ordered = [captions[row] for row in order]
    return ordered, np.concatenate(embeds), np.concatenate(states), np.concatenate(ids), lengths


def _half(values: Tensor, shard: Shard) -> np.ndarray:
    half = values.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise InputError(f"CLIP gave values for {shard} that are not finite in float16: check its weights.")
    return half.numpy()


def _write(opened: Opened, contents: Contents, folder: Path, made_by: dict[str, Any]) -> tuple[ShardRecord, Skipped]:
    file = features_file(folder, opened.shard)
    record = ShardRecord.of(
        contents,
        shard=opened.shard.name,
        source_size=opened.size,
        source_mark=opened.mark,
        source_sha256=opened.sha256,
        source_head=opened.head,
        file=file.name,
        others=opened.samples.others,
        **made_by,
    )
    write_features(file, contents, record, opened.opened_ns)
    return record, contents.skipped


class _End(NamedTuple):
    """Mark after the last item, with the error that ended them."""

    error: BaseException | None


def _ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield the same items, drawn by a thread of their own, up to ``depth`` before they are asked for.

    An error in the thread is raised here, in its place. Closed early, the thread ends with the item it is at.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            put(_End(error))
        else:
            put(_End(None))

    thread = threading.Thread(target=draw, name="ahead", daemon=True)  # a server that hangs must not hold up an exit
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join(timeout=5)
