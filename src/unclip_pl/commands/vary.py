"""``unclip vary``: variations of pictures."""

from unclip_pl.commands.studio import Studio


def vary(
    pictures: list[str],
    run: str | None = None,
    out: str = "vary.png",
    *,
    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num: int = 1,
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw variations of pictures: what CLIP sees in them stays, and the more eta, the more of the rest changes.

    Args:
        pictures: image files.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file to write: one row per picture.
        etas: from 0, the picture itself, to 1; such as --etas "[0.5, 1]".
        num: variations of each picture at each eta.
        steps: of DDIM, each way.
        guidance: of the decoder, both ways; 1 is off.
        seed: the same seed gives the same variations.
        device: where to compute.
    """
    with Studio(run, device) as studio:
        from unclip_pl.diffusion import check_eta

        etas = tuple(map(check_eta, etas))
        unclip, given = studio.unclip, studio.open(pictures)
        latent = unclip.invert(given.pixels, steps=steps, guidance=guidance, progress=studio.bar("inverting"))
        drawn = [
            unclip.vary(latent, num=num, eta=eta, seed=seed, progress=studio.bar(f"eta {eta:g}")).unflatten(
                0, (-1, num)
            )
            for eta in etas
        ]
        rows = [
            (name, [given.pixels[row], *(image for images in drawn for image in images[row])])
            for row, name in enumerate(given.names)
        ]
        columns = ["given", *(f"η = {eta:g}" for eta in etas for _ in range(num))]
        facts = {"pictures": ", ".join(given.names), "etas": etas, "seed": seed, "steps": steps, "guidance": guidance}
        studio.save_grid(out, rows, columns, facts)
