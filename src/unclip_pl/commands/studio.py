"""What the commands that draw share: their options, a run, the pictures that they are given, bars, and the result.

Networks take seconds to import. They are imported under the first bar, so that it and the help come at once.
"""

import webbrowser
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.imports import kept

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_pl.diffusion import Sampler
    from unclip_pl.generation.manipulation import Latent, Manipulator
    from unclip_pl.generation.pictures import Pictures, Row
    from unclip_pl.generation.pipeline import Unclip


#: Classes of :mod:`unclip_pl.diffusion` that draw.
Solver = Literal["Ancestral", "DDIM", "DPMSolver", "Heun"]


@dataclass(frozen=True)
class RunOptions:
    """Options of every command that draws.

    Args:
        run: folder with run.json, a bundle, or the name of weights in the package (shapes); without it runs/quickstart,
            or else shapes.
        out: PNG file to write; without it, a file in this folder with the command's name.
        seed: base seed of every random draw.
        device: device to compute on.
    """

    run: str | None = None
    out: str = ""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class PictureOptions(RunOptions):
    """Options of every command that takes pictures.

    Args:
        steps: steps of DDIM, each way; more are more exact.
        guidance: guidance scale of the decoder, both ways; 1 is off, and the most exact.
    """

    steps: PositiveInt = 100
    guidance: NonNegativeFloat = 1.0


