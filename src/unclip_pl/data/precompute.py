"""Frozen CLIP features of a source, shard by shard: what is done stays done, whatever happens next."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec
from unclip_pl.data.atomic import sha256
from unclip_pl.data.features import (
    ShardFeatures,
    map_features,
    moments_of,
    offsets_of,
    pack_texts,
    read_moments,
    write_features,
)
from unclip_pl.data.manifest import ShardRecord, read_manifest, require_one_clip, tool_version, write_manifest
from unclip_pl.data.shards import Entry, Split, decode_entries, index_shard, list_shards
from unclip_pl.data.store import STATISTICS
from unclip_pl.data.transforms import BadSample, to_pixels
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

Advance = Callable[[int], None]


def precompute(
    source: str,
    store: str,
    clip: ClipSpec,
    *,
    batch_size: int = 256,
    max_bad_fraction: float = 0.01,
    device: str = "auto",
) -> None:
    """Embed every image and caption of a source once. Run again, it goes on where it stopped.

    Args:
        source: folder of webdataset tars, glob, or range such as train-{000000..000012}.tar.
        store: folder of the embeddings.
        clip: the CLIP that embeds.
        batch_size: images, and captions, that CLIP sees at once.
        max_bad_fraction: largest share of samples without a readable image and caption.
        device: auto, cpu, cuda, cuda:1, …

    Raises:
        FileNotFoundError: no shards at ``source``.
        ValueError: too many bad samples, none that is good, or the store belongs to another CLIP.
    """
    shards, folder = list_shards(source), Path(store)
    encoder = clip.load().to(resolve_device(device))
    fingerprint = encoder.fingerprint
    records = read_manifest(folder)
    require_one_clip(folder, records.values(), fingerprint)
    todo = [shard for shard in shards if not _is_whole(shard, folder, records.get(shard.name))]
    for record in _embed_all(todo, folder, encoder, fingerprint, batch_size):
        records[record.shard] = record
        write_manifest(folder, records.values())
    done = [records[shard.name] for shard in shards]
    _require_good(source, done, max_bad_fraction)
    write_statistics(
        folder / STATISTICS, moments=_moments(folder, done), null_text=_null_text(encoder), fingerprint=fingerprint
    )


def pending(source: str, store: str, fingerprint: str) -> list[Path]:
    """Shards of a source whose embeddings by this CLIP are not in the store, or all if its statistics are missing.

    Raises:
        ValueError: the store belongs to another CLIP.
    """
    shards, folder = list_shards(source), Path(store)
    records = read_manifest(folder)
    require_one_clip(folder, records.values(), fingerprint)
    if not (folder / STATISTICS).is_file():
        return shards
    return [shard for shard in shards if not _is_done(shard, folder, records.get(shard.name))]


def resolve_device(name: str) -> torch.device:
    """``auto`` is the machine's accelerator, or its CPU if there is none."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _is_done(shard: Path, folder: Path, record: ShardRecord | None) -> bool:
    return record is not None and (folder / record.file).is_file() and record.describes(shard)


def _is_whole(shard: Path, folder: Path, record: ShardRecord | None) -> bool:
    if record is None or not _is_done(shard, folder, record):
        return False
    return sha256(folder / record.file) == record.sha256


def _embed_all(
    shards: list[Path], folder: Path, encoder: ClipEncoder, fingerprint: str, batch_size: int
) -> Iterator[ShardRecord]:
    """Embed shards under a progress bar; each record comes once its file is whole."""
    seen, begin = 0, time.perf_counter()
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not shards) as progress:
        task = progress.add_task("", total=len(shards), rate="")

        def advance(images: int) -> None:
            nonlocal seen
            seen += images
            progress.update(task, rate=f"{seen / (time.perf_counter() - begin):,.0f} images/s")

        for shard in shards:
            yield _embed_to_file(shard, folder, encoder, fingerprint, batch_size, advance)
            progress.advance(task)


