"""``unclip vary``: variations of pictures."""

from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from unclip_pl.commands.studio import PictureOptions, Studio


def vary(
    pictures: list[str],
    options: PictureOptions,
    *,
    etas: tuple[ClosedUnitInterval, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num: PositiveInt = 1,
) -> None:
    """Draw variations of pictures: what CLIP sees in them stays, and the more eta, the more of the rest changes.

    The file has one row per picture.

    Args:
        pictures: image files.
        options: options that commands share.
        etas: values of DDIM's eta from 0, the picture itself, to 1; such as --etas "[0.5, 1]".
        num: variations of each picture at each eta.
    """
    with Studio("vary", options, pictures) as studio:
        latent, given = studio.invert(), studio.pictures
        drawn = [
            studio.manipulator.vary(
                latent, num=num, eta=eta, seed=options.seed, progress=studio.bar(f"eta {eta:g}")
            ).unflatten(0, (-1, num))
            for eta in etas
        ]
        rows = [
            (name, [given.pixels[row], *(image for images in drawn for image in images[row])])
            for row, name in enumerate(given.names)
        ]
        studio.save_grid(rows, ["given", *(f"η = {eta:g}" for eta in etas for _ in range(num))], {"etas": etas})