@dataclass(frozen=True)
class CaptionOptions(RunOptions):
    """Options of every command that draws captions. What is left out is as the run has it.

    Args:
        guidance: guidance scale of the decoder; 1 is off.
        solver: solver of the decoder, with its default settings.
        steps: number of times that the decoder's solver visits.
        prior: name of one of the run's priors; without it diffusion.
        prior_guidance: guidance scale of the prior.
        prior_solver: solver of a diffusion prior.
        prior_steps: number of times that a diffusion prior's solver visits.
        candidates: embeddings drawn for each image, of which the one nearest to the caption is kept.
    """

    guidance: NonNegativeFloat | None = None
    solver: Solver | None = None
    steps: PositiveInt | None = None
    prior: str | None = None
    prior_guidance: NonNegativeFloat | None = None
    prior_solver: Solver | None = None
    prior_steps: PositiveInt | None = None
    candidates: PositiveInt | None = None

    def of_decoder(self) -> dict[str, Any]:
        """Return the decoder's settings that were given."""
        return self._given("guidance", "solver", "steps")

    def of_prior(self) -> dict[str, Any]:
        """Return the prior's name and settings that were given."""
        return self._given("prior", "prior_guidance", "prior_solver", "prior_steps", "candidates")

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def check_out(out: str, reads: Sequence[str], *, folder: bool = False) -> None:
    """Refuse, before anything is drawn, what could not be written afterwards.

    Args:
        out: PNG file, or a folder.
        reads: files that the command reads.
        folder: whether it may be a folder.

    Raises:
        InputError: it has another ending, is a folder or lies below a file, or is one of the files that are read.
    """
    path = Path(out)
    if path.suffix.lower() not in (("", ".png") if folder else (".png",)):
        what = "a .png file, or a folder" if folder else "a .png file"
        raise InputError(f"Expected out to be {what}. Got {out}: change its ending.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"Expected out inside a folder. Got {out}, and {above} is a file: name another out.")
    if path.is_dir() and path.suffix:
        raise InputError(f"Expected out to be a file. Got {out}, which is a folder: name another out.")
    if path.exists() and any(Path(read).exists() and path.samefile(read) for read in reads):
        raise InputError(f"Expected out to be a new picture. Got {out}, which is read: name another out.")


class Studio(AbstractContextManager["Studio"]):
    """A context in which a run is loaded, pictures are open, and progress bars stand.

    Args:
        command: word on the command line.
        options: options that the commands share.
        paths: image files to open; None for a command that takes none.
        also: other files that the command reads.
        folder: ``out`` may be a folder.
        stderr: print bars and lines to stderr, since something else is printed to stdout.

    Raises:
        InputError: there are no files, one is missing or would be written over, ``out`` cannot be a file, or ``seed``
            is no number of 64 bits.
    """

    unclip: "Unclip"
    pictures: "Pictures"

    def __init__(
        self,
        command: str,
        options: RunOptions,
        paths: Sequence[str] | None = None,
        *,
        also: Sequence[str] = (),
        folder: bool = False,
        stderr: bool = False,
    ) -> None:
        self.options = options
        self.out = options.out or f"{command}.png"
        self.paths = paths
        if paths is not None:
            check_files(paths)  # now, and not after the networks are read
        check_out(self.out, [*(paths or []), *also], folder=folder)
        if not -(2**63) <= options.seed < 2**64:
            raise InputError(f"Expected a seed of 64 bits. Got {options.seed}: give a smaller number.")
        title = TextColumn("{task.description}", markup=False)
        console = Console(stderr=stderr)
        self.bars = Progress(title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)

    def __enter__(self) -> "Studio":
        """Read the run, then the pictures."""
        self.bars.start()
        try:
            reading = self.bars.add_task(f"reading {self.options.run or 'the run'}", total=None)
            with kept():
                from unclip_pl.generation.pipeline import Unclip

            self.unclip = Unclip.load(self.options.run, self.options.device)
            self.bars.update(reading, total=1, completed=1)
            self.say(f"drawn with {self.unclip.origin.text}")
            if self.paths is not None:
                self._open(self.paths)
        except BaseException:
            self.bars.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they stand."""
        self.bars.stop()

    def _open(self, paths: Sequence[str]) -> None:
        from unclip_pl.generation.pictures import open_pictures

        self.pictures = open_pictures(paths, max(self.unclip.clip.image_size, self.unclip.decoder.output_size))
        for path, note in zip(paths, self.pictures.notes, strict=True):
            if note:
                self.say(f"{path}: {note}")

    @cached_property
    def manipulator(self) -> "Manipulator":
        """What inverts pictures and draws them changed."""
        from unclip_pl.generation.manipulation import Manipulator

        return Manipulator(self.unclip)

    def invert(self) -> "Latent":
        """Return the latents of the pictures."""
        assert isinstance(self.options, PictureOptions)
        steps, guidance = self.options.steps, self.options.guidance
        bar = self.bar("inverting")
        return self.manipulator.invert(self.pictures.pixels, steps=steps, guidance=guidance, progress=bar)

    def decoder_settings(self) -> dict[str, Any]:
        """Return what the options ask of the decoder, as arguments of :meth:`Unclip.decode`."""
        options = self.options
        assert isinstance(options, CaptionOptions)
        sampler = _sampler(self.unclip.decoder.sampler, options.solver, options.steps)
        return {"guidance": options.guidance, "sampler": sampler}

    def prior_settings(self) -> dict[str, Any]:
        """Return what the options ask of the prior, as arguments of :meth:`Unclip.generate`."""
        options = self.options
        assert isinstance(options, CaptionOptions)
        prior = options.prior or "diffusion"
        sampler = _sampler(self.unclip.prior(prior).sampler, options.prior_solver, options.prior_steps)
        given = {"prior": prior, "prior_guidance": options.prior_guidance, "candidates": options.candidates}
        return given | {"prior_sampler": sampler}

    def bar(self, what: str, *, ways: int = 1) -> Callable[[int, int, "Tensor"], None]:
        """Add a bar for so many ways through a solver's steps, and return what moves it."""
        task = self.bars.add_task(what, total=None)

        def progress(done: int, total: int, x0: "Tensor") -> None:
            self.bars.update(task, advance=1, total=ways * total)

        return progress

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, path: str) -> None:
        """Open a picture with the program that this machine has for it."""
        if not webbrowser.open(Path(path).resolve().as_uri()):
            self.say(f"no program here opens {path}")

    def warn_of_unknown(self, captions: Sequence[str]) -> None:
        """Name the words that the run's CLIP has never seen, if there are any."""
        if words := self.unclip.unknown_words(captions):
            self.say(f"warning: no caption that this run's CLIP was bundled with has: {', '.join(words)}")

    @cached_property
    def origin(self) -> dict[str, str]:
        """The run and the commit of this code; for a bundle, the commit of the training too."""
        from unclip_pl.origin import commit

        run, trained, _ = self.unclip.origin
        return {"run": run, "commit": commit()} | ({"trained at commit": trained} if trained else {})

    def save(self, path: str, image: "Tensor", facts: dict[str, object]) -> None:
        """Write an image (3, H, H) as a PNG that carries the facts that made it, and :attr:`origin`."""
        from unclip_pl.generation.pictures import save_png, to_image

        save_png(to_image(image), path, facts | self.origin)

    def save_grid(
        self, rows: Sequence["Row"], columns: Sequence[str], facts: dict[str, object], path: str | None = None
    ) -> None:
        """Write a labelled grid as such a PNG, to ``path`` or the command's ``out``.

        A command that takes pictures adds its pictures, seed, steps and guidance to the facts.
        """
        from unclip_pl.generation.pictures import grid, save_png

        if isinstance(self.options, PictureOptions):
            seed, steps, guidance = self.options.seed, self.options.steps, self.options.guidance
            given = {"pictures": ", ".join(self.pictures.names)}
            facts = given | facts | {"seed": seed, "steps": steps, "guidance": guidance}
        save_png(grid(rows, columns), path or self.out, facts | self.origin)
        self.say(f"wrote {path or self.out}")


def _sampler(own: "Sampler | None", solver: Solver | None, steps: int | None) -> "Sampler | None":
    """Return the solver that was asked for; None for the run's own."""
    if solver is not None:
        from unclip_pl import diffusion

        own = getattr(diffusion, solver)()
    if steps is None:
        return None if solver is None else own
    if own is None:
        raise InputError("Expected a prior that takes steps, for --prior_steps. Got one that takes none: leave it out.")
    return own.with_steps(int(steps))


def check_files(paths: Sequence[str]) -> None:
    """Refuse what is not a file before anything slow is imported."""
    if not paths:
        raise InputError("Expected one image file or more. Got none: name some, such as photo.jpg.")
    for path in map(Path, paths):
        if path.is_dir():
            raise InputError(f"Expected an image file. Got the directory {path}: name files, such as {path}/*.png.")
        if not path.is_file():
            raise MissingFileError(f"No file at {path}: name an image that is there.")
