"""Measure and draw the image manipulations of a trained run; writes results/manipulations.

python benchmarks/manipulations.py shapes runs/shapes-long        # by the oracle, on pictures rendered for it
python benchmarks/manipulations.py inpaint runs/shapes-long       # the same: another object in the place of the old one
python benchmarks/manipulations.py emoji runs/emoji --source DIR  # by the run's judge, on held-out pairs
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.data.transforms import load_square, to_pixels
from unclip_pl.generation.manipulation import Latent, Manipulator, psnr, resize
from unclip_pl.generation.pictures import Row, grid, save_png
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.provenance import provenance
from unclip_pl.generation.run import read_run
from unclip_pl.shapes.captions import PHRASES, fill
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import ATTRIBUTES, VALUES, Attributes, draw_attributes, encode, render

OUT = Path(__file__).parent.parent / "results" / "manipulations"
ETAS, THETAS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.125, 0.25, 0.375, 0.5)
#: Captions of an edit: those of training that say the attribute and as little else as they can; and all of it.
SHORT = {
    "shape": "a {color} {shape}",
    "color": "a {color} {shape}",
    "size": "a {size} {shape} {position}",
    "position": "a {size} {shape} {position}",
    "background": "a picture of a {shape} on a {background} background",
}
FULL = "a {size} {color} {shape} {position} on a {background} background"
#: Rows of a picture, and of a batch.
SHOWN, BATCH = 4, 16
#: What an inpainted picture changes, and RePaint's jumps.
CHANGED, JUMPS = ("shape", "color"), (0, 2)
#: Of a text diff between the same emoji: the second style is one that no (emoji, style) pair of training showed.
STYLES, GOAL = ("twemoji", "fluentflat"), "fluent3d"


class Shapes(NamedTuple):
    """Rendered pictures and what is in them."""

    attributes: list[Attributes]
    pixels: Tensor  # (N, 3, H, H)

    @classmethod
    def draw(cls, n: int, size: int) -> "Shapes":
        """Draw from the held-out distribution. Training never showed an eighth of its (shape, colour) pairs."""
        rng = np.random.default_rng(2204)
        attributes = draw_attributes(n, split="heldout", rng=rng)
        images = torch.from_numpy(render(attributes, size=size, rng=rng)).permute(0, 3, 1, 2)
        return cls(attributes, to_pixels(images))


def batches(n: int) -> list[slice]:
    return [slice(start, min(n, start + BATCH)) for start in range(0, n, BATCH)]


def invert(unclip: Unclip, pixels: Tensor, steps: int) -> Latent:
    parts = [Manipulator(unclip).invert(pixels[rows], steps=steps) for rows in batches(len(pixels))]
    z_i, x_T = (torch.cat(columns) for columns in list(zip(*parts, strict=True))[:2])
    return Latent(z_i, x_T, steps, 1.0)


def shares(read: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the share of (N, 5) readings that agree with (N, 5) values, for each attribute."""
    return dict(zip(ATTRIBUTES, (read == truth).double().mean(0).tolist(), strict=True))


def reconstruction(unclip: Unclip, shapes: Shapes) -> tuple[dict[str, Any], list[Row]]:
    """There and back in 100 steps."""
    parts = [Manipulator(unclip).reconstruct(shapes.pixels[rows], steps=100) for rows in batches(len(shapes.pixels))]
    quality, images = torch.cat([part.psnr for part in parts]), torch.cat([part.images for part in parts])
    ordered = quality.argsort()
    shown = [*ordered[:SHOWN].tolist(), *ordered[-SHOWN:].tolist()]
    rows: list[Row] = [
        ("given: the four worst, the four best", list(shapes.pixels[shown])),
        (", ".join(f"{quality[i]:.1f}" for i in shown) + " dB", list(images[shown])),
    ]
    numbers = {
        "mean": quality.mean().item(),
        "min": quality.min().item(),
        "at_least_30": (quality >= 30).double().mean(),
    }
    return {"pictures": len(quality), "steps": 100, "psnr": {k: float(v) for k, v in numbers.items()}}, rows


