"""Draw what the page asks for: a request in, pictures out, with estimates on the way."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.nn import functional as F

from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.priors import ARPriorSpec, DiffusionPriorSpec, LinearPriorSpec, TextEmbeddingSpec

T = TypeVar("T")

#: What a prior is, in words.
KINDS = {
    DiffusionPriorSpec: "diffusion over embeddings",
    ARPriorSpec: "the codes of an embedding, one by one",
    LinearPriorSpec: "a linear map of the caption's embedding",
    TextEmbeddingSpec: "no prior: the caption's own embedding z_t",
}


class Cell(NamedTuple):
    """A picture with its label."""

    picture: Tensor  # (3, H, H) in [-1, 1]
    label: str = ""
    best: bool = False  # of its row


class Row(NamedTuple):
    """Pictures under a title."""

    title: str
    cells: list[Cell]
    note: str = ""


class Frame(NamedTuple):
    """Everything that a request shows at one moment."""

    rows: list[Row]
    done: float = 1.0  # share of the work
    doing: str = ""  # empty at the end
    note: str = ""  # a warning


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
            if gone.is_set():
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
        self._easel = Easel()

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
            images, _ = yield from self._easel.watch(draw, partial(self._in_progress, rows, title, seeds))
            scores = self._scores(images, caption)
            cells = [
                Cell(image, f"{label}: {score:.2f}", num > 1 and score == max(scores))
                for image, label, score in zip(images, seeds, scores, strict=True)
            ]
            rows.append(Row(title[0], cells, title[1]))
            yield Frame(list(rows), len(rows) / len(self.priors), "drawing" if len(rows) < len(self.priors) else "")

    def _in_progress(self, rows: list[Row], title: tuple[str, str], labels: list[str], estimate: Estimate) -> Frame:
        """Return what is finished, and estimates of the next row."""
        cells = [Cell(picture, label) for picture, label in zip(estimate.pictures, labels, strict=True)]
        done = (len(rows) + estimate.done) / len(self.priors)
        return Frame([*rows, Row(title[0], cells, title[1])], done, f"{title[0]} draws")

    def _scores(self, images: Tensor, caption: str) -> list[float]:
        """Return the cosines of pictures and their caption, by the CLIP that conditioned them."""
        z_t = self.unclip.clip.describe([caption]).embed
        return [round(x, 2) for x in F.cosine_similarity(self.unclip.clip.encode_image(images), z_t).tolist()]
