"""Pack samples into source shards: the same bytes for the same samples, going on where it stopped."""

import errno
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.shards import MAX_IMAGE, MAX_TEXT, encode_text
from unclip_pl.data.transforms import BadSample, Encoding, center_square, decode_image, scale_shorter, suffix_of
from unclip_pl.errors import InputError
from unclip_pl.files import EDGES, replacing, write_text
from unclip_pl.packing.samples import Picture, Sample

_FORMAT: dict[Encoding, str] = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


class Form(NamedTuple):
    """How images are stored. An image that needs no change stays as it is, byte by byte."""

    size: int | None = None  # of the shorter side, in pixels; None keeps every size
    resize: Literal["square", "shorter"] = "square"  # the central square, or the whole picture
    encode: Encoding | None = None  # None keeps each file's format, and makes rendered images PNG
    quality: int = 95  # of JPEG and WebP, 1 to 100

    def check(self) -> None:
        """Raise InputError where no image can have this form."""
        if self.size is None and self.resize != "square":
            raise InputError(f"Expected a size to resize to ({self.resize}). Got none: give --size.")
        if self.size is not None and not 0 < self.size <= 8192:
            raise InputError(f"Expected a size of 1 to 8192 pixels. Got {self.size}: give --size in that range.")
        if not 1 <= self.quality <= 100:
            raise InputError(f"Expected a quality of 1 to 100. Got {self.quality}: give --quality in that range.")


AS_THEY_ARE = Form()


class PackedShard(NamedTuple):
    """One shard of a pack: a line of its manifest."""

    shard: str  # file name of the tar
    samples: int
    size: int  # bytes of the tar
    recipe: str  # hash of what went in: keys, captions, names or pixels of the images, and their form
    skipped: dict[str, list[str]]  # names of the bad samples by reason


#: Reasons for which a sample is bad that may be gone at the next start.
MISSING, UNREADABLE = "missing file", "unreadable file"


class _Job(NamedTuple):
    path: Path
    samples: list[Sample]
    form: Form
    recipe: str


def write_shards(
    samples: Iterable[Sample],
    out_dir: str | Path,
    split: str,
    *,
    shard_size: int = 1000,
    form: Form = AS_THEY_ARE,
    num_workers: int = 0,
) -> list[Path]:
    """Write ``split-000000.tar``, … and ``split.manifest.jsonl``; see :func:`pack_shards`.

    Returns:
        Paths of the shards.

    Raises:
        InputError: see :func:`pack_shards`, or no samples.
    """
    done = list(pack_shards(samples, out_dir, split, shard_size=shard_size, form=form, num_workers=num_workers))
    if not done:
        raise InputError(f"Expected samples to pack as {split} into {out_dir}. Got none: give at least one.")
    return [Path(out_dir) / shard.shard for shard in done]


def pack_shards(
    samples: Iterable[Sample], out_dir: str | Path, split: str, *, shard_size: int, form: Form, num_workers: int = 0
) -> Generator[PackedShard, None, None]:
    """Write the shards that are not there yet; the same samples give the same bytes, with any number of workers.

    Shard i holds the samples from ``i * shard_size`` on, less the bad ones, which its line in the manifest names. It is
    done when that line is there. A shard is written again if its samples or their form have changed, or if an image
    file is newer.

    Args:
        samples: samples in the order of the tars, with keys that differ. They are drawn when they are needed.
        out_dir: folder of the shards; shards of the same name are replaced.
        split: first part of the file names; train, val and heldout are read back as splits.
        shard_size: samples of a tar.
        form: how images are stored.
        num_workers: threads, each writing one shard at a time; 0 is this one.

    Yields:
        Shards in their order, once they are whole.

    Raises:
        InputError: an unfit key or form, or shards of an earlier, larger pack lie after the new ones.
        OSError: the disk is full or must not be written to; earlier shards are whole.
    """
    form.check()
    folder = Path(out_dir)
    manifest = folder / f"{split}.manifest.jsonl"
    before, done = read_packed(manifest), dict[str, PackedShard]()
    jobs = _jobs(samples, folder, split, shard_size, form)
    for packed, is_new in _packed(jobs, before, num_workers):
        done[packed.shard] = packed
        if is_new:
            with manifest.open("a") as file:  # a line that a kill cuts short is no line
                file.write(f"\n{json.dumps(packed._asdict())}")
        yield packed
    if done:
        write_text(manifest, "".join(f"{json.dumps(packed._asdict())}\n" for packed in done.values()))
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if stale := [name for name in names if re.fullmatch(rf"{re.escape(split)}-\d+\.tar", name) and name not in done]:
        raise InputError(
            f"{folder} holds {', '.join(stale)} of an earlier pack after the {len(done)} new: remove them."
        )


