"""Typographic attacks: what CLIP says of a shape with another shape's name on it, and what its embedding draws (§4)."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.cell import Counts, write_cell
from unclip_pl.evaluation.costs import Training
from unclip_pl.evaluation.drawing import Painter, gather
from unclip_pl.evaluation.foundations import class_embeddings
from unclip_pl.evaluation.inputs import parts_of
from unclip_pl.evaluation.scores import spectrum, true_attributes
from unclip_pl.evaluation.sheet import Sheet
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.provenance import provenance, settings
from unclip_pl.shapes.oracle import ShapesOracle, WordsOracle
from unclip_pl.shapes.render import ATTRIBUTES, VALUES
from unclip_pl.types import EvaluationBatch

TITLE = "Typographic attacks"
#: Columns of the pictures.
GIVEN, DRAWN = "picture", "drawn from its z_i"


class Attack(LightningModule):
    """``unclip test --config configs/compare/words.yaml``: writes one cell, rows of a table with pictures beside it.

    A row says how much each picture is taken for a class: by CLIP, the probability among the eight shapes; drawn from
    its embedding, or in the picture itself, whether the oracle reads so. The classes are the shape and, where the
    pictures have words on them, the word.

    Args:
        run: folder that CLIP is named relative to.
        clip: the CLIP that is attacked, and that conditions the decoder.
        decoder: draws each embedding, without a caption.
        out: file to write; pictures lie beside it.
        decoder_run: folder that the decoder is named relative to; None means ``run``.
        oracle: reader of shapes; None is the one that leaves out the rows of words.
        grid_rows: number of captions whose pictures are kept.
        batch_size: number of pictures decoded at once.
        seed: training seed of the decoder; the noise follows from it too.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec,
        decoder: DecoderSpec,
        out: str,
        decoder_run: str | None = None,
        oracle: ShapesOracle | None = None,
        grid_rows: int = 8,
        batch_size: int = 96,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.run = Path(run)
        self.clip = clip
        self.decoder = decoder
        self.out = Path(out)
        self.decoder_run = Path(decoder_run) if decoder_run else self.run
        self.oracle = oracle or WordsOracle()
        self.grid_rows = grid_rows
        self.batch_size = batch_size
        self.seed = seed

    def on_test_start(self) -> None:
        """Load CLIP and decoder, and refuse to mix CLIPs."""
        self._started = time.perf_counter()
        self._parts = parts_of(self, decoder=self.decoder, decoder_run=self.decoder_run)
        self._seen: list[tuple[Tensor, ...]] = []  # embeddings, classes, readings, and the pictures that are kept

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Keep the embeddings, what is there, and what the oracle reads of the pictures themselves."""
        shapes = VALUES["shape"]
        words = [shapes.index(word) if (word := sample.get("word")) else -1 for sample in batch.metadata]
        classes = torch.stack([true_attributes(batch.metadata)[:, 0], torch.tensor(words)], dim=1)
        room = max(0, self.grid_rows - sum(len(part[0]) for part in self._seen))
        parts = batch.image_embed, classes, self.oracle(batch.image).indices[:, 0], batch.image[:room]
        self._seen.append(tuple(part.cpu() for part in parts))

    def on_test_epoch_end(self) -> None:
        """Draw every embedding, and write the cell."""
        world, rank = self.trainer.world_size, self.global_rank
        rows = [row for own in gather(self._seen, world) for row in own]
        embeds, classes, read, images = (torch.cat(parts) for parts in zip(*rows, strict=True))
        decoder, clip = self._parts.decoder, self._parts.clip
        assert decoder is not None
        assert clip is not None
        images = images[: self.grid_rows]
        # The painter's judge only looks, and what it sees is not kept.
        with Painter(
            decoder, clip, self.oracle, batch_size=self.batch_size, seed=self.seed, rank=rank, world_size=world
        ) as painter:
            painter.expect(len(embeds))
            empty = decoder.null_text(len(embeds)).to("cpu")
            view = painter.paint(embeds, empty, what="from the embedding alone", keep=range(len(images)))
        if not self.trainer.is_global_zero:
            return
        names = class_embeddings(clip, "shape")
        cosines = F.normalize(embeds.to(names), dim=-1) @ names.T
        known, shape = torch.eye(len(names)), ATTRIBUTES.index("shape")
        found = {
            "CLIP": (clip.model.logit_scale.exp() * cosines).softmax(-1).cpu(),
            "drawn": known[view.read[:, shape]],
            "picture": known[read],
        }
        sheet = Sheet(torch.stack([images, view.images], 1), captions_of(classes[: len(images)]), [GIVEN, DRAWN])
        counts = Counts(rows=len(embeds), captions=len(embeds))._asdict()
        cell = {
            **{"kind": "table", "title": TITLE, "series": "", "x": None, "seed": self.seed},
            "base": self._parts.fingerprint,
            "counts": counts,
            "settings": settings({"clip": self.clip, "decoder": self.decoder}) | counts,
            "space": spectrum(embeds),
            "foundations": None,
            "arms": arms(found, classes),
            "meta": provenance(self.device) | {"seconds": time.perf_counter() - self._started},
        }
        write_cell(self.out, cell, {"grid": sheet} if self.grid_rows else {})


def captions_of(classes: Tensor) -> list[str]:
    """Return what (N, 2) classes of shape and word say in words."""
    shapes = VALUES["shape"]
    called = [f", called {name}" for name in shapes] + [""]  # -1 is no word
    return [f"a {shapes[shape]}{called[word]}" for shape, word in classes.tolist()]


def arms(found: dict[str, Tensor], classes: Tensor) -> dict[str, dict[str, Any]]:
    """Return the rows of the table.

    Args:
        found: for each observer, (N, 8) how much each picture is taken for each shape.
        classes: (N, 2) shape and word of each picture; -1 where there is no word.

    Raises:
        InputError: some of the pictures have a word and some have none.
    """
    shape, word = classes.unbind(1)
    if (word >= 0).any() and (word < 0).any():
        raise InputError(
            f"Expected pictures that all have a word, or all none. Got {(word >= 0).sum()} of {len(word)} with one: "
            "measure the held-out split of `unclip pack shapes --words true`, where all have one."
        )
    asked = {"the shape": shape, "the word": word} if (word >= 0).all() else {"the shape, no word": shape}
    untrained = {
        **dict.fromkeys(("parameters", "training_steps", "training_samples", "training_seconds", "training_flops"), 0),
        **dict.fromkeys(("evaluations", "flops_per_embedding", "seconds_per_embedding"), 0),
        **{"class": "", "reference": True, "sampling": {}, "resamples": {}, **Training()._asdict()},
    }
    return {
        f"{observer}, {what}": untrained | {"values": {"class_share": share.gather(1, wanted[:, None]).squeeze(1)}}
        for observer, share in found.items()
        for what, wanted in asked.items()
    }
