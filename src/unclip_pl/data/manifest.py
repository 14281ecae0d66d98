"""The manifest of an embedding store: one JSON line per source shard, as in the head of the shard's file."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from unclip_pl.data.shards import Split, split_of_file
from unclip_pl.data.sources import UNKNOWN, Shard
from unclip_pl.errors import InputError
from unclip_pl.files import replacing, sha256

NAME = "manifest.jsonl"


class ShardRecord(NamedTuple):
    """What the store knows of one source shard; nothing in it is of this machine or of the time of the run."""

    shard: str  # file name of the tar
    source_size: int  # bytes
    source_mark: str  # of a remote tar, see `Stamp`
    source_sha256: str
    file: str  # in the store's folder
    sha256: str  # of what that file holds, see `checksum`
    clip: str  # fingerprint
    images: int
    splits: list[int]  # images of each `Split`, in that order, which is their order in the file
    captions: int  # distinct ones
    dtype: str
    skipped: dict[str, int]  # bad samples by reason; their keys are in the file's metadata
    version: str  # of unclip_pl

    def describes(self, shard: Shard, file: Path) -> bool:
        """Whether the tar is the one that was embedded.

        A local tar that was touched after its features were written is read again; if it is the same after all, its
        features are touched, so that this happens once.

        Args:
            shard: as it is now.
            file: the features.
        """
        if shard.remote:
            stamp = shard.stamp()
            return stamp.mark == self.source_mark and stamp.size in (self.source_size, UNKNOWN)
        stat = shard.path.stat()
        if stat.st_size != self.source_size:
            return False
        if max(stat.st_mtime_ns, stat.st_ctime_ns) < file.stat().st_mtime_ns:
            return True
        looked_ns = time.time_ns()
        same = sha256(shard.path) == self.source_sha256
        if same:
            with suppress(OSError):  # a store that this user may only read
                os.utime(file, ns=(looked_ns, looked_ns))
        return same


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """A line of before splits and remote shards, when a shard's name told its split."""
    split = split_of_file(values.get("shard", ""))
    if "splits" not in values and split is not None:
        values["splits"] = [values.get("images", 0) if split == each else 0 for each in Split]
        values["source_mark"] = ""
        values.pop("source_mtime_ns", None)
    return values


def tool_version() -> str:
    """Version of the installed package."""
    try:
        return version("unclip_pl")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def read_manifest(store: Path) -> dict[str, ShardRecord]:
    """Records by shard name; none where there is no store yet.

    Raises:
        ValueError: a line that is no record.
    """
    path = store / NAME
    records: dict[str, ShardRecord] = {}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = ShardRecord(**_completed(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number} is no shard record ({error}): delete the manifest and run `unclip precompute`, "
                "which makes it again from the files beside it."
            ) from error
        records[record.shard] = record
    return records


def write_manifest(store: Path, records: Iterable[ShardRecord]) -> None:
    """Put a new manifest in the old one's place, sorted by shard name."""
    lines = [json.dumps(record._asdict()) + "\n" for record in sorted(records, key=lambda record: record.shard)]
    with replacing(store / NAME) as temporary:
        temporary.write_text("".join(lines))


def require_one_clip(store: Path, records: Iterable[ShardRecord], fingerprint: str) -> None:
    """Raise ValueError where the store holds another CLIP's embeddings."""
    foreign = sorted({record.clip for record in records} - {fingerprint})
    if foreign:
        raise InputError(
            f"Embeddings in {store} were made by CLIP {foreign[0]!r}, but this run uses {fingerprint!r}. Run "
            "`unclip precompute` with another --store for it (and name that as data.store), or change the clip."
        )
