"""Captions chosen once by a seed and kept as a list, one an image: how FID on MS-COCO is reported."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from unclip_pl.data.datamodule import UnclipDataModule, in_order, loader
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.errors import InputError
from unclip_pl.files import read_lines, write_text


class ChosenCaptions(UnclipDataModule):
    """Held-out images with one chosen caption each, and apart from them all held-out images.

    Args:
        captions: list of the choice, a key, a tab and a caption in each line; it is written where it is missing.
        count: number of captions to choose, where the list is missing.
        choice_seed: seed of that choice. Keys alone decide it with the seed, so other shards of the same images give
            the same list.
        **kwargs: arguments of ``UnclipDataModule``.
    """

    def __init__(
        self, captions: str, count: PositiveInt = 30_000, choice_seed: NonNegativeInt = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.captions = captions
        self.count = count
        self.choice_seed = choice_seed

    def test_dataloader(self) -> DataLoader[Any]:
        """Load the chosen captions with their images, in the store's order.

        Raises:
            InputError: there are too few images, or the list names what is not there.
        """
        rows = self.real_rows
        place = dict(zip(map(_line, self.embeddings.keys(rows)), rows.tolist(), strict=True))
        if len(place) < len(rows):
            raise InputError(f"Expected keys that name one image each in {self.source}. Got some twice: pack it again.")
        if not Path(self.captions).is_file():
            chosen = self._choose(place)
            if self.trainer is None or self.trainer.is_global_zero:
                texts = self.embeddings.captions(chosen)
                lines = zip(self.embeddings.keys(chosen.rows), texts, strict=True)
                write_text(Path(self.captions), "".join(f"{_line(key)}\t{_line(text)}\n" for key, text in lines))
        else:
            chosen = self._read(place)
        sampler = in_order(self, chosen.rows, self.eval_batch_size, chosen.draws)
        return loader(self, self.embeddings.evaluation_batch, sampler, self.num_workers)

    @property
    def real_rows(self) -> np.ndarray:
        """(N,) rows of all held-out images."""
        return self.embeddings.rows(Split.HELDOUT)

    def real_dataloader(self) -> DataLoader[Any]:
        """Load all held-out images."""
        sampler = in_order(self, self.real_rows, self.eval_batch_size)
        return loader(self, self.embeddings.upsampler_batch, sampler, self.num_workers)

    def _choose(self, place: dict[str, int]) -> RowBatch:
        """Take the keys with the smallest hashes, whose last bits choose the caption."""
        if len(place) < self.count:
            raise InputError(
                f"Expected {self.count} held-out images in {self.source}. Got {len(place)}: lower data.count, or pack "
                "more into shards called heldout-*.tar."
            )
        salt = str(self.choice_seed).encode()
        hashes = {
            key: blake2b(key.encode(errors="surrogateescape"), digest_size=16, key=salt).digest() for key in place
        }
        rows = {place[key]: key for key in sorted(hashes, key=hashes.__getitem__)[: self.count]}
        last = [int.from_bytes(hashes[rows[row]][-8:]) for row in sorted(rows)]
        found = np.array(sorted(rows))
        return RowBatch(found, np.array(last, np.uint64) % self.embeddings.caption_counts(found))

    def _read(self, place: dict[str, int]) -> RowBatch:
        """Find the listed captions among those of their images."""
        wanted: dict[int, str] = {}
        for line in read_lines(self.captions, "captions"):
            key, _, text = line.partition("\t")
            if key not in place or place[key] in wanted:
                raise InputError(
                    f"Expected a key of {self.source}, once, in each line of {self.captions}. Got {line!r}: correct "
                    "it, or name a new file to choose again."
                )
            wanted[place[key]] = text
        rows = np.array(sorted(wanted))
        draws, counts = np.full(len(rows), -1), self.embeddings.caption_counts(rows)
        for number in range(int(counts.max())):
            texts = self.embeddings.captions(RowBatch(rows, np.full(len(rows), number, np.uint64)))
            same = np.array([wanted[row] == _line(text) for row, text in zip(rows.tolist(), texts, strict=True)])
            draws[same & (draws < 0) & (number < counts)] = number
        if (draws < 0).any():
            missing = wanted[int(rows[(draws < 0).argmax()])]
            raise InputError(
                f"Expected captions of {self.source} in {self.captions}. Got {missing!r}, which its image does not "
                "have: correct it, or name a new file to choose again."
            )
        return RowBatch(rows, draws.astype(np.uint64))


def _line(text: str) -> str:
    """Return a text as one line of UTF-8."""
    return " ".join(text.encode("utf-8", "replace").decode().split())
