"""Caption → embedding → image: a trained run, put together."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.diffusion import Progress, Sampler, check_guidance
from unclip_pl.errors import InputError
from unclip_pl.generation.bundle import read_notes
from unclip_pl.generation.decoding import Canvas, Decoder, resize
from unclip_pl.generation.priors import Prior, PriorSpec, TrueEmbedding, TrueEmbeddingSpec
from unclip_pl.generation.provenance import trained_on_shapes
from unclip_pl.generation.run import (
    Origin,
    check_clip,
    check_device,
    check_norm,
    find_run,
    name_run,
    open_parts,
    read_run,
)
from unclip_pl.types import TextFeatures


class Generation(NamedTuple):
    """Images of captions, and the embeddings that they were drawn from."""

    images: Tensor  # (B, 3, H, H) in [-1, 1]
    image_embed: Tensor  # (B, d) from the prior: of unit norm, or raw where it keeps the norm


class Unclip:
    """A trained run: ``Unclip.load("runs/quickstart").generate(["a red star"])``.

    Args:
        root: folder of the run.
        clip: the CLIP that conditions everything.
        decoder: loaded decoder with its upsamplers.
        priors: specs of the run's priors by name; a prior is loaded when it is first used.
        device: where to compute.
        origin: where the weights come from.
    """

    def __init__(
        self,
        root: Path,
        clip: ClipEncoder,
        decoder: Decoder,
        priors: dict[str, PriorSpec],
        device: str,
        origin: Origin,
    ) -> None:
        self.root = root
        self.clip = clip
        self.decoder = decoder
        self.priors = priors
        self.device = device
        self.origin = origin
        self._loaded: dict[str, Prior] = {}

    @classmethod
    def load(cls, run: str | Path | None = None, device: str = "cpu") -> Self:
        """Read ``run.json``, and CLIP and the decoder that it names.

        Args:
            run: folder, bundle, or name of weights in this package, such as ``shapes``; None means ``runs/quickstart``,
                or ``shapes`` where that is missing.
            device: where to compute.

        Raises:
            MissingFileError: there is no finished run.
            InputError: the bundle is damaged, there is no such device, or decoder and CLIP do not belong together.
        """
        check_device(device)
        root = find_run(run)
        description = read_run(root)
        parts = open_parts(root, description.clip, device=device, decoder=description.decoder)
        assert parts.clip is not None
        assert parts.decoder is not None
        return cls(root, parts.clip, parts.decoder, description.priors, device, Origin.of(root, name_run(run)))

    def unknown_words(self, captions: Sequence[str]) -> list[str]:
        """Return the words of captions that a bundle's CLIP has never seen; none for a run with a whole CLIP."""
        tokens = read_notes(self.root).get("tokens")
        if tokens is None:
            return []
        tokenizer, known = self.clip.tokenizer, set(tokens)
        words = (word for text in captions for word in tokenizer.pat.findall(tokenizer.clean_fn(text)))
        return list(dict.fromkeys(word for word in words if not known.issuperset(tokenizer.encode(word))))

    def prior(self, name: str) -> Prior:
        """Return one of the run's priors, loaded.

        Raises:
            InputError: there is no prior of that name, or it belongs to another CLIP.
        """
        if name not in self.priors:
            names = ", ".join(self.priors) or "none"
            raise InputError(f"{self.origin.run} has no prior {name!r}. Expected one of {names}: choose one of them.")
        if name not in self._loaded:
            prior = self.priors[name].load(self.root, self.device)
            check_clip(self.clip.fingerprint, prior.fingerprint, f"the prior {name!r}")
            check_norm(prior, self.decoder)
            self._loaded[name] = prior
        return self._loaded[name]

    def generate(
        self,
        captions: Sequence[str],
        *,
        num: int = 1,
        prior: str = "diffusion",
        prior_guidance: float | None = None,
        prior_sampler: Sampler | None = None,
        candidates: int | None = None,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Generation:
        """Draw ``num`` images of each caption, one caption after the other.

        Args:
            captions: texts; an empty one draws without a condition.
            num: images per caption.
            prior: name of one of the run's priors.
            prior_guidance: guidance scale of the prior; None keeps the run's.
            prior_sampler: solver of the prior; None keeps the run's.
            candidates: embeddings drawn for each image, the one nearest to its caption kept; None keeps the run's.
            guidance: guidance scale of the decoder; None keeps the run's.
            sampler: solver of the decoder; None keeps the run's.
            seed: seed of every caption's first image; the next image has the next seed, and depends on it alone.
            batch_size: images drawn at once.
            progress: called after every step of the decoder, for each batch.

        Raises:
            InputError: there is nothing to draw, or a setting is out of range.
        """
        captions = listed(captions)
        if not captions or num < 1:
            raise InputError(f"Expected a caption and num >= 1. Got {len(captions)} and {num}: ask for an image.")
        check_guidance(self.decoder.spec.guidance if guidance is None else guidance)
        self.decoder.check(sampler or self.decoder.sampler)
        chosen = self.prior(prior).adjusted(guidance=prior_guidance, candidates=candidates, sampler=prior_sampler)
        text, seeds = self.clip.describe(list(captions)).repeat(num), _seeds(seed, num) * len(captions)
        z_i = _embed(chosen, text, seeds, batch_size)
        return self._decode(z_i, text, seeds, guidance, sampler, batch_size, progress)

    def decode(
        self,
        image_embed: Tensor,
        captions: Sequence[str] = ("",),
        *,
        num: int = 1,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Generation:
        """Draw ``num`` images of each embedding, one embedding after the other. Options are those of :meth:`generate`.

        Args:
            image_embed: (B, d) z_i of unit norm, or raw for a decoder of raw embeddings.
            captions: one caption for all embeddings, or B.
            num: images per embedding.
            guidance: guidance scale of the decoder; None keeps the run's.
            sampler: solver of the decoder; None keeps the run's.
            seed: seed of every embedding's first image.
            batch_size: images drawn at once.
            progress: called after every step of the decoder, for each batch.

        Raises:
            InputError: the embeddings have another width or have lost their norm, or captions are neither one nor B.
        """
        image_embed, captions = image_embed.float(), listed(captions)
        b, d = len(image_embed), self.clip.embed_dim
        if not b or image_embed.shape != (b, d) or len(captions) not in (1, b) or num < 1:
            raise InputError(
                f"Expected embeddings of shape (B, {d}), this CLIP's, one caption or B, and num >= 1. Got "
                f"{tuple(image_embed.shape)}, {len(captions)} and {num}: make them fit."
            )
        unit = torch.allclose(image_embed.norm(dim=-1), torch.ones(b).to(image_embed), atol=1e-3)
        check_norm(TrueEmbedding(TrueEmbeddingSpec(), keeps_norm=not unit), self.decoder)
        text = self.clip.describe(list(captions) * (b // len(captions)))
        z_i = image_embed.to(self.device).repeat_interleave(num, dim=0)
        return self._decode(z_i, text.repeat(num), _seeds(seed, num) * b, guidance, sampler, batch_size, progress)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        captions: Sequence[str] | None = None,
        *,
        num: int = 1,
        jumps: int = 0,
        prior: str = "diffusion",
        prior_guidance: float | None = None,
        prior_sampler: Sampler | None = None,
        candidates: int | None = None,
        guidance: float | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Generation:
        """Draw a part of pictures again, ``num`` times each, one picture after the other; the rest stays as it is.

        Other options are those of :meth:`generate`.

        Args:
            images: (B, 3, s, s) in [-1, 1]; of another side than the run's pictures, they are resized.
            mask: (B, 1, s, s) or (1, 1, s, s) bool, True where pixels are drawn.
            captions: what the whole pictures show, one for all or B; None takes z_i from the pictures themselves.
            num: drawings of each picture.
            jumps: number of times that each step is walked again (RePaint), which takes as many times longer.

        Raises:
            InputError: pictures, mask and captions do not fit together, or a setting is out of range.
        """
        b, size = len(images), self.decoder.output_size
        if mask.shape not in ((b, 1, *images.shape[2:]), (1, 1, *images.shape[2:])) or num < 1:
            raise InputError(
                f"Expected num >= 1 and a mask for {tuple(images.shape)}, of one channel, for each picture or for all. "
                f"Got {num} and {tuple(mask.shape)}: make them fit."
            )
        captions = None if captions is None else listed(captions)
        if captions is not None and len(captions) not in (1, b):
            raise InputError(f"Expected one caption or {b}, one for each picture. Got {len(captions)}: make them fit.")
        self.decoder.check(sampler or self.decoder.sampler)
        images, seeds = images.to(self.device), _seeds(seed, num) * b
        text = self.clip.describe([""] * b if captions is None else list(captions) * (b // len(captions))).repeat(num)
        if captions is None:
            z_i = self.clip.encode_image(images).repeat_interleave(num, dim=0)
        else:
            chosen = self.prior(prior).adjusted(guidance=prior_guidance, candidates=candidates, sampler=prior_sampler)
            z_i = _embed(chosen, text, seeds, batch_size)
        open_part = F.adaptive_max_pool2d(mask.to(self.device).float(), size).expand(b, -1, -1, -1) > 0
        known, open_part = (x.repeat_interleave(num, dim=0) for x in (resize(images, size), open_part))
        canvas = Canvas(known, open_part, jumps)
        return self._decode(z_i, text, seeds, guidance, sampler, batch_size, progress, canvas)

    def outpaint(self, images: Tensor, captions: Sequence[str], *, canvas: float = 1.5, **settings: Any) -> Generation:
        """Draw what lies around pictures: :meth:`inpaint` on a larger canvas, with each picture in its middle.

        Args:
            images: (B, 3, s, s) in [-1, 1].
            captions: what the whole canvas shows, one for all or B.
            canvas: side of the canvas in sides of the picture. The result has the size of the run's pictures.
            settings: further options of :meth:`inpaint`.

        Raises:
            InputError: the run was trained on shapes, the canvas is not larger, or it leaves nothing of the picture.
        """
        if trained_on_shapes(self.root):
            raise InputError(
                f"Expected a run whose pictures may go on beyond their edge, for a larger canvas. Got "
                f"{self.origin.run}, trained on whole shapes alone, with nothing around them: use a mask inside of the "
                "picture, or a run on other data."
            )
        size = self.decoder.output_size
        inner = round(size / canvas) if canvas > 1 else size
        if not 0 < inner < size:
            raise InputError(f"Expected a canvas larger than the picture, such as 1.5. Got {canvas:g}: change it.")
        before = (size - inner) // 2
        frame = (before, size - inner - before) * 2
        known = F.pad(resize(images, inner), frame)
        mask = F.pad(torch.zeros(1, 1, inner, inner, dtype=torch.bool), frame, value=True)
        return self.inpaint(known, mask, captions, **settings)

    def _decode(
        self,
        z_i: Tensor,
        text: TextFeatures,
        seeds: list[int],
        guidance: float | None,
        sampler: Sampler | None,
        batch_size: int,
        progress: Progress | None,
        canvas: Canvas | None = None,
    ) -> Generation:
        images = [
            self.decoder.decode(
                z_i[rows],
                text.rows(rows),
                guidance=guidance,
                sampler=sampler,
                canvas=None if canvas is None else canvas.rows(rows),
                generator=streams(seeds[rows], "decoder"),
                progress=progress,
            )
            for rows in _batches(len(seeds), batch_size)
        ]
        return Generation(torch.cat(images), z_i)


def _embed(prior: Prior, text: TextFeatures, seeds: list[int], batch_size: int) -> Tensor:
    """Draw one z_i for each caption, (B, d), in batches."""
    batches = _batches(len(seeds), batch_size)
    return torch.cat([prior.embed(text.rows(rows), generator=streams(seeds[rows], "prior")) for rows in batches])


def listed(captions: Sequence[str]) -> Sequence[str]:
    """Return captions, one of them in a list: a text would count as many captions of a letter each."""
    return [captions] if isinstance(captions, str) else captions


def _seeds(seed: int, num: int) -> list[int]:
    return list(range(seed, seed + num))


def streams(seeds: Sequence[int], part: str) -> list[torch.Generator]:
    """Return one generator per image. The decoder has its own, so that two priors' images start from the same noise."""
    digests = (blake2b(f"{part} {seed}".encode(), digest_size=4).digest() for seed in seeds)
    return [torch.Generator().manual_seed(int.from_bytes(digest)) for digest in digests]


def _batches(rows: int, size: int) -> list[slice]:
    if size < 1:
        raise InputError(f"Expected batch_size >= 1. Got {size}: draw at least one image at once.")
    return [slice(start, start + size) for start in range(0, rows, size)]
