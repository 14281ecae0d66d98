"""Make the pictures of these pages from the weights in the package; made again, they are the same bytes.

Run it as ``python docs/pictures.py``, from the folder of the project. It takes a minute of one core.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.generation.manipulation import Manipulator, turn
from unclip_pl.generation.pictures import grid, save_png, to_image
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.shapes.captions import caption
from unclip_pl.shapes.render import VALUES, draw_attributes, render

CAPTION = "a large red star on a black background"
SEED = 1
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
PRIORS = {"z_t, no prior": "text", "linear prior": "linear", "AR prior": "ar", "diffusion prior": "diffusion"}


def guidance(unclip: Unclip) -> Image.Image:
    """Draw one caption from the same noise at several scales."""
    drawn = [unclip.generate([CAPTION], seed=SEED, guidance=scale).images[0] for scale in SCALES]
    return grid([(f"{CAPTION}, seed {SEED}", drawn)], [f"guidance {scale:g}" for scale in SCALES])


def priors(unclip: Unclip) -> Image.Image:
    """Draw six held-out captions with every prior, from the same noise, beside the true embedding and the picture."""
    rng = np.random.default_rng(5)
    attributes = draw_attributes(6, split="heldout", rng=rng)
    pixels = torch.from_numpy(render(attributes, rng=rng)).permute(0, 3, 1, 2).div(127.5).sub(1)
    captions = [caption(names, rng)[0] for names in attributes]
    columns = {title: unclip.generate(captions, prior=name, seed=SEED).images for title, name in PRIORS.items()}
    z_i = F.normalize(unclip.clip.encode_image(pixels), dim=-1)
    columns |= {"true z_i": unclip.decode(z_i, captions, seed=SEED).images, "the picture": pixels}
    rows = zip(captions, zip(*columns.values(), strict=True), strict=True)
    return grid([*rows], [*columns])


@torch.no_grad()
def noise(unclip: Unclip) -> Image.Image:
    """Show what the decoder sees at some of its times, and what it takes the picture to be."""
    z_i, text = unclip.generate([CAPTION], seed=SEED).image_embed, unclip.clip.describe([CAPTION])
    task, seen = unclip.decoder.part, []
    denoise = task.denoiser(z_i, text, unclip.decoder.spec.guidance)

    def look(x_t: Tensor, t: Tensor) -> object:
        found = denoise(x_t, t)
        seen.append((float(torch.as_tensor(t).max()), x_t[0], found.x0[0]))
        return found

    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    last = unclip.decoder.sampler.sample(look, start, task.diffusion, generator=torch.Generator().manual_seed(SEED))
    shown = [seen[i] for i in np.linspace(0, len(seen) - 1, 7).round().astype(int)]
    rows = [
        ("x_t: what the decoder sees", [*(x_t.clamp(-1, 1) for _, x_t, _ in shown), last[0].clamp(-1, 1)]),
        ("x_0: what it takes the picture to be", [x0.clamp(-1, 1) for _, _, x0 in shown]),
    ]
    return grid(rows, [*(f"t = {t:.2f}" for t, _, _ in shown), "drawn"])


def pipeline(unclip: Unclip) -> Image.Image:
    """Draw where each part sits, with the embeddings and the picture of one caption."""
    drawn = unclip.generate([CAPTION], seed=SEED)
    z_t = F.normalize(unclip.clip.describe([CAPTION]).embed, dim=-1)
    true_z_i = F.normalize(unclip.clip.encode_image(drawn.images), dim=-1)
    canvas = Image.new("RGB", (1080, 330), "white")
    pen, top, low = ImageDraw.Draw(canvas), 90, 260
    small, large = (ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", n) for n in (12, 14))

    def box(x: int, y: int, title: str, note: str, fill: str = "#e8eef7") -> None:
        pen.rounded_rectangle((x, y - 32, x + 130, y + 32), 8, fill, "#35507a", 2)
        pen.text((x + 65, y - 9), title, "black", large, "mm")
        pen.text((x + 65, y + 12), note, "#444444", small, "mm")

    def embedding(x: int, y: int, z: Tensor, title: str) -> None:
        strip = (z[0].view(1, -1) * 4).clamp(-1, 1)
        colours = torch.stack([strip, -strip.abs(), -strip]).add(0.5).clamp(-1, 1)
        canvas.paste(to_image(colours).resize((96, 24), Image.Resampling.NEAREST), (x, y - 12))
        pen.text((x + 48, y - 26), title, "black", large, "mm")

    def arrow(x: int, y: int, end: tuple[int, int], grey: bool = False) -> None:
        pen.line((x, y, *end), "#888888" if grey else "black", 2)
        (dx, dy), (ex, ey) = (end[0] - x, end[1] - y), end
        long = (dx * dx + dy * dy) ** 0.5
        ux, uy = dx / long, dy / long
        wings = [(ex - 9 * ux + s * 5 * uy, ey - 9 * uy - s * 5 * ux) for s in (1, -1)]
        pen.polygon([end, *wings], "#888888" if grey else "black")

    pen.text((20, 22), f"“{CAPTION}”", "black", large)
    box(20, top, "CLIP, text", "frozen")
    embedding(190, top, z_t, "z_t")
    box(326, top, "prior", "diffusion or AR", "#fdeedc")
    embedding(496, top, drawn.image_embed, "z_i")
    box(632, top, "decoder", "diffusion", "#fdeedc")
    side = 128
    canvas.paste(to_image(drawn.images[0]).resize((side, side), Image.Resampling.NEAREST), (802, top - side // 2))
    box(942, top, "upsamplers", "of larger runs", "#fdeedc")
    for x, end in ((152, 186), (288, 322), (458, 492), (594, 628), (764, 798), (932, 940)):
        arrow(x, top, (end, top))
    box(632, low, "CLIP, images", "frozen")
    embedding(496, low, true_z_i, "its own z_i")
    arrow(866, top + side // 2 + 2, (766, low - 8), grey=True)
    arrow(630, low, (596, low), grey=True)
    arrow(544, low - 38, (544, top + 18), grey=True)
    pen.text((20, low - 16), "In training, z_i comes from the picture: prior and decoder", "#444444", small)
    pen.text((20, low + 2), "learn apart. Vary, edit and interpolate begin there too.", "#444444", small)
    return canvas


def steered(unclip: Unclip, thetas: list[float]) -> Tensor:
    """Turn the z_i of a red star towards what tells "blue" from "red", by fractions of the angle: (N, d)."""
    z_i = unclip.generate([CAPTION], seed=SEED).image_embed
    red, blue = F.normalize(unclip.clip.describe([CAPTION, CAPTION.replace("red", "blue")]).embed, dim=-1)
    wide = (len(thetas), -1)
    return turn(z_i.expand(*wide), (blue - red).expand(*wide), torch.tensor(thetas))


def cut(unclip: Unclip, dims: list[int]) -> Tensor:
    """Keep the first principal axes of the red star's z_i: (N, d)."""
    z_i = unclip.generate([CAPTION], seed=SEED).image_embed
    return Manipulator(unclip).project(z_i, dims)[0]


