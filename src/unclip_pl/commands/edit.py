"""``unclip edit``: text diffs."""

from unclip_pl.commands.studio import Studio


def edit(
    pictures: list[str],
    caption: str,
    run: str | None = None,
    out: str = "edit.png",
    *,
    current: str | None = None,
    thetas: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5),
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Change pictures by words: z_i is turned towards what sets one caption apart from another, x_T stays.

    Args:
        pictures: image files.
        caption: what they shall be.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file to write: one row per picture.
        current: a caption of what they are; without it they are turned towards the caption itself.
        thetas: how far, 0 to 1 of the angle; the paper goes up to between 0.25 and 0.5. Such as --thetas "[0.25, 0.5]".
        steps: of DDIM, each way.
        guidance: of the decoder, both ways; 1 is off.
        seed: of the upsamplers, where the run has any.
        device: where to compute.
    """
    with Studio(run, device) as studio:
        from unclip_pl.generation.manipulation import check_thetas

        check_thetas(thetas)
        unclip, given = studio.unclip, studio.open(pictures)
        studio.warn_of_unknown([caption, current or ""])
        latent = unclip.invert(given.pixels, steps=steps, guidance=guidance, progress=studio.bar("inverting"))
        drawn = unclip.edit(latent, caption, current, thetas=thetas, seed=seed, progress=studio.bar("editing"))
        change = f"{current} → {caption}" if current else caption
        rows = [
            (f"{name}: {change}", [picture, *images])
            for name, picture, images in zip(
                given.names, given.pixels, drawn.unflatten(0, (-1, len(thetas))), strict=True
            )
        ]
        columns = ["given", *(f"θ = {theta:g}" for theta in thetas)]
        facts = {"pictures": ", ".join(given.names), "caption": caption, "current": current or "", "thetas": thetas}
        studio.save_grid(out, rows, columns, facts | {"seed": seed, "steps": steps, "guidance": guidance})
