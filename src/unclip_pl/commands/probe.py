"""``unclip probe``: what the first few dimensions of an embedding hold."""

from unclip_pl.commands.studio import Studio


def probe(
    pictures: list[str],
    run: str | None = None,
    out: str = "probe.png",
    *,
    dims: tuple[int, ...] = (),
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw pictures from ever more principal dimensions of what CLIP sees in them, all from one x_T.

    Args:
        pictures: image files.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file to write: one row per picture.
        dims: numbers of dimensions, such as --dims "[1, 8, 64]"; none given: the powers of two, and all.
        steps: of DDIM.
        guidance: of the decoder; 1 is off.
        seed: of x_T.
        device: where to compute.
    """
    with Studio(run, device) as studio:
        unclip, given = studio.unclip, studio.open(pictures)
        shown = unclip.dims(dims or None)
        z_i = unclip.clip.encode_image(given.pixels.to(unclip.device))
        drawn = unclip.probe(z_i, dims=shown, steps=steps, guidance=guidance, seed=seed, progress=studio.bar("drawing"))
        rows = [
            (name, [picture, *images])
            for name, picture, images in zip(
                given.names, given.pixels, drawn.unflatten(0, (-1, len(shown))), strict=True
            )
        ]
        facts = {"pictures": ", ".join(given.names), "dims": shown, "seed": seed, "steps": steps, "guidance": guidance}
        studio.save_grid(out, rows, ["given", *map(str, shown)], facts)
