"""Write Karlo's parts as a run: ``run.json``, and checkpoints that ``load_part`` and ``fit --ckpt_path`` read."""

from pathlib import Path
from typing import Any

import torch
from lightning import __version__ as lightning_version

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.files import replacing
from unclip_pl.generation.run import RUN, write_run
from unclip_pl.interop.files import KarloFiles, KarloPart
from unclip_pl.interop.layout import load_weights
from unclip_pl.interop.sizes import decoder_sizes, prior_sizes, upsampler_sizes
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.space import write_raw_statistics
from unclip_pl.nn.unet import UNet, UpsamplerUNet
from unclip_pl.tasks import DecoderTask, DiffusionPriorTask, Task, UpsamplerTask

STATISTICS = "statistics.safetensors"


def write_karlo(files: KarloFiles, root: Path, clip: ClipSpec) -> list[str]:
    """Write every part that was found, and ``run.json`` if a run can be made of them.

    Args:
        files: parts of Karlo.
        root: folder of the run, without a run so far.
        clip: the CLIP that conditions Karlo; its null text and fingerprint go into the checkpoints.

    Returns:
        One line per part.

    Raises:
        InputError: a part does not fit its network or the CLIP, or the statistics are missing.
        FileExistsError: there is a run already.
    """
    if (root / RUN).exists():
        raise FileExistsError(f"{root} holds a run already: import into another folder (--out).")
    if files.statistics is None:
        raise InputError(
            "Expected Karlo's statistics. Got none: name ViT-L-14_stats.th, or diffusers' prior/, as well."
        )
    if len(files.statistics.mean) != clip.embed_dim:
        raise InputError(
            f"Expected a CLIP of {len(files.statistics.mean)} dimensions, as Karlo's statistics. Got "
            f"{clip.name} of {clip.embed_dim}: name its CLIP with --clip.name and --clip.pretrained."
        )
    encoder = clip.load()
    root.mkdir(parents=True, exist_ok=True)
    write_raw_statistics(
        root / STATISTICS,
        mean=files.statistics.mean,
        std=files.statistics.std,
        null_text=encoder.describe([""]),
        fingerprint=encoder.fingerprint,
    )
    said = []
    for name, part in files.parts.items():
        task, hyper_parameters = _build(name, part, str(root / STATISTICS))
        path = root / name / "checkpoints" / "last.ckpt"
        write_checkpoint(path, task, hyper_parameters)
        said.append(f"{name}: {sum(p.numel() for p in task.net.parameters()):,} parameters, {path}")
    if "decoder" in files.parts:
        write_run(root, describe_karlo(files.parts, clip))
    return said


#: Network, its sizes, Task and settings of each part: Karlo's drop rates and scalings.
_KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "prior": (PriorTransformer, prior_sizes, DiffusionPriorTask, {"scaling": "standardize", "text_drop": 0.2}),
    "decoder": (UNet, decoder_sizes, DecoderTask, {"scaling": "raw", "image_drop": 0.1, "text_drop": 0.3}),
    "upsampler": (UpsamplerUNet, upsampler_sizes, UpsamplerTask, {"interpolation": "bicubic"}),
}


def _build(name: str, part: KarloPart, statistics: str) -> tuple[Task, dict[str, Any]]:
    """Return a part's Task with its weights, and the hyperparameters that LightningCLI would have saved."""
    network, sizes_of, kind, settings = _KINDS[name.removesuffix("_last")]
    sizes = sizes_of(part.weights, part.layout)
    net = network(**sizes)
    load_weights(net, part.weights, part.layout, str(part.path))
    files = {} if kind is UpsamplerTask else {"statistics": statistics}
    return kind(net, **files, **settings), {
        "_class_path": f"unclip_pl.tasks.{kind.__name__}",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "net": {"class_path": f"{network.__module__}.{network.__qualname__}", "init_args": sizes},
        **settings,
        **dict.fromkeys(files, ""),
    }


def write_checkpoint(path: Path, task: Task, hyper_parameters: dict[str, Any]) -> None:
    """Write a Lightning checkpoint of a task at step 0, from which ``fit --ckpt_path`` starts with a new optimizer."""
    optimizer = task.optimizer().state_dict()
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning_version,
        "state_dict": task.state_dict(),
        "callbacks": {},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def describe_karlo(parts: dict[str, KarloPart], clip: ClipSpec) -> dict[str, Any]:
    """Return ``run.json`` with Karlo's own sampling: 25 + 50 + 7 steps at guidance 4 and 8."""

    def ancestral(steps: int, variance: str) -> dict[str, Any]:
        return {"class_path": "unclip_pl.diffusion.Ancestral", "init_args": {"steps": steps, "variance": variance}}

    def checkpoint(name: str) -> str:
        return f"{name}/checkpoints/last.ckpt"

    learned = parts["decoder"].layout.shape(parts["decoder"].weights, "conv_out.bias")[0] == 6
    decoder: dict[str, Any] = {
        "checkpoint": checkpoint("decoder"),
        "image_size": 64,
        "sampler": ancestral(50, "learned" if learned else "small"),
        "guidance": 8.0,
    }
    if "upsampler" in parts:
        upsampler = {"checkpoint": checkpoint("upsampler"), "sampler": ancestral(7, "small")}
        if "upsampler_last" in parts:
            upsampler["last_step"] = checkpoint("upsampler_last")
        decoder["upsamplers"] = [{"class_path": "unclip_pl.generation.decoding.UpsamplerSpec", "init_args": upsampler}]
    priors: dict[str, Any] = {}
    if "prior" in parts:
        priors["diffusion"] = {
            "class_path": "unclip_pl.generation.priors.DiffusionPriorSpec",
            "init_args": {
                "checkpoint": checkpoint("prior"),
                "sampler": ancestral(25, "small"),
                "guidance": 4.0,
                "candidates": 1,
                "x0_bound": 10.0,
                "keep_norm": True,
            },
        }
    return {
        "clip": {"name": clip.name, "pretrained": clip.pretrained},
        "decoder": {"class_path": "unclip_pl.generation.decoding.DecoderSpec", "init_args": decoder},
        "priors": priors,
    }
