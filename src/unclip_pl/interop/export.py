"""Write a run as a folder that diffusers loads as ``UnCLIPPipeline``: the mirror of :mod:`unclip_pl.interop.files`.

diffusers is not needed: a folder of it is JSON and safetensors. Only networks of Karlo's shape have a place there.
"""

import json
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from unclip_pl.clip import ClipEncoder
from unclip_pl.diffusion import GaussianDiffusion
from unclip_pl.diffusion.schedule import CosineSchedule
from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint, write_json, write_tensors, write_text
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import DiffusionPrior, DiffusionPriorSpec
from unclip_pl.generation.run import find_run, open_parts, read_run
from unclip_pl.interop.layout import Weights, diffusers_prior, diffusers_unet, exported
from unclip_pl.interop.sizes import HEAD
from unclip_pl.interop.text_tower import TOKENIZER, config_of, tokenizer_files, weights_of, why_not
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.unet import UNet, UpsamplerUNet
from unclip_pl.report.card import CARD, model_card

#: Constructor arguments that our networks need, for which diffusers has no other value.
NEEDED: dict[type[nn.Module], dict[str, Any]] = {
    PriorTransformer: {"text_states": True},
    UNet: {
        "in_channels": 3,
        "out_channels": 6,
        "head_channels": HEAD,
        "text_encoder": None,
        "text_embed_in_time": True,
        "image_map": 0,
        "resample_with_blocks": True,
        "patch": 1,
        "image_levels": False,
    },
    UpsamplerUNet: {"resample_with_blocks": True, "patch": 1},
}
#: diffusers' names of what a network predicts.
PREDICTIONS = {"eps": "epsilon", "x0": "sample"}
LIBRARY, VERSION = "diffusers", "0.42.0"
#: Where diffusers 0.42 finds this one class, which it does not export.
PROJECTION_MODULE = "diffusers.pipelines.deprecated.unclip.text_proj"


class Network(NamedTuple):
    """One of our networks, with all arguments of its constructor, and its diffusion."""

    name: str
    net: nn.Module
    settings: dict[str, Any]
    diffusion: GaussianDiffusion


def write_diffusers(run: Path, folder: Path) -> list[str]:
    """Write the pipeline's folder, whole or not at all, with a model card.

    Args:
        run: folder of a run, or a bundle.
        folder: folder to write, which must not exist or be empty.

    Returns:
        One line for each part, and the call that draws as the run does.

    Raises:
        InputError: a network has no place in diffusers' pipeline; the error names all that is in the way.
        FileExistsError: there are files already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds files already: export into another folder.")
    root = find_run(run)
    description = read_run(root)
    specs = {name: spec for name, spec in description.priors.items() if type(spec) is DiffusionPriorSpec}
    if not specs or len(description.decoder.upsamplers) != 1:
        raise InputError(
            f"Expected a run with a diffusion prior, a decoder and one upsampler, as UnCLIPPipeline has. {run} has "
            f"{len(specs)} diffusion priors and {len(description.decoder.upsamplers)} upsamplers: export another run."
        )
    name, spec = next(iter(specs.items()))
    parts = open_parts(root, description.clip, device="cpu", decoder=description.decoder, priors={name: spec})
    prior, decoder = parts.priors[name], parts.decoder
    assert isinstance(prior, DiffusionPrior)
    assert decoder is not None
    assert parts.clip is not None
    upsampler, files = decoder.upsamplers[0], description.decoder.upsamplers[0]
    networks = [
        _network(root, "prior", spec.checkpoint, prior.part),
        _network(root, "decoder", description.decoder.checkpoint, decoder.part),
        _network(root, "super_res_first", files.checkpoint, upsampler.part),
        _network(root, "super_res_last", files.last_step or files.checkpoint, upsampler.finisher),
    ]
    faults = [
        *_faults(networks, parts.clip),
        *_scalings(prior, decoder, [upsampler.part, upsampler.finisher]),
    ]
    if faults:
        raise InputError(
            f"Expected networks of Karlo's shape, as configs/*/karlo-tiny.yaml. {run} does not map onto diffusers' "
            f"UnCLIPPipeline: {'; '.join(dict.fromkeys(faults))}. Export another run."
        )
    call = _call(folder, spec, description.decoder)
    card = model_card(root, call)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        ready = Path(temporary) / "folder"
        said = _write(ready, networks, parts.clip, prior, (decoder.image_size, upsampler.part.factor))
        write_text(ready / CARD, card)
        ready.replace(folder)
    return [*said, "", call]


def _network(root: Path, name: str, checkpoint: str, task: Any) -> Network:
    defaults = {key: parameter.default for key, parameter in signature(type(task.net).__init__).parameters.items()}
    told = read_checkpoint(root / checkpoint, mmap=True)["hyper_parameters"]["net"]
    return Network(name, task.net, defaults | told["init_args"], task.diffusion)


def _faults(networks: list[Network], clip: ClipEncoder) -> Iterator[str]:
    """Yield what diffusers' modules cannot be, with the value that they have."""
    for name, net, settings, diffusion in networks:
        if type(net) not in NEEDED:
            yield f"{name} is a {type(net).__name__}"
            continue
        yield from (
            f"{name} has {key} {settings[key]}, not {value}"
            for key, value in NEEDED[type(net)].items()
            if settings[key] != value
        )
        if type(diffusion.schedule) is not CosineSchedule or diffusion.prediction not in PREDICTIONS:
            yield (
                f"{name} predicts {diffusion.prediction} on a {type(diffusion.schedule).__name__}, not eps or x0 on a "
                "CosineSchedule"
            )
        if isinstance(net, PriorTransformer):
            if settings["width"] != HEAD * settings["heads"]:
                yield f"{name} has heads of {settings['width'] // settings['heads']} channels, not {HEAD}"
            if settings["text_embed_dim"] not in (0, settings["embed_dim"]):
                yield f"{name} reads captions of another CLIP than it draws for"
            if settings["context_length"] != clip.context_length:
                yield f"{name} has a context of {settings['context_length']} tokens, and CLIP of {clip.context_length}"
        else:
            widths, groups = _widths(settings), settings["groups"]
            if settings["channel_mult"][0] != 1 or any(width % groups for width in widths):
                yield f"{name} has channels {widths}, not multiples of {groups} from {settings['channels']} on"
        if type(net) is UNet and len(settings["channel_mult"]) - 1 not in settings["attention_levels"]:
            yield f"{name} does not attend at its last level"
    if clip.text_width != clip.embed_dim:
        yield f"CLIP's text states have {clip.text_width} dimensions and its embeddings {clip.embed_dim}, not the same"
    yield from why_not(clip)