def means(unclip: Unclip, attribute: str) -> Tensor:
    """Average the z_i of those of 2,000 pictures that share a colour, a shape or a position: (values, d)."""
    rng = np.random.default_rng(5)
    names = draw_attributes(2000, split="train", rng=rng)
    pixels = torch.from_numpy(render(names, rng=rng)).permute(0, 3, 1, 2).div(127.5).sub(1)
    z_i = F.normalize(torch.cat([unclip.clip.encode_image(part) for part in pixels.split(250)]), dim=-1)
    rows = [[getattr(one, attribute) == value for one in names] for value in VALUES[attribute]]
    return F.normalize(torch.stack([z_i[row].mean(0) for row in rows]), dim=-1)


def embedding(unclip: Unclip) -> Image.Image:
    """Draw embeddings that belong to no picture, without a caption and all from the same noise."""
    thetas, dims = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1, 2, 4, 8, 16, 32, 64]
    rows = {
        f"turned from red to blue by θ = {', '.join(map(str, thetas))}": steered(unclip, thetas),
        f"its first {', '.join(map(str, dims))} principal axes": cut(unclip, dims),
    }
    for attribute in ("color", "shape", "position"):
        title = f"the mean of pictures of one {attribute}: {', '.join(VALUES[attribute])}"
        rows[title] = means(unclip, attribute)
    return grid([(title, [*unclip.decode(z_i, seed=SEED).images]) for title, z_i in rows.items()])


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    torch.set_num_threads(1)
    unclip = Unclip.load("shapes")
    for make in (guidance, priors, noise, pipeline, embedding):
        save_png(make(unclip), folder / f"{make.__name__}.png", {"made by": "docs/pictures.py"})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
