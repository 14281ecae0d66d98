"""``unclip interpolate``: from one picture to another."""

from typing import Literal

from jsonargparse.typing import PositiveInt

from unclip_pl.commands.studio import PictureOptions, Studio
from unclip_pl.errors import InputError

#: Label of each row.
LABELS: dict[Literal["inverted", "fixed"], str] = {"inverted": "x_T interpolated as well", "fixed": "one x_T for all"}


def interpolate(
    pictures: list[str],
    options: PictureOptions,
    *,
    num: PositiveInt = 9,
    noise: Literal["both", "inverted", "fixed"] = "both",
) -> None:
    """Draw what lies between two pictures, by spherical interpolation of their embeddings.

    The file has one row for each way with the noise.

    Args:
        pictures: two image files.
        options: options that commands share.
        num: pictures in a row, both ends among them.
        noise: inverted: x_T is interpolated too, from picture to picture. fixed: one drawn x_T for all, as in the
            paper's Fig. 4. both: a row of each.
    """
    if len(pictures) != 2:
        raise InputError(f"Expected two image files. Got {len(pictures)}: name the two ends.")
    if num < 2:
        raise InputError("Expected num >= 2, for the two ends. Got 1: ask for more pictures.")
    with Studio("interpolate", options, pictures) as studio:
        latent, given = studio.invert(), studio.pictures
        ends = latent.at(slice(0, 1)), latent.at(slice(1, 2))
        rows = []
        for mode, label in LABELS.items():
            if noise in ("both", mode):
                path = studio.manipulator.interpolate(
                    *ends, num=num, noise=mode, seed=options.seed, progress=studio.bar(label)
                )
                rows.append((label, [given.pixels[0], *path, given.pixels[1]]))
        columns = [given.names[0], *(f"{i / (num - 1):.2g}" for i in range(num)), given.names[1]]
        studio.save_grid(rows, columns, {"noise": noise})
