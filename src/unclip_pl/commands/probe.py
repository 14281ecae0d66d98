"""``unclip probe``: what the first few dimensions of an embedding hold."""

from jsonargparse.typing import PositiveInt

from unclip_pl.commands.studio import PictureOptions, Studio


def probe(pictures: list[str], options: PictureOptions, *, dims: tuple[PositiveInt, ...] = ()) -> None:
    """Draw pictures from more and more principal dimensions of what CLIP sees in them, all from one x_T.

    The file has one row per picture.

    Args:
        pictures: image files.
        options: options that commands share.
        dims: numbers of dimensions, such as --dims "[1, 8, 64]"; without it, the powers of two, and all.
    """
    with Studio("probe", options, pictures) as studio:
        manipulator, given = studio.manipulator, studio.pictures
        shown = manipulator.dims(dims or None)
        drawn = manipulator.probe(
            studio.unclip.clip.encode_image(given.pixels.to(options.device)),
            dims=shown,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            progress=studio.bar("drawing"),
        )
        rows = [
            (name, [picture, *images])
            for name, picture, images in zip(
                given.names, given.pixels, drawn.unflatten(0, (-1, len(shown))), strict=True
            )
        ]
        studio.save_grid(rows, ["given", *map(str, shown)], {"dims": shown})