def _scalings(prior: DiffusionPrior, decoder: Any, upsamplers: list[Any]) -> Iterator[str]:
    """Yield what the pipeline does between the networks otherwise than the run."""
    if prior.part.space.scaling not in ("standardize", "raw"):
        yield f"the prior's embeddings are scaled {prior.part.space.scaling!r}, not 'standardize' or 'raw'"
    if decoder.part.space.scaling != "raw":
        yield f"the decoder's embeddings are scaled {decoder.part.space.scaling!r}, not 'raw'"
    if prior.part.learned_null is not None:
        yield "the prior's null condition is learned, not the empty caption"
    for task in upsamplers:
        if task.interpolation != "bicubic":
            yield f"the upsampler's interpolation is {task.interpolation}, not bicubic"
        if task.diffusion.prediction == "x0":
            yield "the upsampler's network predicts what the enlarged picture lacks of x0, not eps"


def _widths(settings: Mapping[str, Any]) -> list[int]:
    return [settings["channels"] * m for m in settings["channel_mult"]]


def _write(
    folder: Path, networks: list[Network], clip: ClipEncoder, prior: DiffusionPrior, sides: tuple[int, int]
) -> list[str]:
    """Write every part, and return a line for each."""
    modules = _modules(networks, prior, sides)
    index: dict[str, Any] = {}
    for name, (kind, config, weights) in modules.items():
        index[name] = [PROJECTION_MODULE if kind == "UnCLIPTextProjModel" else LIBRARY, kind]
        write_json(folder / name / "config.json", _described(kind, config), indent=2)
        write_tensors(folder / name / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    for name, config in _schedulers(networks, prior.spec.x0_bound).items():
        index[name] = [LIBRARY, "UnCLIPScheduler"]
        write_json(folder / name / "scheduler_config.json", _described("UnCLIPScheduler", config), indent=2)
    index |= {"text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", TOKENIZER]}
    write_json(folder / "text_encoder" / "config.json", config_of(clip), indent=2)
    write_tensors(folder / "text_encoder" / "model.safetensors", weights_of(clip), {"format": "pt"})
    for file, text in tokenizer_files(clip).items():
        write_text(folder / "tokenizer" / file, text)
    write_json(folder / "model_index.json", _described("UnCLIPPipeline", index), indent=2)
    return [f"{name}: {sum(x.numel() for x in weights.values()):,} numbers" for name, (*_, weights) in modules.items()]


