"""Keep pictures in one file: a sheet of rows and columns, pixel for pixel."""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip_pl.files import replacing
from unclip_pl.generation.pictures import to_image

#: Version of the cells' form.
FORMAT = 1
#: Column of the true pictures.
REAL = "real"


class Sheet(NamedTuple):
    """Square pictures in rows and columns."""

    images: Tensor  # (R, C, 3, H, H) in [-1, 1]
    rows: list[str]
    columns: list[str]

    def joined(self) -> Tensor:
        """Return (3, R · H, C · H) in [-1, 1], picture beside picture."""
        return self.images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def save(self, path: Path) -> None:
        """Write a PNG file."""
        with replacing(path) as temporary:
            to_image(self.joined()).save(temporary, "PNG")

    @classmethod
    def load(cls, path: Path, rows: list[str], columns: list[str]) -> Self:
        """Read a file of :meth:`save` and cut it into its pictures."""
        sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        cells = sheet.unflatten(2, (len(columns), -1)).unflatten(1, (len(rows), -1))  # (3, R, H, C, H)
        return cls(cells.permute(1, 3, 0, 2, 4).float().div(127.5).sub(1), rows, columns)


def sheet_path(cell: Path, name: str) -> Path:
    """Return the file of one of a cell's sheets: ``CELL.png`` for its grid, ``CELL-NAME.png`` for another."""
    return cell.with_name(f"{cell.stem}.png" if name == "grid" else f"{cell.stem}-{name}.png")
