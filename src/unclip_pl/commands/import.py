"""``unclip import karlo``: a run of somebody else's checkpoints."""

from pathlib import Path

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.interop.files import read_karlo
from unclip_pl.interop.runs import write_karlo


def karlo(
    paths: list[str],
    out: str = "runs/karlo",
    *,
    clip: ClipSpec = ClipSpec("ViT-L-14-quickgelu", "openai"),  # noqa: B008 (frozen)
) -> None:
    """Make a run of Karlo's checkpoints, in its own layout or diffusers'.

    Args:
        paths: Karlo's prior, decoder and improved-sr checkpoints and its ViT-L-14_stats.th, or the folder of diffusers'
            UnCLIPPipeline.
        out: folder to write, without a run so far.
        clip: CLIP that conditions Karlo: OpenAI's ViT-L/14, downloaded by open_clip unless a file is named.
    """
    if not paths:
        raise InputError(
            "Expected Karlo's files, or diffusers' folder. Got none: write unclip import karlo DIR --out runs/karlo."
        )
    files = read_karlo(paths)
    for line in write_karlo(files, Path(out), clip):
        print(line)


COMMANDS = {"karlo": karlo}
