"""``unclip import``: a run of somebody else's checkpoints, or a store of somebody else's embeddings."""

from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.interop.embeddings import Columns, import_embeddings
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


def embeddings(
    paths: list[str],
    out: str,
    *,
    image_column: str = "img_emb",
    text_column: str = "text_emb",
    caption_column: str = "caption",
    max_bad_fraction: ClosedUnitInterval = 0.01,
) -> None:
    """Make a store of embeddings that exist already. Run again, it goes on where it stopped.

    The two sides may come from different models, of different widths. Rows belong together by their position; of two
    folders whose metadata both have a column key or image_path, by that.

    Args:
        paths: folder of a dump by clip-retrieval or of LAION (img_emb_*.npy, text_emb_*.npy, metadata_*.parquet); or
            two such folders, the images' first; or two .npy files in that order.
        out: folder of the store.
        image_column: name of the files of z_i. To learn z_t from z_i, give the two names the other way round.
        text_column: name of the files of z_t.
        caption_column: column of the metadata with the captions; empty reads none.
        max_bad_fraction: largest share of rows that cannot be used: with NaN, all zeros, or without a partner.

    Raises:
        MissingFileError: a path or a side is not there.
        InputError: a file is damaged, files do not fit each other, too many rows are bad, or the store holds others.
    """
    for line in import_embeddings(
        paths, Path(out), Columns(image_column, text_column, caption_column), max_bad_fraction
    ):
        print(line)


COMMANDS = {"karlo": karlo, "embeddings": embeddings}
