"""A bundle: the files of a run in one zip. They are safetensors, JSON and a model card, so nothing in it can run.

The rest of the package knows folders alone: a bundle is unpacked before anything in it is read.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import replacing, require_format, require_unpacked
from unclip_pl.parts.loading import check_classes

#: Version of the layout described here.
FORMAT = 1
#: Member that says where the weights come from, and which tokens their CLIP knows.
NOTES = "bundle.json"
#: Errors of the formats inside.
_BROKEN = (zipfile.BadZipFile, zlib.error, SafetensorError)
#: Most bytes that a bundle may unpack to: this many times its own size, and a token table of zeros beside it.
GROWTH, TABLE = 10, 2**28


def write_bundle(path: Path, folder: Path, notes: Mapping[str, Any]) -> None:
    """Write the zip of a folder's files.

    Args:
        path: zip file to write.
        folder: folder with ``run.json``, the safetensors files that it names, and the model card.
        notes: origin of the weights, and the known ``tokens``, as JSON has it.
    """
    contents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    contents[NOTES] = json.dumps({"format": FORMAT, **notes}, indent=2).encode()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def unpack(bundle: Path, folder: Path) -> None:
    """Write the files of a bundle into a folder.

    Args:
        bundle: zip file, perhaps somebody else's.
        folder: folder to write into, which exists.

    Raises:
        InputError: the file is no bundle, is damaged, has another format, grows too much, or names a class that is not
            ours.
    """
    try:
        require_unpacked(bundle, "a bundle")
        with zipfile.ZipFile(bundle) as archive:
            _check_members(archive.infolist(), bundle)
            require_format(json.loads(archive.read(NOTES)).get("format"), FORMAT, bundle)
            for member in (member for member in archive.infolist() if not member.is_dir()):
                path = folder / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
        check_classes(json.loads((folder / "run.json").read_text(encoding="utf-8")))
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".json", ".md"):
                with safe_open(path, "pt"):  # a pickle gets no further
                    pass
    except InputError:
        raise
    # Zip and its compressions, encryption, missing members, JSON, safetensors.
    except (*_BROKEN, EOFError, RuntimeError, KeyError, ValueError, AttributeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{bundle} is no bundle of a run, or damaged ({reason:.200}): make one with `unclip bundle RUN`."
        ) from error


def _check_members(members: list[zipfile.ZipInfo], bundle: Path) -> None:
    """Refuse names that lead out of the folder, or twice to one file, and sizes that would fill the disk."""
    for member in members:
        path = PurePosixPath(member.filename)
        name = member.filename.removesuffix("/") if member.is_dir() else member.filename
        strange = path.as_posix() != name or any(sign in name for sign in "\\:")
        if strange or path.is_absolute() or ".." in path.parts:
            raise InputError(f"{bundle} holds a file {member.filename!r:.200}, outside of its folder: do not use it.")
    if len({member.filename.casefold() for member in members}) < len(members):
        raise InputError(f"{bundle} holds two files of one name: do not use it.")
    if sum(member.file_size for member in members) > GROWTH * bundle.stat().st_size + TABLE:
        raise InputError(f"{bundle} would unpack to more than {GROWTH} times its size: do not use it.")


def unbundle(bundle: Path, run: Path) -> None:
    """Make an ordinary run of a bundle, whole or not at all.

    Args:
        bundle: zip file.
        run: folder to write, which must not exist.

    Raises:
        InputError: the bundle is missing or damaged, or there is something at ``run``.
    """
    if not bundle.is_file():
        raise MissingFileError(f"No bundle at {bundle}: make one with `unclip bundle RUN`.")
    if run.exists():
        raise InputError(f"{run} exists already: name another folder.")
    run.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as folder:
        (whole := Path(folder) / run.name).mkdir()
        unpack(bundle, whole)
        whole.rename(run)


def read_notes(run: Path) -> dict[str, Any]:
    """Return the notes of an unpacked bundle: ``run``, ``commits``, ``tokens``, …; empty for a run trained here.

    Raises:
        InputError: they are damaged.
    """
    path = run / NOTES
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): unbundle the run again, or delete the file.") from error
