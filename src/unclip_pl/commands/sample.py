"""``unclip sample``: pictures of captions."""

import re
from functools import partial
from itertools import product
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from unclip_pl.commands.studio import CaptionOptions, Studio
from unclip_pl.errors import InputError
from unclip_pl.settings import PROMPTS, find

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.generation.pictures import Row


def sample(
    captions: list[str],
    options: CaptionOptions,
    *,
    prompts: str = "",
    num: PositiveInt = 4,
    from_embedding: str = "",
    previews: NonNegativeInt = 0,
    labels: bool = False,
    batch_size: PositiveInt = 64,
    open: bool = False,
    json: bool = False,
) -> None:
    """Draw images of captions from a trained run.

    One image into one file is that image; several are a labelled grid. A folder as --out gets the grid and every image
    by itself. Each further image of a caption has the next seed.

    Args:
        captions: texts to draw; an empty one draws without a condition.
        options: options that commands share.
        prompts: text file of more captions, one a line, such as data/prompts/shapes.txt.
        num: images per caption.
        from_embedding: safetensors of N embeddings by `unclip predict`, drawn without a prior; with 0, 1 or N captions.
        previews: number of estimates of every image along the way, to show before it in its row.
        labels: write the labelled grid also for one image.
        batch_size: images drawn at once.
        open: show what was written in the program that this machine has for pictures.
        json: print one line of JSON with files, captions, seeds and scores; everything else goes to stderr.
    """
    texts = _texts(captions, prompts, from_embedding)
    if from_embedding and options.of_prior():
        raise InputError("Expected --from_embedding or settings of a prior. Got both: leave one out.")
    with Studio("sample", options, folder=True, stderr=json) as studio:
        if from_embedding:
            z_i = _embeddings(studio, from_embedding)
            texts = texts if len(texts) > 1 else (texts or [""]) * len(z_i)
            facts: dict[str, Any] = {"from_embedding": Path(from_embedding).name}
            draw = partial(studio.unclip.decode, z_i, texts)
        else:
            facts = {"prior": "diffusion", **options.of_prior()}
            draw = partial(studio.unclip.generate, texts, **studio.prior_settings())
        studio.warn_of_unknown(texts)
        bar, seed = studio.bar("drawing", ways=-(-len(texts) * num // batch_size)), options.seed
        kept: dict[str, list[Tensor]] = {}

        def progress(done: int, total: int, x0: "Tensor") -> None:
            bar(done, total, x0)
            if done < total and done in (round(i / (previews + 1) * total) for i in range(1, previews + 1)):
                kept.setdefault(f"step {done} of {total}", []).extend(x0.cpu())

        drawn = draw(num=num, seed=seed, batch_size=batch_size, progress=progress, **studio.decoder_settings())
        facts, seeds = options.of_decoder() | facts, range(seed, seed + num)
        grid, files = _save(studio, texts, seeds, drawn.images, kept, facts, labels=labels)
        if json:
            print(_told(studio, texts, seeds, drawn.image_embed, grid, files))
        if open:
            studio.show(grid or files[0])


def _save(
    studio: Studio,
    texts: list[str],
    seeds: range,
    images: "Tensor",
    previews: dict[str, list["Tensor"]],
    facts: dict[str, Any],
    *,
    labels: bool,
) -> tuple[str, list[str]]:
    """Write one image, or a grid, or a folder of both, and return the grid's file and those of single images."""
    folder = "" if Path(studio.out).suffix else studio.out
    if not folder and len(images) == 1 and not previews and not labels:
        studio.save(studio.out, images[0], {"caption": texts[0], "seed": seeds[0], **facts})
        studio.say(f"wrote {studio.out}")
        return "", [studio.out]
    rows, columns = _layout(texts, seeds, images, previews)
    whole = {"captions": "\n".join(texts), "seed": seeds[0], **facts}
    grid, files = f"{folder}/grid.png" if folder else studio.out, []
    studio.save_grid(rows, columns, whole, grid)
    if folder:
        for number, ((text, seed), image) in enumerate(zip(product(texts, seeds), images, strict=True)):
            slug = re.sub(r"\W+", "-", text.lower()).strip("-")[:60] or "no-caption"
            files.append(f"{folder}/{number:03d}-{slug}.png")
            studio.save(files[-1], image, {"caption": text, "seed": seed, **facts})
        studio.say(f"wrote {len(images)} images into {folder}")
    return grid, files


def _told(studio: Studio, texts: list[str], seeds: range, image_embed: "Tensor", grid: str, files: list[str]) -> str:
    """Return what was drawn as JSON; the score is the cosine of z_i and z_t, by which candidates are chosen."""
    from torch.nn import functional as F

    z_t = studio.unclip.clip.describe(texts).embed.repeat_interleave(len(seeds), dim=0)
    scores = F.cosine_similarity(image_embed.to(z_t), z_t).tolist()
    named = zip(files or [""] * len(scores), product(texts, seeds), scores, strict=True)
    pictures = [
        {"file": file or None, "caption": text, "seed": seed, "text_cos": round(score, 4)}
        for file, (text, seed), score in named
    ]
    return dumps({"grid": grid or None, "pictures": pictures, **studio.origin}, ensure_ascii=False)


def _layout(
    texts: list[str], seeds: range, images: "Tensor", previews: dict[str, list["Tensor"]]
) -> tuple[list["Row"], list[str]]:
    """Return rows and the columns' labels: a row for each caption; with previews, a row for each image."""
    if not previews:
        rows = images.unflatten(0, (-1, len(seeds)))
        return [(text, list(row)) for text, row in zip(texts, rows, strict=True)], [f"seed {seed}" for seed in seeds]
    labels = [f"{text}, seed {seed}" for text, seed in product(texts, seeds)]
    return list(zip(labels, zip(*previews.values(), images, strict=True), strict=True)), [*previews, "drawn"]


def _texts(captions: list[str], prompts: str, from_embedding: str) -> list[str]:
    """Return the captions, and those of a text file, one a line; empty lines do not count."""
    from unclip_pl.files import EDGES, read_lines

    captions = [caption.strip(EDGES) for caption in captions]
    if not prompts:
        if not captions and not from_embedding:
            raise InputError('Expected a caption. Got none: write unclip sample "a large red star".')
        return captions
    return [*captions, *read_lines(find(prompts, PROMPTS), "prompts")]


def _embeddings(studio: Studio, path: str) -> "Tensor":
    """Return what ``unclip predict`` wrote with this run's CLIP."""
    from unclip_pl.files import read_tensors
    from unclip_pl.generation.run import check_clip

    tensors, metadata = read_tensors(path, ["image_embed"], what="embeddings", command="unclip predict")
    check_clip(studio.unclip.clip.fingerprint, metadata.get("fingerprint", ""), path)
    return tensors["image_embed"]