def variation(
    unclip: Unclip, oracle: ShapesOracle, shapes: Shapes, latent: Latent
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Attributes that stay, and how far pixels move, by eta."""
    truth, rows, drawn = encode(shapes.attributes), [], []
    for eta in ETAS:
        images = torch.cat([Manipulator(unclip).vary(latent.at(part), num=1, eta=eta) for part in batches(len(truth))])
        distance = psnr(images, resize(shapes.pixels, images.shape[-1]))
        rows.append({"eta": eta, "kept": shares(oracle(images).indices, truth), "psnr": distance.mean().item()})
        drawn.append(images)
        print(rows[-1], flush=True)
    return rows, [(f"{i}", [shapes.pixels[i], *(images[i] for images in drawn)]) for i in range(SHOWN)]


def said(attributes: Attributes, template: str) -> str:
    return fill(template, {name: PHRASES.get(value, (value,))[0] for name, value in attributes._asdict().items()})


def edits(
    unclip: Unclip, oracle: ShapesOracle, shapes: Shapes, latent: Latent
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Text diffs of one attribute each: how many reach the target, how many of the other attributes stay."""
    truth, rng, rows, strips = encode(shapes.attributes), np.random.default_rng(0), [], []
    for place, name in enumerate(ATTRIBUTES):
        turns = rng.integers(1, len(VALUES[name]), len(truth))
        goal = truth.clone()
        goal[:, place] = (truth[:, place] + torch.from_numpy(turns)) % len(VALUES[name])
        others = [i for i in range(len(ATTRIBUTES)) if i != place]
        for captions, template in (("short", SHORT[name]), ("full", FULL)):
            drawn = []
            for i, old in enumerate(shapes.attributes):
                new = old._replace(**{name: VALUES[name][goal[i, place]]})
                texts = said(new, template), said(old, template)
                drawn.append(Manipulator(unclip).edit(latent.at(slice(i, i + 1)), *texts, thetas=THETAS))
                if captions == "short" and i < SHOWN // 2:
                    strips.append((f"{texts[1]} → {texts[0]}", [shapes.pixels[i], *drawn[-1]]))
            read = oracle(torch.cat(drawn)).indices.view(len(truth), len(THETAS), -1)
            for column, theta in enumerate(THETAS):
                right = read[:, column] == goal
                reached, kept = right[:, place].double().mean().item(), right[:, others].double().mean().item()
                rows.append({"attribute": name, "captions": captions, "theta": theta, "reached": reached, "kept": kept})
                print(rows[-1], flush=True)
    return rows, strips


def interpolations(unclip: Unclip, latent: Latent, pixels: Tensor) -> list[Row]:
    rows: list[Row] = []
    for i in range(0, SHOWN, 2):
        first, second = latent.at(slice(i, i + 1)), latent.at(slice(i + 1, i + 2))
        for noise, label in (("inverted", "x_T interpolated as well"), ("fixed", "one x_T for all")):
            path = Manipulator(unclip).interpolate(first, second, num=7, noise=noise)
            rows.append((label, [pixels[i], *path, pixels[i + 1]]))
    return rows


def probes(unclip: Unclip, latent: Latent, pixels: Tensor) -> list[Row]:
    drawn = Manipulator(unclip).probe(latent.image_embed[:SHOWN], steps=50).unflatten(0, (SHOWN, -1))
    return [("", [pixels[i], *drawn[i]]) for i in range(SHOWN)]


def on_shapes(run: str, out: Path, pictures: int, edited: int, steps: int) -> None:
    """All of it, each picture saved as soon as it is there."""
    unclip = Unclip.load(run)
    content: dict[str, Any] = {"run": unclip.origin.run, "steps": steps, "meta": provenance(torch.device("cpu"))}
    facts = {"run": unclip.origin.run, "commit": content["meta"]["commit"]}
    oracle, shapes = ShapesOracle(unclip.decoder.image_size), Shapes.draw(pictures, unclip.decoder.image_size)

    def show(name: str, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
        save_png(grid(rows, columns), out / f"{name}.png", facts)

    content["reconstruction"], rows = reconstruction(unclip, shapes)
    print(content["reconstruction"], flush=True)
    show("reconstruct", rows)
    latent = invert(unclip, shapes.pixels, steps)
    dims = Manipulator(unclip).dims()
    show("interpolate", interpolations(unclip, latent, shapes.pixels))
    show("probe", probes(unclip, latent, shapes.pixels), ["given", *map(str, dims)])
    content["variation"], rows = variation(unclip, oracle, shapes, latent)
    show("vary", rows, ["given", *(f"η = {eta:g}" for eta in ETAS)])
    some = Shapes(shapes.attributes[:edited], shapes.pixels[:edited])
    content["edits"], rows = edits(unclip, oracle, some, latent.at(slice(0, edited)))
    content["edited"] = edited
    show("edit", rows, ["given", *(f"θ = {theta:g}" for theta in THETAS)])
    (out / "shapes.json").write_text(json.dumps(content, indent=2) + "\n")


def around_the_object(pixels: Tensor, margin: int) -> Tensor:
    """Return masks (N, 1, H, H): the square around all that has not the colour of the corner, and a margin."""
    side, masks = pixels.shape[-1], torch.zeros_like(pixels[:, :1], dtype=torch.bool)
    for mask, image in zip(masks, pixels, strict=True):
        rows, columns = ((image - image[:, :1, :1]).abs().amax(0) > 0.02).nonzero().T
        reach = max(int(x.max() - x.min()) for x in (rows, columns)) / 2 + margin
        top, left = (max(0, round(float(x.max() + x.min()) / 2 - reach)) for x in (rows, columns))
        length = round(2 * reach) + 1
        mask[:, top : min(side, top + length), left : min(side, left + length)] = True
    return masks


def on_inpainting(run: str | None, out: Path, pictures: int) -> None:
    """Another shape of another colour in the place of the old one: does the oracle read what the caption asks for?"""
    unclip = Unclip.load(run)
    size = unclip.decoder.image_size
    shapes, oracle, rng = Shapes.draw(pictures, size), ShapesOracle(size), np.random.default_rng(7)
    asked = [
        old._replace(**{name: rng.choice([x for x in VALUES[name] if x != getattr(old, name)]) for name in CHANGED})
        for old in shapes.attributes
    ]
    captions, truth, mask = [said(new, FULL) for new in asked], encode(asked), around_the_object(shapes.pixels, 2)
    content = {"run": unclip.origin.text, "pictures": pictures, "meta": provenance(torch.device("cpu")), "drawn": []}
    columns: list[Tensor] = [shapes.pixels, shapes.pixels.masked_fill(mask, 0)]
    for name, jumps in {"plain samples": None, **{f"inpainted, {n} jumps": n for n in JUMPS}}.items():
        if jumps is None:
            images = unclip.generate(captions).images
        else:
            images = unclip.inpaint(shapes.pixels, mask, captions, jumps=jumps).images
            columns.append(images)
        read = oracle(images)
        right = (read.indices == truth).double()
        row = {"what": name, "shape_and_colour": right[:, :2].prod(1).mean().item(), **shares(read.indices, truth)}
        content["drawn"].append(row | {"residual": read.residual.mean().item()})
        print(content["drawn"][-1], flush=True)
    rows = [(captions[i], [column[i] for column in columns]) for i in range(2 * SHOWN)]
    heads = ["given", "kept", *(f"{n} jumps" for n in JUMPS)]
    out.mkdir(parents=True, exist_ok=True)
    save_png(grid(rows, heads), out / "inpaint.png", {"commit": content["meta"]["commit"]})
    (out / "inpaint.json").write_text(json.dumps(content, indent=2) + "\n")


def pairs(source: Path, style: str, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Labels, pictures (N, 3, H, H) in a style, and the same emoji in the goal's style, which training never showed."""
    samples: dict[tuple[str, str], tuple[str, str, bytes]] = {}
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in files.items():
            if name.endswith(".json"):
                extra = json.loads(data)
                label, split = extra["label"], path.name.split("-")[0]
                samples[extra["hexcode"], extra["style"]] = (label, split, files[name.replace(".json", ".png")])
    codes = [code for (code, kind), (_, split, _) in samples.items() if kind == GOAL and split == "heldout"]
    codes = sorted(code for code in codes if (code, style) in samples)
    both = [torch.stack([load_square(samples[code, kind][2], size) for code in codes]) for kind in (style, GOAL)]
    return [samples[code, style][0] for code in codes], to_pixels(both[0]), to_pixels(both[1])


def on_emoji(run: str, out: Path, source: Path, steps: int) -> None:
    """Style diffs whose true answer is known: does the judge find the picture nearer to it than before?"""
    unclip, description = Unclip.load(run), read_run(Path(run))
    if description.judge is None:
        raise ValueError(f"{run} has no judge.")
    judge = description.judge.within(Path(run)).load()

    def nearness(images: Tensor, true: Tensor) -> Tensor:
        return F.cosine_similarity(judge.encode_image(images), judge.encode_image(true), dim=-1)

    phrases = {"twemoji": "flat vector emoji", "fluentflat": "fluent flat icon", GOAL: "glossy 3d render"}
    content: dict[str, Any] = {"run": unclip.origin.run, "steps": steps, "meta": provenance(torch.device("cpu"))}
    content["edits"] = []
    for style in STYLES:
        labels, given, true = pairs(source, style, unclip.decoder.image_size)
        latent, before, drawn = invert(unclip, given, steps), nearness(given, true), []
        for i, label in enumerate(labels):
            texts = f"{label}, {phrases[GOAL]}", f"{label}, {phrases[style]}"
            drawn.append(Manipulator(unclip).edit(latent.at(slice(i, i + 1)), *texts, thetas=THETAS))
        columns = torch.stack(drawn).unbind(1)
        for theta, images in zip(THETAS, columns, strict=True):
            after = nearness(images, true)
            row = {
                "style": style,
                "theta": theta,
                "pairs": len(labels),
                "nearer": (after > before).double().mean().item(),
            }
            content["edits"].append(row | {"before": before.mean().item(), "after": after.mean().item()})
            print(content["edits"][-1], flush=True)
        if style == STYLES[-1]:  # of a licence that lets its pictures be shown here: both styles are Microsoft's, MIT
            rows = [(labels[i], [given[i], *drawn[i], true[i]]) for i in range(2 * SHOWN)]
            heads = ["given", *(f"θ = {theta:g}" for theta in THETAS), "true"]
            facts = {"run": content["run"], "commit": content["meta"]["commit"], "license": "MIT, Microsoft"}
            save_png(grid(rows, heads), out / "emoji.png", facts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "emoji.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shapes", "inpaint", "emoji"))
    parser.add_argument("run", nargs="?", help="without it, the weights in the package")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--source", type=Path, help="of the emoji")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--edited", type=int, default=32, help="of those pictures")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM, each way, but for the reconstruction's 100")
    given = parser.parse_args()
    if given.what == "shapes":
        on_shapes(given.run, given.out, given.pictures, given.edited, given.steps)
    elif given.what == "inpaint":
        on_inpainting(given.run, given.out, given.pictures)
    else:
        on_emoji(given.run, given.out, given.source, given.steps)
