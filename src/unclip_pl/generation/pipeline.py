"""Caption → embedding → image: a trained run, put together."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.diffusion import check_guidance
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import write_json
from unclip_pl.generation.bundle import exists, inside, read_content, read_provenance
from unclip_pl.generation.decoding import Decoder, Progress, Upsampler
from unclip_pl.generation.manipulation import Manipulations
from unclip_pl.generation.priors import Prior, TrueEmbedding
from unclip_pl.tasks.loading import check_classes
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

#: What describes a run, in its folder.
RUN = "run.json"

__all__ = [
    "Decoder",
    "Generation",
    "RunDescription",
    "Unclip",
    "Upsampler",
    "check_clip",
    "check_norm",
    "read_run",
    "write_run",
]


class Generation(NamedTuple):
    """Images of captions, and the embeddings that they were drawn from."""

    images: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) as the prior gave them: unit norm, or raw where it keeps the norm


@dataclass
class RunDescription:
    """``run.json``: what a run consists of, every path relative to its folder.

    Args:
        clip: the CLIP that conditions everything.
        decoder: and its upsamplers.
        priors: by name.
        judge: another CLIP, for scores; None in an imported run.
        store: folder of the training split's embeddings; empty in an imported run.
    """

    clip: ClipSpec
    decoder: Decoder
    priors: dict[str, Prior]
    judge: ClipSpec | None = None
    store: str = ""


class Origin(NamedTuple):
    """Where weights come from."""

    run: str  # the name of the folder
    commit: str  # of the code that trained them; empty if unknown
    text: str  # in a line

    @classmethod
    def of(cls, root: Path) -> Self:
        """Of a run's folder, or of a bundle."""
        if not root.is_file():
            return cls(root.resolve().name, "", str(root))
        told = read_provenance(root)
        run, commit = told.get("run", "unknown"), ", ".join(told.get("commits", [])) or "unknown"
        where = "the weights in this package" if root == DEMO else str(root)
        minutes = f"{told.get('seconds', 0) / 60:.0f} minutes on {told.get('hardware') or 'an unknown machine'}"
        return cls(run, commit, f"{where}: of the run {run}, trained at commit {commit} in {minutes}")


