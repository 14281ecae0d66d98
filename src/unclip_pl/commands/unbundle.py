"""``unclip unbundle``: a bundle as an ordinary run."""

from pathlib import Path

from unclip_pl.errors import InputError
from unclip_pl.generation.bundle import unbundle as write_run_of


def unbundle(paths: list[str]) -> None:
    """Write the files of a bundle into a folder, which is a run from then on.

    Args:
        paths: the bundle, and the folder to write, which must not exist.
    """
    if len(paths) != 2:
        raise InputError(f"Expected a bundle and a folder. Got {len(paths)}: write unclip unbundle base.zip runs/base.")
    write_run_of(Path(paths[0]), Path(paths[1]))
    print(f"wrote {paths[1]}")
