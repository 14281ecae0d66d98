"""``unclip export diffusers``: a run for other people's tools."""

from pathlib import Path

from unclip_pl.errors import InputError
from unclip_pl.interop.export import write_diffusers


def diffusers(paths: list[str]) -> None:
    """Write a run as a folder that diffusers loads as UnCLIPPipeline, where its networks have Karlo's shape.

    Args:
        paths: the run's folder, or a bundle, and the folder to write.
    """
    if len(paths) != 2:
        raise InputError(
            f"Expected a run and a folder. Got {len(paths)} paths: write unclip export diffusers RUN FOLDER."
        )
    print("\n".join(write_diffusers(Path(paths[0]), Path(paths[1]))))


COMMANDS = {"diffusers": diffusers}