class Unclip(Manipulations):
    """A trained run. ``Unclip.load("runs/quickstart").generate(["a red star"])``."""

    def __init__(self, root: Path, clip: ClipEncoder, decoder: Decoder, priors: dict[str, Prior], device: str) -> None:
        self.root = root
        self.clip = clip
        self.decoder = decoder
        self.priors = priors
        self.device = device
        self._loaded: set[str] = set()

    @classmethod
    def load(cls, run: str | Path | None = None, device: str = "cpu") -> Self:
        """Read ``run.json`` and the decoder and CLIP it names; a prior is read when it is first used.

        Args:
            run: folder, or bundle; None is the quickstart's, or else the bundle of this package.
            device: where to compute.

        Raises:
            FileNotFoundError: there is no finished run.
            ValueError: no bundle, no such device, or decoder and CLIP do not belong together.
        """
        check_device(device)
        root = find_run(run)
        description = read_run(root)
        clip = description.clip.within(root).load().to(device)
        decoder = description.decoder.load(root, device)
        check_clip(clip.fingerprint, decoder.fingerprint, f"the decoder {root / decoder.checkpoint}")
        return cls(root, clip, decoder, description.priors, device)

    @property
    def origin(self) -> Origin:
        """Where its weights come from."""
        return Origin.of(self.root)

    def prior(self, name: str) -> Prior:
        """One of the run's priors, with its weights.

        Raises:
            ValueError: no prior of that name, or one of another CLIP.
        """
        if name not in self.priors:
            raise InputError(f"{self.root} has no prior {name!r}. Expected one of {', '.join(self.priors)}.")
        if name not in self._loaded:
            self.priors[name].load(self.root, self.device)
            check_clip(self.clip.fingerprint, self.priors[name].fingerprint, f"the prior {name!r}")
            check_norm(self.priors[name], self.decoder)
            self._loaded.add(name)
        return self.priors[name]

    def generate(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        prior: str = "diffusion",
        prior_guidance: float | None = None,
        candidates: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Generation:
        """``num`` images of each caption, one caption after the other.

        Args:
            captions: texts; an empty one is unconditional.
            num: images per caption.
            prior: name in the run.
            prior_guidance: of the prior; None keeps the run's.
            candidates: embeddings drawn for each image, the one nearest to its caption kept; None keeps the run's.
            guidance: of the decoder; None keeps the run's.
            seed: of every caption's first image, the next one's is one more: an image depends on its own seed alone.
            batch_size: images drawn at once.
            progress: called after every step of the decoder, once per batch.

        Raises:
            ValueError: nothing to draw, or a setting out of range.
        """
        if not captions or num < 1:
            raise InputError(f"Expected at least one caption and num >= 1. Got {len(captions)} and {num}.")
        check_guidance(self.decoder.guidance if guidance is None else guidance)
        chosen = self.prior(prior).adjusted(guidance=prior_guidance, candidates=candidates)
        text, seeds = self.clip.describe(list(captions)).repeat(num), _seeds(seed, num) * len(captions)
        z_i = torch.cat(
            [
                chosen.embed(text.rows(rows), generator=_streams(seeds[rows], "prior"))
                for rows in _batches(len(seeds), batch_size)
            ]
        )
        return self._decode(z_i, text, seeds, guidance, batch_size, progress)

    def decode(
        self,
        image_embed: Tensor,
        captions: Sequence[str] = ("",),
        *,
        num: int = 1,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Generation:
        """``num`` images of each embedding, one embedding after the other.

        Args:
            image_embed: (B, d), unit norm, or raw for a decoder of raw ones.
            captions: to go with them, one for all or as many.
            num: images per embedding.
            guidance: see :meth:`generate`.
            seed: see :meth:`generate`.
            batch_size: see :meth:`generate`.
            progress: see :meth:`generate`.

        Raises:
            ValueError: embeddings of another width, or that have lost their norm; other than as many captions.
        """
        b, d = len(image_embed), self.clip.embed_dim
        if image_embed.shape != (b, d) or len(captions) not in (1, b) or num < 1:
            raise InputError(
                f"Expected embeddings of shape (B, {d}), this CLIP's, one caption or B, and num >= 1. Got "
                f"{tuple(image_embed.shape)}, {len(captions)} and {num}."
            )
        unit = torch.allclose(image_embed.norm(dim=-1), torch.ones(b).to(image_embed), atol=1e-3)
        check_norm(TrueEmbedding(keep_norm=not unit), self.decoder)
        text = self.clip.describe(list(captions) * (b // len(captions)))
        z_i = image_embed.to(self.device).repeat_interleave(num, dim=0)
        return self._decode(z_i, text.repeat(num), _seeds(seed, num) * b, guidance, batch_size, progress)

    def _decode(
        self,
        z_i: Tensor,
        text: TextFeatures,
        seeds: list[int],
        guidance: float | None,
        batch_size: int,
        progress: Progress | None,
    ) -> Generation:
        images = [
            self.decoder.decode(
                z_i[rows],
                text.rows(rows),
                guidance=guidance,
                generator=_streams(seeds[rows], "decoder"),
                progress=progress,
            )
            for rows in _batches(len(seeds), batch_size)
        ]
        return Generation(torch.cat(images), z_i)


def _seeds(seed: int, num: int) -> list[int]:
    return list(range(seed, seed + num))


def _streams(seeds: Sequence[int], part: str) -> list[torch.Generator]:
    """One for each image. Each part has its own: two priors' images start from the same noise."""
    digests = (blake2b(f"{part} {seed}".encode(), digest_size=4).digest() for seed in seeds)
    return [torch.Generator().manual_seed(int.from_bytes(digest)) for digest in digests]


def _batches(rows: int, size: int) -> list[slice]:
    if size < 1:
        raise InputError(f"Expected batch_size >= 1. Got {size}.")
    return [slice(start, start + size) for start in range(0, rows, size)]


#: Where a run is looked for when none is named.
QUICKSTART, DEMO = Path("runs/quickstart"), Path(__file__).parents[1] / "demo.safetensors"


def find_run(run: str | Path | None) -> Path:
    """The run that is meant: the one named, else the quickstart's, else the bundle in this package."""
    if run:
        return Path(run)
    return DEMO if DEMO.is_file() and not (QUICKSTART / "run.json").is_file() else QUICKSTART


def check_device(device: str) -> None:
    """Found out before anything is read.

    Raises:
        ValueError: torch has no such device here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Expected a device of this machine, such as cpu. Got {device!r} ({reason:.200}).") from error


def check_clip(clip: str, other: str, what: str) -> None:
    """Two CLIPs never mix.

    Raises:
        ValueError: naming both.
    """
    if other and clip != other:
        raise InputError(
            f"This run's CLIP is {clip!r}, but {what} was trained on embeddings of {other!r}: train it again on this "
            "CLIP's embeddings, or point the run at the other CLIP."
        )


def check_norm(prior: Prior, decoder: Decoder) -> None:
    """A decoder of raw embeddings cannot draw from those that have lost their norm.

    Raises:
        ValueError: it would have to.
    """
    if decoder.needs_norm and not prior.keeps_norm:
        raise InputError(
            f"The decoder {decoder.checkpoint} was trained on raw embeddings, and {type(prior).__name__} gives them "
            "without CLIP's norm: use a prior with keep_norm, or a decoder of scaling 'unit'."
        )


def read_run(root: Path) -> RunDescription:
    """Parse ``run.json`` of a folder or a bundle.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the file is broken.
    """
    from jsonargparse import ArgumentParser

    path = root / RUN
    if not exists(path):
        raise MissingFileError(
            f"No run at {root}: expected {path}, which `unclip reproduce` (or `make quickstart`) writes, or a file of "
            "`unclip bundle`."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunDescription, "run")
    try:
        if place := inside(path):
            check_classes(content := read_content(place))  # data, perhaps somebody else's
        else:
            content = json.loads(path.read_text())
        return parser.instantiate_classes(parser.parse_object({"run": content})).run
    except Exception as error:
        raise InputError(f"{path} does not describe a run: {str(error).splitlines()[0]}") from error


def write_run(root: Path, description: dict[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    write_json(root / RUN, description, indent=2)
