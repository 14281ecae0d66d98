"""What the commands that draw share: a run, the pictures that it is shown, bars, and the grid that is left.

Networks take seconds to import. They are imported under the first bar, so that it and the help come at once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.generation.pictures import Pictures, Row
    from unclip_pl.generation.pipeline import Unclip


class Studio(AbstractContextManager["Studio"]):
    """A context: the run is there and the bars stand while it is open.

    Args:
        run: to draw with, see :func:`~unclip_pl.generation.pipeline.find_run`.
        device: where to compute.
    """

    unclip: "Unclip"

    def __init__(self, run: str | None, device: str) -> None:
        self.run = run
        self.device = device
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns)

    def __enter__(self) -> "Studio":
        """Reads the run."""
        self.bars.start()
        try:
            reading = self.bars.add_task(f"reading {self.run or 'the run'}", total=None)
            from unclip_pl.generation.pipeline import Unclip

            self.unclip = Unclip.load(self.run, self.device)
            self.bars.update(reading, total=1, completed=1)
            self.say(f"drawn with {self.unclip.origin.text}")
        except BaseException:
            self.bars.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bars as they stand."""
        self.bars.stop()

    def bar(self, what: str, *, ways: int = 1) -> Callable[[int, int, "Tensor"], None]:
        """A bar for so many ways through a sampler's steps."""
        task = self.bars.add_task(what, total=None)

        def progress(done: int, total: int, x0: "Tensor") -> None:
            self.bars.update(task, advance=1, total=ways * total)

        return progress

    def open(self, paths: Sequence[str]) -> "Pictures":
        """Pictures at the larger of CLIP's size and the decoder's; says what was done to them.

        Raises:
            ValueError: none, or one that cannot be read; see :func:`~unclip_pl.generation.pictures.open_pictures`.
        """
        from unclip_pl.generation.pictures import open_pictures

        pictures = open_pictures(paths, max(self.unclip.clip.image_size, self.unclip.decoder.image_size))
        for path, note in zip(paths, pictures.notes, strict=True):
            if note:
                self.say(f"{path}: {note}")
        return pictures

    def warn_of_unknown(self, captions: Sequence[str]) -> None:
        """Name the words that the run's CLIP has never seen, if there are any."""
        if words := self.unclip.unknown_words(captions):
            self.say(f"warning: no caption that this run's CLIP was bundled with has: {', '.join(words)}")

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @cached_property
    def origin(self) -> dict[str, str]:
        """The run, and the commit of this code; of a bundle the weights' too."""
        from unclip_pl.generation.provenance import commit

        run, trained, _ = self.unclip.origin
        return {"run": run, "commit": commit()} | ({"trained at commit": trained} if trained else {})

    def save(self, path: str, image: "Tensor", facts: dict[str, object]) -> None:
        """An image (3, H, H) as a PNG that carries what made it: the facts, and :attr:`origin`."""
        from unclip_pl.generation.pictures import save_png, to_image

        save_png(to_image(image), path, facts | self.origin)

    def save_grid(self, path: str, rows: Sequence["Row"], columns: Sequence[str], facts: dict[str, object]) -> None:
        """A grid, likewise."""
        from unclip_pl.generation.pictures import grid, save_png

        save_png(grid(rows, columns), path, facts | self.origin)
        self.say(f"wrote {path}")
