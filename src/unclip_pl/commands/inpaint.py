"""``unclip inpaint``: a part of a picture drawn again."""

from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from unclip_pl.commands.studio import CaptionOptions, Studio, check_files
from unclip_pl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: Drawings at once.
BATCH = 64


def inpaint(
    pictures: list[str],
    options: CaptionOptions,
    *,
    mask: str | None = None,
    canvas: PositiveFloat = 1.0,
    caption: str | None = None,
    num: PositiveInt = 1,
    jumps: NonNegativeInt = 0,
) -> None:
    """Draw a part of a picture again, or what lies around it, and keep the rest as it is.

    One drawing is the picture itself; several are a labelled grid.

    Args:
        pictures: one image file.
        options: options that commands share.
        mask: image file of the picture's shape, white where it is drawn again and black where it stays.
        canvas: side of a larger canvas in sides of the picture, such as 1.5. The picture lies in its middle; the rest
            is drawn after the caption.
        caption: what the whole picture should show; without it the part is drawn after what CLIP sees of the picture.
        num: number of drawings; each further one has the next seed.
        jumps: times that each step is taken back and walked again (RePaint), so that the new part fits the old one.
    """
    if len(pictures) != 1:
        raise InputError(f"Expected one image file. Got {len(pictures)}: name the picture that is drawn on.")
    if (mask is None) == (canvas == 1) or (mask is None and caption is None):
        named = {"--mask": mask is not None, "--canvas": canvas != 1, "--caption": caption is not None}
        got = " and ".join(name for name, there in named.items() if there) or "none of them"
        raise InputError(f"Expected --mask, or --canvas with --caption. Got {got}: give one of the two.")
    check_files([*pictures, *filter(None, [mask])])
    if caption is None and options.of_prior():
        raise InputError("Expected a caption for settings of a prior. Got none: give --caption, or leave them out.")
    with Studio("inpaint", options, pictures, also=[mask] if mask else []) as studio:
        from unclip_pl.generation.pictures import open_mask, refuse_transparent

        given = studio.pictures.pixels
        studio.warn_of_unknown([caption or ""])
        settings = studio.decoder_settings() | (studio.prior_settings() if caption is not None else {})
        settings |= {"num": num, "jumps": jumps, "seed": options.seed, "batch_size": BATCH}
        settings |= {"progress": studio.bar("drawing", ways=-(-num // BATCH))}
        texts = None if caption is None else [caption]
        if mask is None:
            hidden = given[0]
            images = studio.unclip.outpaint(given, texts or [""], canvas=canvas, **settings).images
        else:
            drawn = open_mask(mask, pictures[0], given.shape[-1])
            refuse_transparent(mask)
            share = drawn.float().mean().item()
            studio.say(f"{100 * share:.0f} % of the picture is drawn again, where {mask} is white.")
            if not share:
                studio.say(f"warning: {mask} has no white: nothing is drawn again.")
            hidden = given[0].masked_fill(drawn[0], 0.0)
            images = studio.unclip.inpaint(given, drawn, texts, **settings).images
        facts = {"pictures": studio.pictures.names[0], "caption": caption or "", "seed": options.seed, "jumps": jumps}
        facts |= options.of_decoder() | ({} if caption is None else {"prior": "diffusion"}) | options.of_prior()
        facts |= {} if mask else {"canvas": canvas}
        _save(studio, facts, given[0], hidden, images)


def _save(studio: Studio, facts: dict[str, Any], given: "Tensor", hidden: "Tensor", images: "Tensor") -> None:
    """Write one drawing, or a grid of what was given, what stays, and several."""
    if len(images) == 1:
        studio.save(studio.out, images[0], facts)
        studio.say(f"wrote {studio.out}")
        return
    seeds = [f"seed {facts['seed'] + i}" for i in range(len(images))]
    studio.save_grid([(facts["caption"], [given, hidden, *images])], ["given", "kept", *seeds], facts)
