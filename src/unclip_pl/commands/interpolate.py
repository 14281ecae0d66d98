"""``unclip interpolate``: from one picture to another, or from one caption to another."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from unclip_pl.commands.studio import CaptionOptions, PictureOptions, RunOptions, Studio
from unclip_pl.errors import InputError

#: Label of each row.
LABELS: dict[Literal["inverted", "fixed"], str] = {"inverted": "x_T interpolated as well", "fixed": "one x_T for all"}
#: Endings of what is meant as a file, also where there is none.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class BetweenOptions(CaptionOptions):
    """Options of both ways. Between pictures guidance is 1 and steps are 100 where they are left out."""

    def of_pictures(self) -> PictureOptions:
        """Return the options of the way between pictures.

        Raises:
            InputError: an option is given that only captions have.
        """
        if self.solver is not None or self.of_prior():
            raise InputError("Expected two captions for options of a solver or a prior. Got pictures: leave them out.")
        shared = {field.name: getattr(self, field.name) for field in fields(RunOptions)}
        given = {name: value for name in ("steps", "guidance") if (value := getattr(self, name)) is not None}
        return PictureOptions(**shared, **given)


def interpolate(
    ends: list[str],
    options: BetweenOptions,
    *,
    num: PositiveInt = 9,
    noise: Literal["both", "inverted", "fixed"] = "both",
) -> None:
    """Draw what lies between two pictures or two captions, by spherical interpolation of their embeddings.

    Between pictures the file has one row for each way with the noise; between captions it has one.

    Args:
        ends: two image files, or two captions.
        options: options that commands share.
        num: pictures in a row, both ends among them.
        noise: inverted: x_T is interpolated too, from picture to picture. fixed: one drawn x_T for all, as in the
            paper's Fig. 4, and always between captions. both: a row of each.
    """
    if len(ends) != 2:
        raise InputError(f"Expected two image files or two captions. Got {len(ends)}: name the two ends.")
    if num < 2:
        raise InputError("Expected num >= 2, for the two ends. Got 1: ask for more pictures.")
    files = [_is_file(end) for end in ends]
    if any(files) and not all(files):
        raise InputError(
            f"Expected two image files or two captions. Got the file {ends[files.index(True)]} and the caption "
            f"{ends[files.index(False)]!r}: name two of a kind."
        )
    if files[0]:
        _between_pictures(ends, options.of_pictures(), num, noise)
    else:
        _between_captions(ends, options, num)


def _is_file(end: str) -> bool:
    return os.path.exists(end) or Path(end).suffix.lower() in ENDINGS  # a caption may be too long for Path.exists


def _between_pictures(
    pictures: list[str], options: PictureOptions, num: int, noise: Literal["both", "inverted", "fixed"]
) -> None:
    with Studio("interpolate", options, pictures) as studio:
        latent, given = studio.invert(), studio.pictures
        first, second = latent.at(slice(0, 1)), latent.at(slice(1, 2))
        rows = []
        for mode, label in LABELS.items():
            if noise in ("both", mode):
                path = studio.manipulator.interpolate(
                    first, second, num=num, noise=mode, seed=options.seed, progress=studio.bar(label)
                )
                rows.append((label, [given.pixels[0], *path, given.pixels[1]]))
        columns = [given.names[0], *(f"{i / (num - 1):.2g}" for i in range(num)), given.names[1]]
        studio.save_grid(rows, columns, {"noise": noise})


def _between_captions(captions: list[str], options: BetweenOptions, num: int) -> None:
    with Studio("interpolate", options) as studio:
        studio.warn_of_unknown(captions)
        settings = studio.decoder_settings() | studio.prior_settings()
        images = studio.manipulator.between_captions(
            *captions, num=num, seed=options.seed, progress=studio.bar("drawing"), **settings
        )
        facts = {"captions": "\n".join(captions), "seed": options.seed, "prior": "diffusion"}
        columns = [f"{i / (num - 1):.2g}" for i in range(num)]
        rows = [(" → ".join(captions), list(images))]
        studio.save_grid(rows, columns, facts | options.of_decoder() | options.of_prior())
