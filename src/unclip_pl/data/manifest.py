"""The manifest of an embedding store: one JSON line per source shard, written after the shard's file is whole."""

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from unclip_pl.data.atomic import replacing, sha256

NAME = "manifest.jsonl"


class ShardRecord(NamedTuple):
    """What the store knows of one source shard. A shard is done when its record is in the manifest."""

    shard: str  # file name of the tar
    source_size: int  # bytes
    source_mtime_ns: int
    source_sha256: str
    file: str  # in the store's folder
    sha256: str  # of that file
    clip: str  # fingerprint
    images: int
    captions: int  # distinct ones
    dtype: str
    skipped: dict[str, int]  # bad samples by reason; their keys are in the file's metadata
    version: str  # of unclip_pl

    def describes(self, shard: Path) -> bool:
        """Whether the tar is the one that was embedded: by size and time, or else by its hash."""
        stat = shard.stat()
        if stat.st_size != self.source_size:
            return False
        return stat.st_mtime_ns == self.source_mtime_ns or sha256(shard) == self.source_sha256


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
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = ShardRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no shard record ({error}): delete the line and run `unclip precompute`, "
                "which makes that shard again."
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
        raise ValueError(
            f"Embeddings in {store} were made by CLIP {foreign[0]!r}, but this run uses {fingerprint!r}. Run "
            "`unclip precompute` with another --store for it (and name that as data.store), or change the clip."
        )
