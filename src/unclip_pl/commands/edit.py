"""``unclip edit``: text diffs."""

from jsonargparse.typing import ClosedUnitInterval

from unclip_pl.commands.studio import PictureOptions, Studio


def edit(
    pictures: list[str],
    caption: str,
    options: PictureOptions,
    *,
    current: str | None = None,
    thetas: tuple[ClosedUnitInterval, ...] = (0.0, 0.125, 0.25, 0.375, 0.5),
) -> None:
    """Change pictures by words: z_i is turned towards what sets one caption apart from another, and x_T stays.

    The file has one row per picture.

    Args:
        pictures: image files.
        caption: what the pictures should become.
        options: options that commands share.
        current: what the pictures are; without it they are turned towards the caption itself.
        thetas: fractions of the angle, such as --thetas "[0.25, 0.5]"; the paper goes up to between 0.25 and 0.5.
    """
    with Studio("edit", options, pictures) as studio:
        studio.warn_of_unknown([caption, current or ""])
        latent, given = studio.invert(), studio.pictures
        drawn = studio.manipulator.edit(
            latent, caption, current, thetas=thetas, seed=options.seed, progress=studio.bar("editing")
        )
        change = f"{current} → {caption}" if current else caption
        rows = [
            (f"{name}: {change}", [picture, *images])
            for name, picture, images in zip(
                given.names, given.pixels, drawn.unflatten(0, (-1, len(thetas))), strict=True
            )
        ]
        columns = ["given", *(f"θ = {theta:g}" for theta in thetas)]
        studio.save_grid(rows, columns, {"caption": caption, "current": current or "", "thetas": thetas})
