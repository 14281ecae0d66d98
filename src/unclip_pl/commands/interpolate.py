"""``unclip interpolate``: from one picture to another."""

from typing import Literal

from unclip_pl.commands.studio import Studio
from unclip_pl.errors import InputError

#: How a row is called.
LABELS: dict[Literal["inverted", "fixed"], str] = {"inverted": "x_T interpolated as well", "fixed": "one x_T for all"}


def interpolate(
    pictures: list[str],
    run: str | None = None,
    out: str = "interpolate.png",
    *,
    num: int = 9,
    noise: Literal["both", "inverted", "fixed"] = "both",
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draw what lies between two pictures, by spherical interpolation of their embeddings.

    Args:
        pictures: two image files.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file to write: one row for each way with the noise.
        num: pictures in a row, both ends among them.
        noise: inverted: x_T is interpolated too, from picture to picture. fixed: one drawn x_T for all, as in the
            paper's Fig. 4. both: a row of each.
        steps: of DDIM, each way.
        guidance: of the decoder, both ways; 1 is off.
        seed: of the fixed x_T.
        device: where to compute.
    """
    if len(pictures) != 2:
        raise InputError(f"Expected two image files. Got {len(pictures)}.")
    if num < 2:
        raise InputError(f"Expected num >= 2, for the two ends. Got {num}.")
    with Studio(run, device) as studio:
        unclip, given = studio.unclip, studio.open(pictures)
        latent = unclip.invert(given.pixels, steps=steps, guidance=guidance, progress=studio.bar("inverting"))
        ends = latent.at(slice(0, 1)), latent.at(slice(1, 2))
        rows = []
        for mode, label in LABELS.items():
            if noise in ("both", mode):
                path = unclip.interpolate(*ends, num=num, noise=mode, seed=seed, progress=studio.bar(label))
                rows.append((label, [given.pixels[0], *path, given.pixels[1]]))
        columns = [given.names[0], *(f"{i / (num - 1):.2g}" for i in range(num)), given.names[1]]
        facts = {"pictures": ", ".join(given.names), "seed": seed, "steps": steps, "guidance": guidance}
        studio.save_grid(out, rows, columns, facts)
