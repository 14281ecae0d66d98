"""Samples → source shards: by several processes, the same bytes for the same input, going on where it stopped."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip_pl.data.members import Form, members_of
from unclip_pl.data.transforms import BadSample
from unclip_pl.errors import InputError
from unclip_pl.files import replacing
from unclip_pl.packing.samples import Sample

AS_THEY_ARE = Form()


class PackedShard(NamedTuple):
    """One shard of a pack: a line of its manifest."""

    shard: str  # file name of the tar
    samples: int
    size: int  # bytes of the tar
    recipe: str  # hash of what went in: keys, captions, names or pixels of the images, and their form
    skipped: dict[str, list[str]]  # names of the bad samples by reason


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
        The shards.

    Raises:
        ValueError: see :func:`pack_shards`, or no samples.
    """
    done = list(pack_shards(samples, out_dir, split, shard_size=shard_size, form=form, num_workers=num_workers))
    if not done:
        raise InputError(f"Expected samples to pack as {split} into {out_dir}. Got none.")
    return [Path(out_dir) / shard.shard for shard in done]


def pack_shards(
    samples: Iterable[Sample], out_dir: str | Path, split: str, *, shard_size: int, form: Form, num_workers: int = 0
) -> Generator[PackedShard, None, None]:
    """Write the shards that are not there yet; the same samples give the same bytes, with any number of processes.

    Shard i holds the samples from ``i * shard_size`` on, less the bad ones, which its line in the manifest names. It is
    done when that line is there. Done again is what has other samples or another form now, and what an image file is
    newer than.

    Args:
        samples: in the order of the tars, with keys that differ. Drawn as they are needed.
        out_dir: folder; shards of that name are replaced.
        split: first part of the file names; train, val and heldout are read back as splits.
        shard_size: samples of a tar.
        form: of the images.
        num_workers: processes, each writing one shard at a time; 0 is this one.

    Yields:
        Shards in their order, once they are whole.

    Raises:
        ValueError: an unfit key or form, or shards of an earlier, larger pack lie after the new ones.
        OSError: the disk is full or must not be written to; earlier shards are whole.
    """
    form.check()
    if shard_size < 1:
        raise InputError(f"Expected a shard_size of at least 1. Got {shard_size}.")
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
        with replacing(manifest) as temporary:
            temporary.write_text("".join(f"{json.dumps(packed._asdict())}\n" for packed in done.values()))
    if stale := sorted(path.name for path in folder.glob(f"{split}-*.tar") if path.name not in done):
        raise InputError(
            f"{folder} holds {', '.join(stale)} of an earlier pack after the {len(done)} new: remove them."
        )


def read_packed(manifest: Path) -> dict[str, PackedShard]:
    """What a pack's manifest says, by shard; a damaged line is as good as none, and its shard is packed again."""
    found = {}
    for line in manifest.read_bytes().splitlines() if manifest.is_file() else []:
        try:
            packed = PackedShard(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        found[str(packed.shard)] = packed
    return found


def require_good(source: str, shards: Sequence[PackedShard], max_bad_fraction: float) -> None:
    """Raise ValueError where too many samples were bad, or no good one is left."""
    reasons = Counter({reason: 0 for shard in shards for reason in shard.skipped})
    for shard in shards:
        reasons.update({reason: len(names) for reason, names in shard.skipped.items()})
    good, bad = sum(shard.samples for shard in shards), reasons.total()
    named = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    if good == 0:
        raise InputError(
            f"Expected images with captions in {source}. Got none that is usable ({named or 'it is empty'})."
        )
    if bad > max_bad_fraction * (good + bad):
        raise InputError(
            f"{bad} of {good + bad} samples of {source} are bad ({named}), more than max_bad_fraction = "
            f"{max_bad_fraction}. What is packed is kept, and its manifest names them: mend them, or run the same "
            "command with a larger --max_bad_fraction."
        )


def _jobs(samples: Iterable[Sample], folder: Path, split: str, shard_size: int, form: Form) -> Iterator[_Job]:
    stream, number = iter(samples), 0
    while chunk := list(islice(stream, shard_size)):
        yield _Job(folder / f"{split}-{number:06d}.tar", chunk, form, _recipe(chunk, form))
        number += 1


def _recipe(samples: list[Sample], form: Form) -> str:
    """Of what goes into a shard; files by their names, which are in ``extra``, wherever the folder lies."""
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
    """Whether that line is of this job, its tar there, and no image newer. Images gone since do not matter."""
    try:
        tar = job.path.stat()
    except OSError:
        return False
    if packed is None or (packed.recipe, packed.size) != (job.recipe, tar.st_size):
        return False
    return not any(_changed_ns(sample.image) >= tar.st_mtime_ns for sample in job.samples)


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
    """In the jobs' order, and whether they are new. At most two jobs a process are in memory."""
    if num_workers == 0:
        for job in jobs:
            found = before.get(job.path.name)
            yield (found, False) if found and _is_done(job, found) else (_pack(job), True)
        return
    waiting: deque[tuple[PackedShard | None, Future[PackedShard] | None]] = deque()
    with _processes(num_workers) as pool:
        for job in jobs:
            found = before.get(job.path.name)
            waiting.append((found, None) if _is_done(job, found) else (None, pool.submit(_pack, job)))
            while waiting and (len(waiting) > 2 * num_workers or _is_ready(waiting[0][1])):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _is_ready(future: Future[PackedShard] | None) -> bool:
    return future is None or future.done()


def _result(found: PackedShard | None, future: Future[PackedShard] | None) -> tuple[PackedShard, bool]:
    if found is not None:
        return found, False
    assert future is not None
    return future.result(), True


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Workers that end with this process, however it ends, and at once when it is interrupted."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)  # a fork would copy held locks
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                "A worker process was ended from outside, as a system short of memory does. Earlier shards are whole: "
                "run the same command with fewer --num_workers or a smaller --shard_size."
            ) from error
        raise
    finally:
        pool.shutdown()


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's to answer; its SIGTERM, or its death, ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # tidies up on the way out
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _pack(job: _Job) -> PackedShard:
    """Write one shard. Its time is that of the start: an image that is newer may not be in it."""
    begin, count, keys = time.time_ns(), 0, set[str]()
    skipped: dict[str, list[str]] = {}
    with replacing(job.path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in job.samples:
                _check_key(sample.key, keys)
                try:
                    members = members_of(sample, job.form)
                except BadSample as reason:
                    skipped.setdefault(str(reason), []).append(str(sample.extra.get("file", sample.key)))
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
            f"Expected a key without dots, slashes and spaces: readers cut it at the first dot. Got {key!r}."
        )
    if key in keys:
        raise InputError(f"Expected different keys. Got {key!r} twice.")
    keys.add(key)
