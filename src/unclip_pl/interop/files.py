"""Read Karlo's parts from its own checkpoints, or from a folder that diffusers' pipeline was saved in."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import load_plain, state_of, why_not_plain
from unclip_pl.interop.layout import Layout, Weights, diffusers_prior, diffusers_unet, karlo_prior, karlo_unet
from unclip_pl.interop.sizes import HEAD

#: Weights in a folder of diffusers, perhaps of a variant such as half precision.
_WEIGHTS = re.compile(r"diffusion_pytorch_model(\.\w+)?\.(safetensors|bin)")


class KarloPart(NamedTuple):
    """One network's weights, with the names of the file that they were read from."""

    path: Path
    weights: Weights
    layout: Layout


class Statistics(NamedTuple):
    """Mean and standard deviation of the raw image embeddings that Karlo's prior was trained on, (d,) each."""

    mean: Tensor
    std: Tensor


class KarloFiles(NamedTuple):
    """What was found: ``prior``, ``decoder``, ``upsampler``, ``upsampler_last`` (its last step), and the statistics."""

    parts: dict[str, KarloPart]
    statistics: Statistics | None


def read_karlo(paths: Iterable[str | Path]) -> KarloFiles:
    """Sort files and folders by their content. Nothing is unpickled but tensors and plain containers.

    Args:
        paths: Karlo's own ``prior``, ``decoder`` and ``improved-sr`` checkpoints and its statistics (``.th``), or the
            folder of a diffusers pipeline.

    Raises:
        MissingFileError: there is nothing at a path.
        InputError: a file holds none of these, or two files hold the same part.
    """
    parts: dict[str, KarloPart] = {}
    statistics: Statistics | None = None
    for path in map(Path, paths):
        found = _folder(path) if path.is_dir() else _file(path)
        for name, part in found.parts.items():
            if name in parts:
                raise InputError(f"Expected one {name}. Got {parts[name].path} and {part.path}: leave one out.")
            parts[name] = part
        statistics = found.statistics or statistics
    return KarloFiles(parts, statistics)


def _file(path: Path) -> KarloFiles:
    """Read a checkpoint in Karlo's own layout, which its first names tell."""
    content = _read(path)
    if not isinstance(content, dict):
        if isinstance(content, list | tuple) and len(content) == 2 and all(isinstance(x, Tensor) for x in content):
            return KarloFiles({}, Statistics(*(x.float().flatten() for x in content)))
        raise _unknown(path)
    try:
        state = state_of(content)
    except TypeError:
        raise _unknown(path) from None
    if "model.clip_img_proj.weight" in state:
        return KarloFiles({"prior": KarloPart(path, _below(state, "model"), karlo_prior())}, None)
    if "model.input_blocks.0.0.weight" in state:
        weights = _below(state, "model")
        return KarloFiles({"decoder": KarloPart(path, weights, karlo_unet(weights))}, None)
    if "model_first_steps.input_blocks.0.0.weight" in state:
        both = {"upsampler": _below(state, "model_first_steps"), "upsampler_last": _below(state, "model_last_step")}
        return KarloFiles({name: KarloPart(path, part, karlo_unet(part)) for name, part in both.items()}, None)
    raise _unknown(path)


def _folder(path: Path) -> KarloFiles:
    """Read a diffusers pipeline's folder, with one folder for each network in it."""
    if not any((path / name).is_dir() for name in ("prior", "decoder", "super_res_first")):
        raise _unknown(path)
    parts: dict[str, KarloPart] = {}
    statistics = None
    if (path / "prior").is_dir():
        weights = _diffusers(path / "prior")
        heads = weights["proj_in.weight"].shape[0] // HEAD if "proj_in.weight" in weights else 1
        parts["prior"] = KarloPart(path / "prior", weights, diffusers_prior(heads))
        if {"clip_mean", "clip_std"} <= weights.keys():
            statistics = Statistics(*(weights[name].float().flatten() for name in ("clip_mean", "clip_std")))
    if (path / "decoder").is_dir():
        weights = {**_diffusers(path / "decoder"), **_diffusers(path / "text_proj")}
        parts["decoder"] = KarloPart(path / "decoder", weights, diffusers_unet(HEAD))
    for name, folder in {"upsampler": "super_res_first", "upsampler_last": "super_res_last"}.items():
        if (path / folder).is_dir():
            parts[name] = KarloPart(path / folder, _diffusers(path / folder), diffusers_unet(HEAD))
    return KarloFiles(parts, statistics)


def _diffusers(folder: Path) -> Weights:
    """Read the weights that ``save_pretrained`` wrote."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match for name in names if (match := _WEIGHTS.fullmatch(name))]
    if not found:
        raise MissingFileError(
            f"Expected diffusion_pytorch_model.safetensors, .bin or a variant such as .fp16.safetensors in {folder}. "
            f"Got {', '.join(sorted(names)[:5]) or 'no such file'}: download the model again."
        )
    first = min(found, key=lambda match: (match[1] or "", match[2] == "bin"))
    return _read(folder / first[0])


def _read(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"No file or folder at {path}: download Karlo first.")
    try:
        return load_plain(path)
    except Exception as error:
        raise InputError(f"{path} holds no plain weights ({why_not_plain(error)}): download it again.") from error


def _below(state: dict[str, Tensor], prefix: str) -> Weights:
    """Return one network of a checkpoint. Keys of unknown prefixes stay, so that they are named as unexpected."""
    others = ("model.", "model_first_steps.", "model_last_step.")
    return {
        key.removeprefix(f"{prefix}."): value
        for key, value in state.items()
        if key.startswith(f"{prefix}.") or not key.startswith(others)
    }


def _unknown(path: Path) -> InputError:
    return InputError(
        f"{path} holds no part of Karlo. Name its prior, decoder or improved-sr checkpoint, its statistics (two "
        "tensors), or a folder of diffusers' UnCLIPPipeline with prior/, decoder/ and text_proj/, super_res_first/ and "
        "super_res_last/."
    )