def read_packed(manifest: Path) -> dict[str, PackedShard]:
    """Read a pack's manifest by shard. A damaged line counts as none: its shard is packed again."""
    found = {}
    for line in manifest.read_bytes().splitlines() if manifest.is_file() else []:
        try:
            packed = PackedShard(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        found[str(packed.shard)] = packed
    return found


def require_good(source: str, shards: Sequence[PackedShard], max_bad_fraction: float, remarks: str = "") -> None:
    """Raise InputError where too many samples were bad, or no good one is left, with further remarks."""
    reasons = Counter({reason: 0 for shard in shards for reason in shard.skipped})
    for shard in shards:
        reasons.update({reason: len(names) for reason, names in shard.skipped.items()})
    good, bad = sum(shard.samples for shard in shards), reasons.total()
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    if good == 0:
        raise InputError(
            f"Expected images with captions in {source}. Got none that is usable ({named or 'it is empty'}). "
            f"{remarks}Check the folder and the table."
        )
    if bad > max_bad_fraction * (good + bad):
        raise InputError(
            f"{bad} of {good + bad} samples of {source} are bad ({named}), more than max_bad_fraction = "
            f"{max_bad_fraction}. {remarks}What is packed is kept, and its manifest names them: correct them, or run "
            "the same command with a larger --max_bad_fraction."
        )


def _jobs(samples: Iterable[Sample], folder: Path, split: str, shard_size: int, form: Form) -> Iterator[_Job]:
    stream, number = iter(samples), 0
    while chunk := list(islice(stream, shard_size)):
        yield _Job(folder / f"{split}-{number:06d}.tar", chunk, form, _recipe(chunk, form))
        number += 1


def _recipe(samples: list[Sample], form: Form) -> str:
    """Hash what goes into a shard; files count by their names, which are in ``extra``, wherever the folder lies."""
    digest = hashlib.blake2b(json.dumps(form).encode(), digest_size=16)
    for key, image, captions, extra in samples:
        digest.update(json.dumps([key, captions, extra], sort_keys=True).encode())
        if isinstance(image, np.ndarray):
            digest.update(str(image.shape).encode() + image.tobytes())
        elif isinstance(image, Image.Image):
            digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
        elif isinstance(image, bytes):
            digest.update(image)
    return digest.hexdigest()


def _is_done(job: _Job, packed: PackedShard | None) -> bool:
    """Say whether a line is of this job, its tar there, and no image newer. Images gone since do not matter."""
    try:
        tar = job.path.stat()
    except OSError:
        return False
    if packed is None or (packed.recipe, packed.size) != (job.recipe, tar.st_size):
        return False
    lost = {name for reason in (MISSING, UNREADABLE) for name in packed.skipped.get(reason, [])}
    files = [sample.image for sample in job.samples if _name(sample) in lost and isinstance(sample.image, Path)]
    if any(os.access(file, os.R_OK) for file in files):
        return False  # the wrong folder was named, or a drive or a permission was lacking
    return not any(_changed_ns(sample.image) >= tar.st_mtime_ns for sample in job.samples)


def _name(sample: Sample) -> str:
    """Return what a bad sample is called."""
    return str(sample.extra.get("file", sample.key))


def _changed_ns(image: object) -> int:
    if not isinstance(image, Path):
        return 0
    try:
        found = image.stat()
    except (OSError, ValueError):
        return 0
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _packed(
    jobs: Iterator[_Job], before: dict[str, PackedShard], num_workers: int
) -> Iterator[tuple[PackedShard, bool]]:
    """Yield shards in the jobs' order, and whether they are new. At most two jobs a worker are in memory."""
    stop = threading.Event()
    if num_workers == 0:
        for job in jobs:
            found = before.get(job.path.name)
            yield (found, False) if found and _is_done(job, found) else (_pack(job, stop), True)
        return
    waiting: deque[tuple[Future[PackedShard], bool]] = deque()
    # Threads suffice: Pillow decodes, resizes and encodes without the interpreter's lock.
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for job in jobs:
                found = before.get(job.path.name)
                done: Future[PackedShard] = Future()
                if found and _is_done(job, found):
                    done.set_result(found)
                    waiting.append((done, False))
                else:
                    waiting.append((pool.submit(_pack, job, stop), True))
                while waiting and (len(waiting) > 2 * num_workers or waiting[0][0].done()):
                    future, is_new = waiting.popleft()
                    yield future.result(), is_new
            for future, is_new in waiting:
                yield future.result(), is_new
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _pack(job: _Job, stop: threading.Event) -> PackedShard:
    """Write one shard. Its time is that of the start: an image that is newer may not be in it."""
    begin, count, keys = time.time_ns(), 0, set[str]()
    skipped: dict[str, list[str]] = {}
    with replacing(job.path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in job.samples:
                if stop.is_set():
                    raise CancelledError
                _check_key(sample.key, keys)
                try:
                    members = _members(sample, job.form)
                except BadSample as reason:
                    skipped.setdefault(str(reason), []).append(_name(sample))
                    continue
                for suffix, data in members:
                    info = tarfile.TarInfo(f"{sample.key}.{suffix}")  # time 0, user 0: nothing of this machine
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                count += 1
        size = temporary.stat().st_size
        os.utime(temporary, ns=(begin, begin))
    return PackedShard(job.path.name, count, size, job.recipe, skipped)


def _check_key(key: str, keys: set[str]) -> None:
    if not re.fullmatch(r"[^./\s\x00-\x1f\x7f]+", key):
        raise InputError(
            f"Expected a key without dots, slashes and spaces, since readers cut it at the first dot. Got {key!r}: "
            "rename it."
        )
    if key in keys:
        raise InputError(f"Expected different keys. Got {key!r} twice: rename one.")
    keys.add(key)


# --- One sample


def _members(sample: Sample, form: Form) -> list[tuple[str, bytes]]:
    """Return suffix and bytes of each file of a sample: image in its form, captions, JSON.

    Raises:
        BadSample: no usable image or caption.
        OSError: the disk cannot be read.
    """
    captions = _captions(sample.captions)
    meta = {"captions": captions, **sample.extra}
    return [
        _image(sample.image, form),
        ("txt", encode_text("\n".join(captions))),
        ("json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()),
    ]


def _captions(captions: list[str]) -> list[str]:
    """Return the usable captions, a line each."""
    lines = list(dict.fromkeys(" ".join(text.strip(EDGES).split()) for text in captions))
    good = [line for line in lines if line and not re.search("[\ud800-\udfff]", line)]
    if not good:
        raise BadSample("undecodable caption" if any(lines) else "no caption")
    if sum(len(encode_text(line)) + 1 for line in good) > MAX_TEXT:
        raise BadSample("caption too long")
    return good


def _image(image: Picture, form: Form) -> tuple[str, bytes]:
    """Return suffix and bytes of an image in its form."""
    if isinstance(image, BadSample):
        raise image
    if isinstance(image, Path):
        image = _read(image)
    if isinstance(image, bytes):
        suffix = suffix_of(image)
        if form.size is None and form.encode in (None, suffix):
            return suffix, image
        picture = decode_image(image)
    else:
        suffix, picture = "png", Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if form.size is not None:
        picture = (center_square if form.resize == "square" else scale_shorter)(picture, form.size)
    encode = form.encode or suffix
    if encode == "webp" and max(picture.size) > 16383:
        raise BadSample("image too large for WebP")
    buffer = io.BytesIO()
    options = {} if encode == "png" else {"quality": form.quality}
    picture.save(buffer, _FORMAT[encode], **options)
    return encode, buffer.getvalue()


def _read(path: Path) -> bytes:
    """Read a file; an error of the disk itself is no bad sample."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadSample("no plain file")
        if found.st_size > MAX_IMAGE:
            raise BadSample("image too large")
        return path.read_bytes()
    except BadSample:
        raise
    except PermissionError as error:
        raise BadSample(UNREADABLE) from error
    except ValueError as error:  # a NUL in the name
        raise BadSample(MISSING) from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BadSample(MISSING) from error
