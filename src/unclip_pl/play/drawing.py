"""Draw what the page asks for: a request in, pictures out, with estimates on the way."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.errors import InputError
from unclip_pl.generation.manipulation import Latent, Manipulator
from unclip_pl.generation.pictures import open_mask, open_pictures
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.priors import ARPriorSpec, DiffusionPriorSpec, LinearPriorSpec, TextEmbeddingSpec
from unclip_pl.play.known import Known, known_to

T = TypeVar("T")

#: Steps of an inversion: the commands take 100, which are more exact and take three times as long.
STEPS = 30
#: Pictures between two, both ends included, and angles of an edit.
STRIP, ANGLES = 9, 17
#: What a prior is, in words.
KINDS = {
    DiffusionPriorSpec: "diffusion over embeddings",
    ARPriorSpec: "the codes of an embedding, one by one",
    LinearPriorSpec: "a linear map of the caption's embedding",
    TextEmbeddingSpec: "no prior: the caption's own embedding z_t",
}


class Labelled(NamedTuple):
    """A picture with its label."""

    picture: Tensor  # (3, H, H) in [-1, 1]
    label: str = ""
    best: bool = False  # of its row


class Row(NamedTuple):
    """Pictures under a title."""

    title: str
    cells: list[Labelled]
    note: str = ""


class Frame(NamedTuple):
    """Everything that a request shows at one moment."""

    rows: list[Row]
    chosen: int | None = None  # cell of the last row that is shown large
    done: float = 1.0  # share of the work
    doing: str = ""  # empty at the end
    note: str = ""  # a warning


class Dot(NamedTuple):
    """An embedding on two axes."""

    at: tuple[float, float]
    told: str = ""
    color: str = "silver"


class Map(NamedTuple):
    """Where an embedding lies among others."""

    dots: list[Dot]
    own: Dot
    note: str


class Estimate(NamedTuple):
    """Pictures in the middle of a drawing."""

    pictures: Tensor  # (B, 3, H, H), what the network takes for the result
    done: float  # share of the steps


class Stopped(Exception):
    """Nobody waits for this drawing any more."""


class Easel:
    """Draws one thing at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._closed = Event()

    def close(self) -> None:
        """End what is drawn at its next step: Python waits for its threads when it ends."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def watch(self, draw: Callable[..., T], frame: Callable[[Estimate], Frame]) -> Generator[Frame, None, T]:
        """Yield frames of the newest estimates, and return what was drawn.

        When this generator is closed, the drawing ends at its next step.

        Args:
            draw: function that draws; it gets ``progress`` to be called after every step.
            frame: function that shows an estimate.
        """
        news: SimpleQueue[Estimate | None] = SimpleQueue()
        gone = Event()

        def progress(step: int, steps: int, x0: Tensor) -> None:
            if gone.is_set() or self._closed.is_set():
                raise Stopped
            news.put(Estimate(x0, step / steps))

        drawing = self._thread.submit(draw, progress=progress)
        drawing.add_done_callback(lambda _: news.put(None))
        try:
            while True:
                latest = news.get()
                while not news.empty():
                    latest = news.get()
                if latest is None:
                    return drawing.result()
                yield frame(latest)
        finally:
            gone.set()
            drawing.cancel()


class Playground:
    """Answers the requests of the page. Each answer is a stream of frames, of which the last is the result.

    Args:
        unclip: trained run.
    """

    def __init__(self, unclip: Unclip) -> None:
        self.unclip = unclip
        self.priors = {name: spec for name, spec in unclip.priors.items() if not unclip.prior(name).needs_image}
        self.easel = Easel()
        self.manipulator = Manipulator(unclip)

    def draw(self, caption: str, seed: int, guidance: float, num: int, candidates: int) -> Iterator[Frame]:
        """Draw a caption with every prior of the run, all from the same noise, and score the pictures.

        Args:
            caption: text; an empty one is unconditional.
            seed: seed of the first picture; the next has the next seed.
            guidance: guidance scale of the decoder.
            num: pictures of each prior.
            candidates: embeddings drawn for each picture, of which the one nearest to the caption is kept, where a
                prior can draw several; 0 keeps the run's number.

        Raises:
            InputError: a number is out of range.
        """
        rows: list[Row] = []
        note = self._unknown([caption])
        seeds = [f"seed {seed + i}" for i in range(num)]
        for name, spec in self.priors.items():
            draw = partial(
                self.unclip.generate,
                [caption],
                num=num,
                prior=name,
                candidates=candidates or None if hasattr(spec, "candidates") else None,
                guidance=guidance,
                seed=seed,
            )
            title = (name, KINDS.get(type(spec), ""))
            images, _ = yield from self.easel.watch(draw, partial(self._in_progress, rows, title, seeds))
            scores = self._scores(images, caption)
            cells = [
                Labelled(image, f"{label}: {score:.2f}", num > 1 and score == max(scores))
                for image, label, score in zip(images, seeds, scores, strict=True)
            ]
            rows.append(Row(title[0], cells, title[1]))
            yield Frame(list(rows), None, len(rows) / len(self.priors), "drawing", note)
        yield Frame(list(rows), note=note)

    def vary(self, picture: str | None, eta: float, num: int, seed: int) -> Iterator[Frame]:
        """Draw variations of a picture (§3.1 of the paper).

        Args:
            picture: image file.
            eta: 0 gives the picture back; as it grows to 1, what CLIP sees stays and the rest changes.
            num: variations.
            seed: seed of the noise.

        Raises:
            InputError: there is no picture, or the file is none.
        """
        head = self.given(picture)
        given = head.cells[0].picture[None]
        latent = yield from self._invert(given, [head])
        draw = partial(self.manipulator.vary, latent, num=num, eta=eta, seed=seed)
        yield from self._drawn(draw, [head], partial(_row, "variations", [""] * num))

    def between_pictures(self, first: str | None, second: str | None, at: float) -> Iterator[Frame]:
        """Draw what lies between two pictures (§3.2 of the paper).

        Args:
            first: image file.
            second: image file.
            at: place of the picture that is shown large, from 0, the first, to 1.

        Raises:
            InputError: a picture is missing, or a file is none.
        """
        given = torch.stack([self.given(path).cells[0].picture for path in (first, second)])
        latent = yield from self._invert(given, [])
        ends = (latent.at(slice(0, 1)), latent.at(slice(1, 2)))
        draw = partial(self.manipulator.interpolate, *ends, num=STRIP)
        yield from self._drawn(draw, [], partial(_row, "", _labels(STRIP)), at)

    def between_captions(self, first: str, second: str, seed: int, at: float) -> Iterator[Frame]:
        """Draw what lies between two captions, from the same noise all along.

        Args:
            first: text.
            second: text.
            seed: seed of all noise.
            at: place of the picture that is shown large, from 0, the first, to 1.
        """
        prior = next(iter(self.priors))
        draw = partial(self.manipulator.between_captions, first, second, num=STRIP, prior=prior, seed=seed)
        note = self._unknown([first, second])
        yield from self._drawn(draw, [], partial(_row, "", _labels(STRIP)), at, note=note)

    def edit(self, picture: str | None, current: str, caption: str, theta: float) -> Iterator[Frame]:
        """Change a picture by words: a text diff (§3.3 of the paper), at every angle.

        Args:
            picture: image file.
            current: what the picture shows; empty turns it towards the caption itself.
            caption: what it should show.
            theta: fraction of the angle at which the picture is shown large; the nearest of the strip.

        Raises:
            InputError: there is no picture, or CLIP cannot tell the captions apart.
        """
        head = self.given(picture)
        given = head.cells[0].picture[None]
        note = self._unknown([current, caption])
        latent = yield from self._invert(given, [head])
        thetas = torch.linspace(0, 1, ANGLES).tolist()
        draw = partial(self.manipulator.edit, latent, caption, current or None, thetas=thetas)
        title = f"{current} → {caption}" if current else f"→ {caption}"
        yield from self._drawn(draw, [head], partial(_row, title, _labels(ANGLES, "θ ")), theta, note=note)

    def inpaint(
        self,
        picture: str | None,
        brushed: np.ndarray | None,
        mask: str | None,
        caption: str,
        num: int,
        jumps: int,
        seed: int,
    ) -> Iterator[Frame]:
        """Draw a part of a picture again.

        Args:
            picture: image file.
            brushed: (H, W) bool over the picture's central square, True where it was painted; None for nothing.
            mask: image file of the picture's shape, white where it is drawn again, beside what was painted.
            caption: what the whole picture should show; empty draws after what CLIP sees of the picture.
            num: drawings.
            jumps: number of times that each step is walked again, so that the new part fits the old one.
            seed: seed of the first drawing.

        Raises:
            InputError: there is no picture, or the mask does not fit it.
        """
        given = self.given(picture).cells[0].picture[None]
        side = given.shape[-1]
        part = torch.zeros(1, 1, side, side, dtype=torch.bool)
        if brushed is not None:
            part |= F.adaptive_max_pool2d(torch.from_numpy(brushed)[None, None].float(), side) > 0
        if mask and picture:
            part |= open_mask(mask, picture, side)
        known = Row("what stays", [Labelled(given[0].masked_fill(part[0], 0.0))])
        empty = "" if part.any() else "Nothing is painted: the picture stays as it is."
        note = " ".join(filter(None, (empty, self._unknown([caption]))))
        prior, texts = next(iter(self.priors)), [caption] if caption else None
        draw = partial(self.unclip.inpaint, given, part, texts, num=num, jumps=jumps, seed=seed, prior=prior)
        labels = [f"seed {seed + i}" for i in range(num)]
        yield from self._drawn(lambda **more: draw(**more).images, [known], partial(_row, "drawn", labels), note=note)

    def look(self, picture: str | None, dims: int) -> Iterator[Frame]:
        """Draw a picture from the first principal dimensions of its embedding (§4 of the paper).

        Args:
            picture: image file.
            dims: number of dimensions of the drawing that is shown large; the strip has the powers of two beside it.

        Raises:
            InputError: there is no picture, or the decoder knows no principal axes.
        """
        head = self.given(picture)
        given = head.cells[0].picture[None]
        shown = sorted({*self.manipulator.dims(), *self.manipulator.dims([dims])})
        z_i = self.unclip.clip.encode_image(given.to(self.unclip.device))
        draw = partial(self.manipulator.probe, z_i, dims=shown, steps=STEPS)
        labels = [f"{n} of {shown[-1]}" for n in shown]
        at = shown.index(dims) / (len(shown) - 1)
        yield from self._drawn(draw, [head], partial(_row, "dimensions kept", labels), at, before=0.0)

    def place(self, picture: str | None) -> Map:
        """Return where a picture's embedding lies among those of the training set, on their two largest axes.

        Args:
            picture: image file.

        Raises:
            InputError: there is no picture, or the decoder knows no principal axes.
        """
        given = self.given(picture).cells[0].picture[None]
        (own,) = self._on_axes(self.unclip.clip.encode_image(given.to(self.unclip.device)))
        known = self._known
        dots = map(Dot, self._on_axes(known.image_embed), known.told, known.colors)
        return Map(list(dots), Dot(own, "this picture"), known.note)

    @cached_property
    def _known(self) -> Known:
        return known_to(self.unclip)

    def _on_axes(self, image_embed: Tensor) -> list[tuple[float, float]]:
        """Return the first two principal coordinates of embeddings (B, d)."""
        return [(x, y) for x, y, *_ in self.manipulator.coordinates(image_embed.to(self.unclip.device)).tolist()]

    def given(self, picture: str | None) -> Row:
        """Return an image file as the run sees it: its central square, and what was done to it.

        Raises:
            InputError: there is no file, or it is no picture.
        """
        if not picture:
            raise InputError("Expected a picture. Got none: choose a file, or click an example.")
        side = max(self.unclip.clip.image_size, self.unclip.decoder.output_size)
        pictures = open_pictures([picture], side)
        return Row("given", [Labelled(pictures.pixels[0])], pictures.notes[0])

    def _drawn(
        self,
        draw: Callable[..., Tensor],
        head: list[Row],
        row: Callable[[Tensor], Row],
        at: float | None = None,
        *,
        before: float = 0.5,
        note: str = "",
    ) -> Iterator[Frame]:
        """Yield a row of pictures while it is drawn, and when it is.

        Args:
            draw: function that draws B pictures.
            head: rows that stand before it.
            row: function that labels B pictures.
            at: place of the picture that is shown large, 0 to 1; None shows none.
            before: share of the work that is done.
            note: warning.
        """

        def frame(pictures: Tensor, done: float, doing: str) -> Frame:
            chosen = None if at is None else round(at * (len(pictures) - 1))
            return Frame([*head, row(pictures)], chosen, done, doing, note)

        images = yield from self.easel.watch(
            draw, lambda x: frame(x.pictures, before + (1 - before) * x.done, "drawing")
        )
        yield frame(images, 1.0, "")

    def _invert(self, pictures: Tensor, head: list[Row]) -> Generator[Frame, None, Latent]:
        draw = partial(self.manipulator.invert, pictures, steps=STEPS)
        return (
            yield from self.easel.watch(draw, lambda x: Frame(head, None, x.done / 2, "finding the picture's noise"))
        )

    def _unknown(self, captions: Sequence[str]) -> str:
        words = self.unclip.unknown_words(captions)
        return f"No caption that this run's CLIP was bundled with has: {', '.join(words)}." if words else ""

    def _in_progress(self, rows: list[Row], title: tuple[str, str], labels: list[str], estimate: Estimate) -> Frame:
        """Return what is finished, and estimates of the next row."""
        cells = [Labelled(picture, label) for picture, label in zip(estimate.pictures, labels, strict=True)]
        done = (len(rows) + estimate.done) / len(self.priors)
        return Frame([*rows, Row(title[0], cells, title[1])], None, done, f"{title[0]} draws")

    def _scores(self, images: Tensor, caption: str) -> list[float]:
        """Return the cosines of pictures and their caption, by the CLIP that conditioned them."""
        z_t = self.unclip.clip.describe([caption]).embed
        return [round(x, 2) for x in F.cosine_similarity(self.unclip.clip.encode_image(images), z_t).tolist()]


def _row(title: str, labels: Sequence[str], pictures: Tensor) -> Row:
    return Row(title, [Labelled(picture, label) for picture, label in zip(pictures, labels, strict=True)])


def _labels(n: int, sign: str = "") -> list[str]:
    return [f"{sign}{round(i / (n - 1), 2):g}" for i in range(n)]


def painted(editor: Mapping[str, Any] | None) -> np.ndarray | None:
    """Return what was painted in an editor, (H, W) bool; None for nothing.

    Args:
        editor: the editor's ``layers``, (H, W, 4) uint8 each; a layer is painted where it is not transparent.
    """
    layers = editor["layers"] if editor else []
    return np.any([layer[..., 3] > 0 for layer in layers], axis=0) if layers else None