def _modules(
    networks: list[Network], prior: DiffusionPrior, sides: tuple[int, int]
) -> dict[str, tuple[str, dict[str, Any], Weights]]:
    """Return the class, the config and the weights of each of diffusers' networks.

    Args:
        networks: prior, decoder, upsampler, and the upsampler of the last step.
        prior: the prior, whose statistics diffusers keeps among its weights.
        sides: side of the decoder's pictures, and the factor by which they are enlarged.
    """
    of_prior, of_decoder, *upsamplers = networks
    space, size = prior.part.space, sides[0]
    whole = exported(of_prior.net, diffusers_prior(of_prior.settings["heads"]))
    raw = space.scaling == "raw"
    mean = torch.zeros(1, space.embed_dim) if raw else space.raw_mean[None]
    std = torch.ones(1, space.embed_dim) if raw else space.raw_std[None]
    unet = exported(of_decoder.net, diffusers_unet(HEAD))
    inside = {name for name in unet if name.startswith(_PROJECTION)}
    projection = {
        "clip_embeddings_dim": space.embed_dim,
        "clip_extra_context_tokens": of_decoder.settings["image_tokens"],
        "cross_attention_dim": _context_width(of_decoder.settings),
        "time_embed_dim": 4 * of_decoder.settings["channels"],
    }
    modules: dict[str, tuple[str, dict[str, Any], Weights]] = {
        "prior": ("PriorTransformer", _prior_config(of_prior.settings), {**whole, "clip_mean": mean, "clip_std": std}),
        "decoder": (
            "UNet2DConditionModel",
            _decoder_config(of_decoder.settings, size),
            {name: value for name, value in unet.items() if name not in inside},
        ),
        "text_proj": ("UnCLIPTextProjModel", projection, {name: unet[name] for name in inside}),
    }
    for part in upsamplers:
        config = _unet_config(part.settings, size * sides[1])
        config |= {"in_channels": 6, "out_channels": 3, "add_attention": False}
        modules[part.name] = ("UNet2DModel", config, exported(part.net, diffusers_unet(HEAD)))
    return modules


def _schedulers(networks: list[Network], bound: float | None) -> dict[str, dict[str, Any]]:
    """Return the configs of the pipeline's schedulers."""
    of_prior, of_decoder, first, _ = networks
    settings = {
        "prior_scheduler": (of_prior, "fixed_small_log", bound),
        "decoder_scheduler": (of_decoder, "learned_range", 1.0),
        "super_res_scheduler": (first, "fixed_small_log", 1.0),
    }
    return {
        name: {
            "num_train_timesteps": network.diffusion.steps,
            "prediction_type": PREDICTIONS[network.diffusion.prediction],
            "variance_type": variance,
            "clip_sample": limit is not None,
            "clip_sample_range": limit or 1.0,
        }
        for name, (network, variance, limit) in settings.items()
    }


#: Beginnings of the names that diffusers keeps beside its U-Net.
_PROJECTION = (
    "learned_classifier_free_guidance_embeddings",
    "clip_image_embeddings_project_to_time_embeddings",
    "clip_extra_context_tokens_proj",
    "embedding_proj",
    "encoder_hidden_states_proj",
    "text_encoder_hidden_states_norm",
)


def _described(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": VERSION, **config}


def _prior_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": settings["heads"],
        "attention_head_dim": HEAD,
        "num_layers": settings["layers"],
        "embedding_dim": settings["embed_dim"],
        "num_embeddings": settings["context_length"],
        "additional_embeddings": 4,
    }


def _unet_config(settings: Mapping[str, Any], side: int) -> dict[str, Any]:
    """Return what both of diffusers' U-Nets need, with blocks that do not attend."""
    widths = _widths(settings)
    return {
        "sample_size": side,
        "block_out_channels": widths,
        "layers_per_block": settings["res_blocks"],
        "norm_num_groups": settings["groups"],
        "down_block_types": ["ResnetDownsampleBlock2D"] * len(widths),
        "up_block_types": ["ResnetUpsampleBlock2D"] * len(widths),
        "resnet_time_scale_shift": {"scale_shift": "scale_shift", "additive": "default"}[settings["time_mode"]],
    }


def _context_width(settings: Mapping[str, Any]) -> int:
    return int(settings["context_width"] or 4 * settings["channels"])


def _decoder_config(settings: Mapping[str, Any], side: int) -> dict[str, Any]:
    attends = [i in settings["attention_levels"] for i in range(len(settings["channel_mult"]))]
    down = ["SimpleCrossAttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends]
    up = ["SimpleCrossAttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in reversed(attends)]
    return _unet_config(settings, side) | {
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": HEAD,
        "cross_attention_dim": _context_width(settings),
        "only_cross_attention": False,
        "class_embed_type": "identity",
    }


def _call(folder: Path, prior: DiffusionPriorSpec, decoder: DecoderSpec) -> str:
    """Return Python that draws with the run's steps and guidance. The pipeline knows no sampler but the ancestral."""
    options = {"prior_guidance_scale": prior.guidance, "decoder_guidance_scale": decoder.guidance}
    stages: dict[str, Any] = {"prior": prior, "decoder": decoder, "super_res": decoder.upsamplers[0]}
    for name, spec in stages.items():
        if spec.sampler is not None:
            options[f"{name}_num_inference_steps"] = spec.sampler.steps
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    return (
        "from diffusers import UnCLIPPipeline\n\n"
        f"pipeline = UnCLIPPipeline.from_pretrained({json.dumps(str(folder))})\n"
        f'pipeline("a caption", {said}).images[0]'
    )