def _embed_to_file(
    shard: Path, folder: Path, encoder: ClipEncoder, fingerprint: str, batch_size: int, advance: Advance
) -> ShardRecord:
    stat, source_hash = shard.stat(), sha256(shard)
    features, skipped = embed_shard(shard, encoder, batch_size, advance)
    for reason, keys in skipped.items():
        log.warning("%s: skipped %d sample(s), %s: %s", shard, len(keys), reason, ", ".join(keys[:3]))
    file = folder / f"{shard.stem}.safetensors"
    moments = moments_of(features.image_embed[features.split == Split.TRAIN])
    write_features(file, features, moments, skipped)
    return ShardRecord(
        shard=shard.name,
        source_size=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        source_sha256=source_hash,
        file=file.name,
        sha256=sha256(file),
        clip=fingerprint,
        images=len(features.image_embed),
        captions=len(features.text_embed),
        dtype=str(features.image_embed.dtype),
        skipped={reason: len(keys) for reason, keys in skipped.items()},
        version=tool_version(),
    )


def embed_shard(
    shard: Path, encoder: ClipEncoder, batch_size: int, advance: Advance
) -> tuple[ShardFeatures, dict[str, list[str]]]:
    """Features of a shard's good samples, and the keys of its bad ones by reason.

    Args:
        shard: the tar.
        encoder: CLIP, on the device that shall do the work.
        batch_size: images, or captions, at a time.
        advance: told the number of images of each batch, good or bad.
    """
    index, device = index_shard(shard), next(encoder.parameters()).device
    skipped = {reason: list(keys) for reason, keys in index.skipped.items()}
    entries: list[Entry] = []
    embeds = [np.empty((0, encoder.embed_dim), np.float16)]
    for batch in decode_entries(shard, index.entries, encoder.image_size, batch_size):
        good = [(entry, image) for entry, image in batch if isinstance(image, Tensor)]
        for entry, image in batch:
            if isinstance(image, BadSample):
                skipped.setdefault(str(image), []).append(entry.key)
        if good:
            images = torch.stack([image for _, image in good]).to(device)
            embeds.append(_half(encoder.encode_image(to_pixels(images)), shard))
            entries += [entry for entry, _ in good]
        advance(len(batch))

    captions = list(dict.fromkeys(caption for entry in entries for caption in entry.captions))
    place = {caption: row for row, caption in enumerate(captions)}
    text_embed, states, tokens, lengths = _embed_captions(captions, encoder, batch_size, shard)
    packed_captions, captions_offsets = pack_texts(captions)
    packed_keys, keys_offsets = pack_texts([entry.key for entry in entries])
    features = ShardFeatures(
        image_embed=np.concatenate(embeds),
        text_embed=text_embed,
        text_states=states,
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
    return features, skipped


def _embed_captions(
    captions: list[str], encoder: ClipEncoder, batch_size: int, shard: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """z_t (M, d), the real tokens' states (T, W) and ids (T,), and the number of tokens of each caption."""
    embeds = [np.empty((0, encoder.embed_dim), np.float16)]
    states, tokens = [np.empty((0, encoder.text_width), np.float16)], [np.empty(0, np.int32)]
    lengths: list[int] = []
    for start in range(0, len(captions), batch_size):
        text = encoder.describe(captions[start : start + batch_size])
        embeds.append(_half(text.embed, shard))
        states.append(_half(text.states[text.mask], shard))
        tokens.append(text.tokens[text.mask].to("cpu", torch.int32).numpy())
        lengths += text.mask.sum(1).tolist()
    return np.concatenate(embeds), np.concatenate(states), np.concatenate(tokens), lengths


def _half(values: Tensor, shard: Path) -> np.ndarray:
    half = values.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise ValueError(f"CLIP gave values for {shard} that are not finite in float16: check its weights.")
    return half.numpy()


def _require_good(source: str, records: list[ShardRecord], max_bad_fraction: float) -> None:
    reasons: Counter[str] = sum((Counter(record.skipped) for record in records), Counter())
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    good, bad = sum(record.images for record in records), reasons.total()
    if good == 0:
        raise ValueError(
            f"Expected images with captions in {source}. Got no usable sample in {len(records)} shard(s)"
            f" ({named or 'they are empty'}): a sample is key.png or .jpg or .webp, with key.txt or key.json beside it."
        )
    if bad > max_bad_fraction * (good + bad):
        raise ValueError(
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
    return TextFeatures(*(value.cpu() for value in encoder.describe([""])))
