"""``unclip reconstruct``: pictures to their latents and back."""

from unclip_pl.commands.studio import Studio


def reconstruct(
    pictures: list[str],
    run: str | None = None,
    out: str = "reconstruct.png",
    *,
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw pictures again from their bipartite latents (z_i, x_T), and say how exactly.

    Args:
        pictures: image files.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file to write: each picture beside its reconstruction.
        steps: of DDIM, each way; more are more exact.
        guidance: of the decoder, both ways; 1 is off, and the most exact.
        seed: of the upsamplers, where the run has any.
        device: where to compute.
    """
    with Studio(run, device) as studio:
        given = studio.open(pictures)
        progress = studio.bar("there and back", ways=2)
        images, _, psnr = studio.unclip.reconstruct(
            given.pixels, steps=steps, guidance=guidance, seed=seed, progress=progress
        )
        labels = [f"{name}: {value:.1f} dB" for name, value in zip(given.names, psnr.tolist(), strict=True)]
        for label in labels:
            studio.say(label)
        rows = list(zip(labels, zip(given.pixels, images, strict=True), strict=True))
        facts: dict[str, object] = {"pictures": ", ".join(labels), "steps": steps, "guidance": guidance}
        studio.save_grid(out, rows, ["given", "drawn again"], facts)
