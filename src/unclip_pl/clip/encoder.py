"""One class around open_clip: frozen, always in eval mode, and with a fingerprint that tells two CLIPs apart."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import is_checkpoint, load_plain, read_checkpoint, require_finite, state_of, why_not_plain
from unclip_pl.types import TextFeatures

log = logging.getLogger(__name__)

#: What a TorchScript archive, OpenAI's weights and those of older transformers hold besides parameters.
_BESIDE = (
    *("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"),
    "text.transformer.embeddings.position_ids",
)
#: Messages that open_clip sends through the root logger, and that it raises or means as well.
CHATTER = ("No pretrained weights loaded", "Failed to download weights")


@cache
def _set_up_open_clip() -> None:
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith(CHATTER))
    open_clip.add_model_config(Path(str(files("unclip_pl.clip") / "model_configs")))


def architecture(name: str) -> dict[str, Any]:
    """Return open_clip's model config of ``name``: one of its own names, one of ours, or ``local-dir:PATH``.

    Raises:
        InputError: the name is unknown.
    """
    _set_up_open_clip()
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist: give a local-dir: folder with an open_clip_config.json.")
        try:
            return dict(json.loads(path.read_bytes())["model_cfg"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"Expected a JSON object with model_cfg in {path}. Got {error!r}: correct it.") from error
    config = open_clip.get_model_config(name)
    if config is None:
        raise InputError(f"Expected a CLIP that open_clip knows, or local-dir:PATH. Got {name!r}: correct clip.name.")
    return config


def build_clip(name: str, pretrained: str = "") -> Any:
    """Build open_clip's model of an architecture: trainable, and random unless ``pretrained`` names weights.

    Args:
        name: architecture, see :func:`architecture`.
        pretrained: an open_clip tag, a weights file, a checkpoint of ``ClipTask``, or nothing (random weights).

    Raises:
        MissingFileError: no such file.
        InputError: weights of another architecture, a damaged file, or a tag that cannot be downloaded.
    """
    text = _text_of_transformers(name)
    if name.startswith("local-dir:"):
        try:
            return open_clip.create_model(name, pretrained=pretrained or None, **text)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"The CLIP {name} cannot be built ({type(error).__name__}: {reason:.300}): correct the folder."
            ) from error
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        return _with_tag(name, pretrained, text)
    settings = _preprocessing_of_tags(name)
    model = open_clip.create_model(name, load_weights=False, force_preprocess_cfg=settings, **text)
    if pretrained:
        _load_weights(model, name, pretrained)
    return model


def _text_of_transformers(name: str) -> dict[str, Any]:
    """Return ``text_cfg`` for open_clip where the text tower is one of transformers': built by its config, random."""
    text = architecture(name).get("text_cfg", {})
    if not text.get("hf_model_name"):
        return {}
    transformers_config(name)  # one clear line where it is missing
    return {"text_cfg": text | {"hf_model_name": _place_of_transformers(name), "hf_model_pretrained": False}}


def _place_of_transformers(name: str) -> str:
    """Return the folder of that name beside ``open_clip_config.json``, or the name that the hub knows."""
    text = str(architecture(name)["text_cfg"]["hf_model_name"])
    beside = Path(name.removeprefix("local-dir:")) / text
    return str(beside) if name.startswith("local-dir:") and beside.is_dir() else text


