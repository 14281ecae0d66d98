"""``unclip sample``: pictures of captions."""

import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from unclip_pl.commands.studio import Studio
from unclip_pl.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.generation.pictures import Row


def sample(
    captions: list[str],
    run: str | None = None,
    out: str = "sample.png",
    *,
    prompts: str = "",
    num: int = 4,
    seed: int = 0,
    guidance: float | None = None,
    prior: str = "diffusion",
    prior_guidance: float | None = None,
    candidates: int | None = None,
    from_embedding: str = "",
    previews: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Draw images of captions from a trained run: one row per caption.

    Args:
        captions: texts; an empty one is unconditional.
        run: folder with run.json, or a bundle; without it runs/quickstart, or else the weights in the package.
        out: PNG file of the grid; or a folder, for the grid and every image by itself.
        prompts: text file of more captions, one a line, such as data/prompts/shapes.txt.
        num: images per caption.
        seed: of the first image of every caption; the next one's is one more. The same seed gives the same image.
        guidance: of the decoder; without it the run's own. 1 is off.
        prior: one of the run's priors.
        prior_guidance: of the prior; without it the run's own.
        candidates: embeddings drawn for each image, of which the one nearest to the caption is kept.
        from_embedding: safetensors file of image_embed (N, d), as `unclip predict` writes it. No prior is asked;
            captions may be left out, given once, or N times.
        previews: so many estimates of every image along the way, before it in its row.
        batch_size: images drawn at once.
        device: where to compute.
    """
    texts = [*captions, *(_lines(prompts) if prompts else [])]
    if not texts and not from_embedding:
        raise InputError('Expected a caption, such as: unclip sample "a large red star on a navy background".')
    if from_embedding and (candidates is not None or prior_guidance is not None):
        raise InputError("Expected --from_embedding, which asks no prior, or settings of a prior. Got both.")
    if Path(out).suffix not in ("", ".png"):
        raise InputError(f"Expected out to be a .png file, or a folder. Got {out}.")
    facts: dict[str, object] = {"guidance": guidance}
    with Studio(run, device) as studio:
        unclip = studio.unclip
        studio.warn_of_unknown(texts)
        if from_embedding:
            z_i = _embeddings(studio, from_embedding)
            texts = texts if len(texts) > 1 else (texts or [""]) * len(z_i)
            facts["from_embedding"] = Path(from_embedding).name
            draw = partial(unclip.decode, z_i, texts)
        else:
            facts |= {"prior": prior, "prior_guidance": prior_guidance, "candidates": candidates}
            draw = partial(unclip.generate, texts, prior=prior, prior_guidance=prior_guidance, candidates=candidates)
        way = _Way(studio, previews, batches=-(-len(texts) * num // max(1, batch_size)))
        images = draw(num=num, guidance=guidance, seed=seed, batch_size=batch_size, progress=way.progress).images
        facts = {name: value for name, value in facts.items() if value is not None}  # else the run's own
        seeds, shown = range(seed, seed + num), {"captions": "\n".join(texts), "seed": seed, **facts}
        rows, columns = _layout(texts, seeds, images, way.previews())
        if Path(out).suffix:
            studio.save_grid(out, rows, columns, shown)
        else:
            studio.save_grid(f"{out}/grid.png", rows, columns, shown)
            for number, ((text, own), image) in enumerate(zip(product(texts, seeds), images, strict=True)):
                slug = re.sub(r"\W+", "-", text.lower()).strip("-")[:60] or "no-caption"
                studio.save(f"{out}/{number:03d}-{slug}.png", image, {"caption": text, "seed": own, **facts})
            studio.say(f"wrote {len(images)} images into {out}")


class _Way:
    """What is seen of images on their way: a bar, and estimates of x0.

    Args:
        studio: of the bar.
        previews: estimates to keep, evenly spaced; 0 for none.
        batches: of images.
    """

    def __init__(self, studio: Studio, previews: int, *, batches: int) -> None:
        self.shares = [i / (previews + 1) for i in range(1, previews + 1)]
        self.kept: dict[str, list[Tensor]] = {}
        self.bar = studio.bar("drawing", ways=batches)

    def progress(self, done: int, total: int, x0: "Tensor") -> None:
        """One step more, of one batch."""
        self.bar(done, total, x0)
        if done < total and done in (round(share * total) for share in self.shares):
            self.kept.setdefault(f"step {done} of {total}", []).append(x0.cpu())

    def previews(self) -> dict[str, list["Tensor"]]:
        """By step, of every image."""
        return {step: [image for batch in batches for image in batch] for step, batches in self.kept.items()}


def _layout(
    texts: list[str], seeds: range, images: "Tensor", previews: dict[str, list["Tensor"]]
) -> tuple[list["Row"], list[str]]:
    """Rows and the columns' labels: a row for each caption; with previews, for each image."""
    if not previews:
        rows = images.unflatten(0, (-1, len(seeds)))
        return [(text, list(row)) for text, row in zip(texts, rows, strict=True)], [f"seed {seed}" for seed in seeds]
    labels = [f"{text}, seed {seed}" for text, seed in product(texts, seeds)]
    return list(zip(labels, zip(*previews.values(), images, strict=True), strict=True)), [*previews, "drawn"]


def _lines(path: str) -> list[str]:
    """Captions of a text file, one a line; empty lines do not count."""
    if not Path(path).is_file():
        raise MissingFileError(f"No prompts at {path}: expected a text file with a caption a line.")
    texts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise InputError(f"Expected a caption a line in {path}. Got none.")
    return texts


def _embeddings(studio: Studio, path: str) -> "Tensor":
    """What ``unclip predict`` wrote, of this run's CLIP."""
    from unclip_pl.files import read_tensors
    from unclip_pl.generation.run import check_clip

    tensors, metadata = read_tensors(path, ["image_embed"], what="embeddings", command="unclip predict")
    check_clip(studio.unclip.clip.fingerprint, metadata.get("fingerprint", ""), path)
    return tensors["image_embed"]
