"""``unclip reconstruct``: pictures to their latents and back."""

from unclip_pl.commands.studio import PictureOptions, Studio


def reconstruct(pictures: list[str], options: PictureOptions) -> None:
    """Draw pictures again from their bipartite latents (z_i, x_T), and say how exactly.

    The file shows each picture beside its reconstruction.

    Args:
        pictures: image files.
        options: options that commands share.
    """
    with Studio("reconstruct", options, pictures) as studio:
        given = studio.pictures
        images, _, psnr = studio.manipulator.reconstruct(
            given.pixels,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            progress=studio.bar("there and back", ways=2),
        )
        labels = [f"{name}: {value:.1f} dB" for name, value in zip(given.names, psnr.tolist(), strict=True)]
        for label in labels:
            studio.say(label)
        rows = list(zip(labels, zip(given.pixels, images, strict=True), strict=True))
        studio.save_grid(rows, ["given", "drawn again"], {"pictures": ", ".join(labels)})