def transformers_config(name: str) -> Any:
    """Return the config of a text tower that is one of transformers'.

    Raises:
        InputError: transformers is not installed, or the config is not here and cannot be downloaded.
    """
    source = architecture(name)["text_cfg"]["hf_model_name"]
    with _fetched(name, f"The text tower of {name}", source, source, "config.json"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(_place_of_transformers(name))


def load_tokenizer(name: str) -> Any:
    """Return open_clip's tokenizer of an architecture.

    Raises:
        InputError: transformers is not installed, or the tokenizer is not here and cannot be downloaded.
    """
    source = architecture(name)["text_cfg"].get("hf_tokenizer_name", "")
    with _fetched(name, f"The tokenizer of {name}", source, "", "'*.json' '*.txt' '*.model'"):
        return open_clip.get_tokenizer(name) if name.startswith("local-dir:") else _known_tokenizer(name)


@cache
def _known_tokenizer(name: str) -> Any:
    """Read a tokenizer once: that of CLIP's own takes a third of the time that a tiny CLIP takes to load."""
    return open_clip.get_tokenizer(name)


@contextmanager
def _fetched(name: str, what: str, source: str, folder: str, files: str) -> Iterator[None]:
    """Say what to fetch, and where to put it, when reading something of transformers' fails."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs transformers ({error!s:.100}): install transformers and sentencepiece."
        ) from error
    except Exception as error:  # transformers raises many types for what is missing or damaged
        local = name.startswith("local-dir:")
        place = f" --local-dir {Path(name.removeprefix('local-dir:')) / folder}" if local else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise InputError(
            f"{what} ({source}) cannot be read ({reason}): run `hf download {source} --include {files}{place}` first."
        ) from error


def _preprocessing_of_tags(name: str) -> dict[str, Any]:
    """Return the preprocessing that all published weights of an architecture share; a file of weights names none."""
    tags = [get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    keys = ("mean", "std", "interpolation") if tags else ()
    return {key: tags[0][key] for key in keys if all(tag[key] == tags[0][key] for tag in tags)}


def _with_tag(name: str, tag: str, text: dict[str, Any]) -> Any:
    try:
        return open_clip.create_model(name, pretrained=tag, **text)
    except RuntimeError as error:
        if "download" not in str(error):
            raise
        raise InputError(
            f"The weights {tag!r} of {name} are not in the cache and could not be downloaded: go online once, or give "
            f"a file of them as clip.pretrained. ({' '.join(str(error).split()):.200})"
        ) from error


def _load_weights(model: nn.Module, name: str, path: str) -> None:
    if not Path(path).is_file():
        raise MissingFileError(f"CLIP weights {path} do not exist: give an open_clip tag or a file.")
    try:
        state = state_of(read_checkpoint(path) if is_checkpoint(path) else load_plain(path))
    except Exception as error:
        raise InputError(f"{path} holds no plain CLIP weights ({why_not_plain(error)}): give another file.") from error
    if any(key.startswith("net.") for key in state):  # a checkpoint of ClipTask
        state = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or key not in _BESIDE}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [(key, tuple(state[key].shape), tuple(own[key].shape)) for key in own.keys() & state.keys()]
    other = [f"{key} of {there}, not {here}" for key, there, here in sorted(shapes) if there != here]
    if missing or unexpected or other:
        raise InputError(
            f"{path} does not fit the CLIP {name} ({len(missing)} keys missing: {missing[:3]}…, {len(unexpected)} "
            f"unexpected: {unexpected[:3]}…, {len(other)} of another shape: {other[:3]}…): correct clip.name."
        )
    require_finite({key: state[key] for key, _ in model.named_parameters()}, path)  # masks hold infinities
    model.load_state_dict(state)


@dataclass(frozen=True)
class ClipSpec:
    """Name of a CLIP: enough to build one, and to know its widths without building it.

    Args:
        name: architecture of open_clip, one of ours (``tiny-rn``, ``tiny-judge``, …), or ``local-dir:PATH``.
        pretrained: open_clip tag, weights file or ``ClipTask`` checkpoint; empty means random weights, the
            same ones every time.
    """

    name: str
    pretrained: str = ""

    @property
    def embed_dim(self) -> int:
        """Width d of the shared embedding space."""
        return int(architecture(self.name)["embed_dim"])

    @property
    def text_width(self) -> int:
        """Width W of the text tower's token states."""
        text = architecture(self.name)["text_cfg"]
        return int(transformers_config(self.name).hidden_size if text.get("hf_model_name") else text["width"])

    @property
    def context_length(self) -> int:
        """Text positions, including start and end tokens."""
        return int(architecture(self.name)["text_cfg"].get("context_length", 77))

    @property
    def image_size(self) -> int:
        """Side of the square images that CLIP sees, in pixels."""
        size = architecture(self.name)["vision_cfg"]["image_size"]
        return int(size if isinstance(size, int) else size[0])

    def within(self, root: Path) -> "ClipSpec":
        """Return this CLIP with its weights, named relative to a run's folder, found from here."""
        path = root / self.pretrained
        return ClipSpec(self.name, str(path)) if self.pretrained and path.is_file() else self

    def load(self) -> "ClipEncoder":
        """Build the frozen encoder, with its tokenizer at hand."""
        encoder = ClipEncoder(self)
        _ = encoder.tokenizer  # a missing one is said now, and not after a shard's images
        return encoder


class Preprocess(nn.Module):
    """Resizer and normaliser of [-1, 1] pixels for an open_clip image tower.

    Args:
        model: CLIP of :func:`build_clip`.
        size: side that the image tower takes, in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, size: int) -> None:
        super().__init__()
        config = PreprocessCfg(**model.visual.preprocess_cfg)
        self.size = size
        self.mode = "bilinear" if config.interpolation == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, 3, H, H) in [-1, 1] into (B, 3, size, size) normalised; resized, with antialiasing, where needed."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode=self.mode, antialias=True).clamp(-1, 1)
        return (images.add(1).div(2) - self.mean) / self.std


class ClipEncoder(nn.Module):
    """Frozen CLIP, whose embeddings come out raw, not normalised.

    It is never an attribute of a trained Task, since EMA and checkpoints would copy it.
    """

    model: Any  # open_clip's CLIP or CustomTextCLIP: they share methods and no type

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_dim, self.text_width = spec.embed_dim, spec.text_width  # d, W
        self.context_length, self.image_size = spec.context_length, spec.image_size
        # A random model moves the global generator on: a fit that builds one for its tokenizer draws its weights later.
        self.model = build_clip(spec.name, spec.pretrained)
        if not spec.pretrained:
            with torch.random.fork_rng([]):  # the same random weights every time
                torch.default_generator.manual_seed(0)
                self.model = build_clip(spec.name)
        self.preprocess = Preprocess(self.model, spec.image_size)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer; token ids can be encoded without it."""
        return load_tokenizer(self.spec.name)

    @property
    def knows_bpe(self) -> bool:
        """Whether the vocabulary is the BPE of CLIP itself, with one row of the token table for each token."""
        return isinstance(self.tokenizer, SimpleTokenizer)

    @property
    def _text_model(self) -> Any:
        """Text tower, which open_clip keeps in one of two places."""
        return self.model if hasattr(self.model, "positional_embedding") else self.model.text

    @cached_property
    def fingerprint(self) -> str:
        """``name-xxxxxxxxxxxx``: a hash over architecture, weights and preprocessing, computed once.

        A copy in half precision carries the fingerprint of the CLIP that it was made of.
        """
        carried = read_checkpoint(self.spec.pretrained) if is_checkpoint(self.spec.pretrained) else {}
        if "fingerprint" in carried:
            return str(carried["fingerprint"])
        digest = hashlib.sha256(json.dumps(architecture(self.spec.name), sort_keys=True).encode())
        digest.update(json.dumps([part.flatten().tolist() for part in self.preprocess.buffers()]).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return f"{self.spec.name.replace('local-dir:', '').rstrip('/').rsplit('/', 1)[-1]}-{digest.hexdigest()[:12]}"

    def tokenize(self, captions: list[str]) -> Tensor:
        """Return (B, context_length) token ids, with a warning where a long caption is cut."""
        tokens, length = self.tokenizer(captions), self.context_length
        if len(captions):
            full = (tokens[:, -2] != self._padding).nonzero().flatten().tolist()
            cut = [captions[i] for i in full if self._count(captions[i]) > length]
            if cut:
                log.warning("%d caption(s) cut to CLIP's %d tokens: %.60r…", len(cut), length, cut[0])
        return tokens

    @property
    def _padding(self) -> int:
        return 0 if self.knows_bpe else self.tokenizer.tokenizer.pad_token_id

    def _count(self, caption: str) -> int:
        """Return how many tokens a caption has, start and end included."""
        if self.knows_bpe:
            return len(self.tokenizer.encode(caption)) + 2
        return len(self.tokenizer.tokenizer(self.tokenizer.clean_fn(caption)).input_ids)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Return (B,) numbers of leading tokens whose states belong to a caption.

        A causal tower reads up to the token where it pools, and transformers' towers and CoCa's hide the padding.
        Others attend to the padding, and SigLIP's pool in it: there, every position belongs to the caption.

        Args:
            tokens: (B, context_length) ids from :meth:`tokenize`.
        """
        tower, own = self._text_model, self._text_model is self.model
        hides = isinstance(tower, HFTextEncoder) or getattr(tower, "cls_emb", None) is not None
        if hides:
            padding = tower.config.pad_token_id if isinstance(tower, HFTextEncoder) else tower.pad_id
            place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            return (place * (tokens != padding)).amax(-1).clamp(min=1)
        pools = tower.text_pool_type if own else tower.pool_type
        if tower.attn_mask is None or pools not in ("argmax", "eos"):
            return torch.full_like(tokens[:, 0], tokens.shape[1])
        if pools == "eos":
            tokens = tokens.eq(tower.text_eos_id if own else tower.eos_id).int()
        return tokens.argmax(dim=-1) + 1

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> TextFeatures:
        """Encode captions: token states after the final LayerNorm and the raw pooled embedding, cut to the longest.

        Args:
            tokens: (B, context_length) ids from :meth:`tokenize`.
        """
        length = self.lengths(tokens)
        longest = int(length.max())
        states, embed = self._text_tower(tokens, longest)
        mask = torch.arange(longest, device=tokens.device) < length[:, None]
        return TextFeatures(tokens[:, :longest] * mask, states[:, :longest] * mask[..., None], mask, embed)

    def _text_tower(self, tokens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Run open_clip's tower; without the positions that only hold padding, where it does not read them."""
        tower = self._text_model
        if isinstance(tower, HFTextEncoder):
            seen = (tokens[:, :longest] != tower.config.pad_token_id).long()
            out = tower.transformer(input_ids=tokens[:, :longest], attention_mask=seen)
            return out.last_hidden_state, tower.proj(tower.pooler(out, seen))
        prefix = "" if tower is self.model else "text."
        short: dict[str, Tensor] = {}
        if tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None:
            tokens = tokens[:, :longest]
            short[f"model.{prefix}positional_embedding"] = tower.positional_embedding[:longest]
            short[f"model.{prefix}attn_mask"] = tower.attn_mask[:longest, :longest]
        features = functional_call(_TextTower(self.model), short, tokens)
        return features["text_intermediates"][-1], features["text_features"]

    def with_states(self, text: TextFeatures) -> TextFeatures:
        """Return captions that come without token states with those of this CLIP, in the precision of their z_t.

        Args:
            text: features that :meth:`encode_text` gave, for other batches of the same captions.
        """
        padding = self._padding
        tokens = text.tokens.masked_fill(~text.mask, padding)
        tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=padding)
        return text._replace(states=self.encode_text(tokens).states.to(text.embed.dtype))

    def describe(self, captions: list[str]) -> TextFeatures:
        """Tokenise and encode captions on this encoder's device."""
        return self.encode_text(self.tokenize(captions).to(self.preprocess.mean.device))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images to (B, d) raw embeddings.

        Args:
            images: (B, 3, H, H) in [-1, 1]; resized (with antialiasing) where H is not CLIP's own size.
        """
        return self.model.encode_image(self.preprocess(images), normalize=False)


class _TextTower(nn.Module):
    """open_clip's text tower with raw outputs, as a module whose buffers can be swapped for a call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return self.model.forward_intermediates(
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
