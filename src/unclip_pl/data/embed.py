"""Shards → features: one thread reads and decodes, one encodes, one writes."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip_pl.clip.encoder import ClipEncoder
from unclip_pl.data.ahead import ahead
from unclip_pl.data.features import Contents, ShardFeatures, moments_of, offsets_of, pack_texts, write_features
from unclip_pl.data.manifest import ShardRecord, tool_version
from unclip_pl.data.shards import Entry, ShardIndex, Split, decode_entries, index_shard
from unclip_pl.data.sources import Shard
from unclip_pl.data.transforms import to_pixels
from unclip_pl.errors import InputError
from unclip_pl.files import sha256

#: Batches that wait decoded while CLIP is busy.
DEPTH = 2
#: Where copies of remote shards live while they are read, inside the store.
INCOMING = ".incoming"

Advance = Callable[[int], None]


class Opened(NamedTuple):
    """A shard before its images come."""

    shard: Shard
    opened_ns: int  # when
    size: int  # bytes
    mark: str  # see `Stamp`
    sha256: str
    samples: ShardIndex


class Decoded(NamedTuple):
    """A batch of a shard."""

    entries: list[Entry]  # whose image is good
    images: Tensor  # (n, 3, H, H) uint8, theirs
    bad: list[tuple[str, str]]  # (reason, key) of the others


def features_file(folder: Path, shard: Shard) -> Path:
    """Where a shard's features lie in a store."""
    return folder / f"{shard.name.removesuffix('.tar')}.safetensors"


def embed_shards(
    shards: Iterable[Shard], folder: Path, encoder: ClipEncoder, *, batch_size: int, advance: Advance
) -> Iterator[tuple[ShardRecord, dict[str, list[str]]]]:
    """Embed shards into their files, reading the next and writing the last one meanwhile.

    A batch never holds images of two shards: a shard's features are the same whichever shards are done beside it.

    Args:
        shards: to embed.
        folder: of the store.
        encoder: CLIP, on the device that shall do the work.
        batch_size: images, or captions, at a time.
        advance: told the number of images of each batch, good or bad.

    Yields:
        What is written now, and the keys of its bad samples by reason.
    """
    fingerprint = encoder.fingerprint
    written: list[Future[tuple[ShardRecord, dict[str, list[str]]]]] = []
    read = ahead(_read(shards, folder / INCOMING, encoder.image_size, batch_size), DEPTH)
    with ThreadPoolExecutor(1) as writer, closing(read) as events:
        for opened in events:
            assert isinstance(opened, Opened)
            contents = embed_shard(opened, _batches(events), encoder, batch_size, advance)
            written.append(writer.submit(_write, opened, contents, folder, fingerprint))
            if len(written) > 1:
                yield written.pop(0).result()
        for last in written:
            yield last.result()


def _read(shards: Iterable[Shard], incoming: Path, size: int, batch_size: int) -> Iterator[Opened | Decoded | None]:
    """Each shard, its batches, and None after the last of them."""
    for shard in shards:
        opened_ns, mark = time.time_ns(), shard.stamp().mark
        with shard.fetched(incoming) as path:
            index = index_shard(path)
            yield Opened(shard, opened_ns, path.stat().st_size, mark, sha256(path), index)
            for batch in decode_entries(path, index.entries, size, batch_size):
                good = [(entry, image) for entry, image in batch if isinstance(image, Tensor)]
                images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, size, size)
                bad = [(str(image), entry.key) for entry, image in batch if not isinstance(image, Tensor)]
                yield Decoded([entry for entry, _ in good], images, bad)
        yield None


def _batches(events: Iterator[Opened | Decoded | None]) -> Iterator[Decoded]:
    """Those of one shard."""
    while isinstance(event := next(events), Decoded):
        yield event


def embed_shard(
    opened: Opened, batches: Iterator[Decoded], encoder: ClipEncoder, batch_size: int, advance: Advance
) -> Contents:
    """Features of a shard's good samples; each distinct caption is encoded once."""
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
    captions, text_embed, states, tokens, lengths = _embed_captions(distinct, encoder, batch_size, opened.shard)
    place = {caption: row for row, caption in enumerate(captions)}
    packed_captions, captions_offsets = pack_texts(captions)
    packed_keys, keys_offsets = pack_texts([entry.key for entry in entries])
    features = ShardFeatures(
        image_embed=_half(torch.cat(embeds), opened.shard),
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
    moments = moments_of(features.image_embed[features.split == Split.TRAIN])
    return Contents(features, moments, skipped)


def _embed_captions(
    captions: list[str], encoder: ClipEncoder, batch_size: int, shard: Shard
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Captions from short to long, so that a batch is hardly padded; their z_t (M, d), the real tokens' states (T, W)
    and ids (T,), and the number of tokens of each.
    """
    embeds = [np.empty((0, encoder.embed_dim), np.float16)]
    states, ids = [np.empty((0, encoder.text_width), np.float16)], [np.empty(0, np.int32)]
    lengths: list[int] = []
    tokens = encoder.tokenize(captions)
    order = tokens.argmax(-1).argsort(stable=True)  # the end token's place, see `ClipEncoder.encode_text`
    for chunk in tokens[order].split(batch_size) if captions else ():
        text = encoder.encode_text(chunk.to(next(encoder.parameters()).device))
        embeds.append(_half(text.embed, shard))
        states.append(_half(text.states[text.mask], shard))
        ids.append(text.tokens[text.mask].to("cpu", torch.int32).numpy())
        lengths += text.mask.sum(1).tolist()
    ordered = [captions[row] for row in order]
    return ordered, np.concatenate(embeds), np.concatenate(states), np.concatenate(ids), lengths


def _half(values: Tensor, shard: Shard) -> np.ndarray:
    half = values.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise InputError(f"CLIP gave values for {shard} that are not finite in float16: check its weights.")
    return half.numpy()


def _write(
    opened: Opened, contents: Contents, folder: Path, fingerprint: str
) -> tuple[ShardRecord, dict[str, list[str]]]:
    features, file = contents.features, features_file(folder, opened.shard)
    record = ShardRecord(
        shard=opened.shard.name,
        source_size=opened.size,
        source_mark=opened.mark,
        source_sha256=opened.sha256,
        file=file.name,
        sha256=contents.checksum(),
        clip=fingerprint,
        images=len(features.image_embed),
        splits=np.bincount(features.split, minlength=len(Split)).tolist(),
        captions=len(features.text_embed),
        dtype=str(features.image_embed.dtype),
        skipped={reason: len(keys) for reason, keys in contents.skipped.items()},
        version=tool_version(),
    )
    write_features(file, contents, record, opened.opened_ns)
    return record, contents.skipped
