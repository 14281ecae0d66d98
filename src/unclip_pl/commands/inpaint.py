"""``unclip inpaint``: a part of a picture drawn again."""

from jsonargparse.typing import NonNegativeInt, PositiveInt

from unclip_pl.commands.studio import CaptionOptions, Studio, check_files
from unclip_pl.errors import InputError


def inpaint(
    pictures: list[str],
    mask: str,
    options: CaptionOptions,
    *,
    caption: str | None = None,
    num: PositiveInt = 1,
    jumps: NonNegativeInt = 0,
) -> None:
    """Draw a part of a picture again, and keep the rest as it is.

    One drawing is the picture itself; several are a labelled grid.

    Args:
        pictures: one image file.
        mask: image file of the picture's shape, white where it is drawn again and black where it stays.
        options: options that commands share.
        caption: what the whole picture shall show; without it the part is drawn after what CLIP sees of the picture.
        num: drawings; the next has the next seed.
        jumps: times that each step is taken back and walked again (RePaint), so that the new part fits the old one.
    """
    if len(pictures) != 1:
        raise InputError(f"Expected one image file. Got {len(pictures)}: name the picture that the mask belongs to.")
    check_files([*pictures, mask])
    if caption is None and options.of_prior():
        raise InputError("Expected a caption for settings of a prior. Got none: give --caption, or leave them out.")
    with Studio("inpaint", options, pictures) as studio:
        from unclip_pl.generation.pictures import open_mask

        given = studio.pictures.pixels
        drawn = open_mask(mask, pictures[0], given.shape[-1])
        if not drawn.any():
            studio.say(f"warning: {mask} has no white: nothing is drawn again.")
        studio.warn_of_unknown([caption or ""])
        settings = studio.decoder_settings() | (studio.prior_settings() if caption is not None else {})
        images = studio.unclip.inpaint(
            given,
            drawn,
            None if caption is None else [caption],
            num=num,
            jumps=jumps,
            seed=options.seed,
            progress=studio.bar("drawing", ways=-(-num // 64)),
            **settings,
        ).images
        facts = {"pictures": studio.pictures.names[0], "caption": caption or "", "seed": options.seed, "jumps": jumps}
        facts |= options.of_decoder() | options.of_prior()
        if num == 1:
            studio.save(studio.out, images[0], facts)
            studio.say(f"wrote {studio.out}")
            return
        seeds = [f"seed {options.seed + i}" for i in range(num)]
        hidden = given[0].masked_fill(drawn[0], 0.0)
        studio.save_grid([(caption or "", [given[0], hidden, *images])], ["given", "kept", *seeds], facts)
