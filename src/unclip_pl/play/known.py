"""Look up what a run knows: embeddings of its training set, and its report."""

from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.transforms import to_pixels
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.provenance import trained_on_shapes
from unclip_pl.generation.run import read_run
from unclip_pl.packing.samples import shapes_samples
from unclip_pl.report.card import model_card
from unclip_pl.settings import SHIPPED
from unclip_pl.shapes.render import COLORS

#: Most embeddings.
MOST = 500


class Known(NamedTuple):
    """Embeddings of pictures that a run was trained on."""

    image_embed: Tensor  # (N, d) raw
    told: list[str]  # what each picture shows; "" where that is not at hand
    colors: list[str]  # of the dots that stand for them
    note: str


def known_to(run: Unclip) -> Known:
    """Return embeddings of a run's training set: those of its store, or of shapes that are rendered again.

    Args:
        run: trained run. A bundle has no store; of other data than shapes nothing is left in it.
    """
    store = read_run(run.root).store
    if store and (run.root / store).is_dir():
        image_embed, _ = next(EmbeddingStore(run.root / store).embed_chunks(Split.TRAIN, MOST))
        note = f"The dots are the first {len(image_embed)} pictures of the training set."
        return Known(image_embed, [""] * len(image_embed), ["silver"] * len(image_embed), note)
    if not trained_on_shapes(run.root):
        return Known(torch.empty(0, run.clip.embed_dim), [], [], "This run has no embeddings of its training set.")
    samples = list(shapes_samples(MOST, split="train", size=run.decoder.output_size))
    pixels = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples])
    with torch.no_grad():
        image_embed = run.clip.encode_image(to_pixels(pixels).to(run.device)).cpu()
    colors = [COLORS[sample.extra["attributes"]["color"]] for sample in samples]
    return Known(
        image_embed,
        [sample.captions[0] for sample in samples],
        [f"rgb({', '.join(f'{255 * part:.0f}' for part in color)})" for color in colors],
        f"The dots are {MOST} pictures as the training set has them, rendered again, in the colours of their objects.",
    )


def report_of(run: Unclip) -> tuple[str, str]:
    """Return a run's own report as a page of HTML, or else its model card in Markdown; the other is empty."""
    measured = SHIPPED / "results" / run.origin.run / "report.html"  # of the packaged weights, in a clone
    for page in (run.root / "report.html", measured):
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if text and (page != measured or (run.origin.commit and run.origin.commit in text)):
            return text, ""
    card = model_card(run.root, 'unclip sample "a caption"')
    head, _, body = card.removeprefix("---").partition("\n---\n")
    return "", body or head
