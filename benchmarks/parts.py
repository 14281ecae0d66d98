"""The parts of configs/ with random weights, and made-up batches for them: no data and no CLIP have to be there."""

import copy
import inspect
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from unclip_pl.clip import ClipSpec
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import Task
from unclip_pl.types import ClipBatch, DecoderBatch, PriorBatch, TextFeatures, UpsamplerBatch

CONFIGS = Path(__file__).parent.parent / "configs"


class Part(NamedTuple):
    """The network, loss and batch sizes that a config names."""

    task: Task
    settings: dict[str, Any]  # of the task, as a checkpoint keeps them
    clip: ClipSpec
    batch_size: int
    image_size: int
    trainer: dict[str, Any]

    def batch(self, n: int) -> Any:
        """Return a batch of n images or captions; captions are as long as the context."""
        clip, length = self.clip, self.clip.context_length
        g = torch.Generator().manual_seed(2)
        mask = torch.ones(n, length, dtype=torch.bool)
        states, embed = (
            torch.randn(n, length, clip.text_width, generator=g),
            torch.randn(n, clip.embed_dim, generator=g),
        )
        text = TextFeatures(mask.long(), states, mask, embed)
        z_i = torch.randn(n, clip.embed_dim, generator=g)
        image = torch.rand(n, 3, self.image_size, self.image_size, generator=g) * 2 - 1
        batches = {
            ClipBatch: ClipBatch(image, text.tokens),
            PriorBatch: PriorBatch(z_i, text),
            DecoderBatch: DecoderBatch(image, z_i, text),
            UpsamplerBatch: UpsamplerBatch(image),
        }
        return batches[self.task.batch_type]


def build(name: str, device: str = "cpu") -> Part:
    """The part of configs/NAME.yaml, linked to its CLIP as the command line would."""
    path = CONFIGS / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    data = config["data"]
    if isinstance(data, str):
        data = yaml.safe_load((path.parent / data).read_text())
    data, model = data["init_args"], config["model"]
    clip = ClipSpec(data["clip"]["name"])
    model["init_args"].pop("codec", None)
    net = model["init_args"].get("net", {})
    links = {name: getattr(clip, name) for name in ("embed_dim", "text_width", "context_length", "name")}
    links["statistics"] = stored_space(clip.embed_dim, clip.text_width, fingerprint="")
    links["codec"] = stored_codec(clip.embed_dim, net)
    for node in (model, net):
        init_args = node.setdefault("init_args", {})
        init_args |= {name: value for name, value in links.items() if name in _arguments(node)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "model")
    torch.manual_seed(0)
    with torch.device(device):  # billions of weights are drawn sooner on a GPU
        task = parser.instantiate(parser.parse_object({"model": model})).model.to(device)
    settings = {"_class_path": model["class_path"], **model["init_args"]}
    return Part(task, settings, clip, data["batch_size"], data.get("image_size", clip.image_size), config["trainer"])


def training_step(
    module: nn.Module, loss: Callable[[Any, Any], Tensor], given: Any, *, bf16: bool
) -> Callable[[], None]:
    """Forward, backward and AdamW of a copy of ``module``: a Task's own AdamW, else torch's."""
    module = copy.deepcopy(module).train()
    optimizer = module.optimizer() if isinstance(module, Task) else torch.optim.AdamW(module.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(module, given)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _arguments(node: dict[str, Any]) -> Any:
    """Return the constructor arguments of the class that a node names."""
    module, _, cls = node.get("class_path", "builtins.object").rpartition(".")
    return inspect.signature(getattr(import_module(module), cls)).parameters


def stored_space(embed_dim: int, text_width: int, *, fingerprint: str = "benchmark") -> str:
    """A statistics file of made-up embeddings with an empty caption of two tokens, as every CLIP's is."""
    g = torch.Generator().manual_seed(7)
    null = TextFeatures(
        tokens=torch.ones(1, 2, dtype=torch.int64),
        states=torch.randn(1, 2, text_width, generator=g),
        mask=torch.ones(1, 2, dtype=torch.bool),
        embed=torch.randn(1, embed_dim, generator=g),
    )
    path = Path(tempfile.mkdtemp()) / "statistics.safetensors"
    moments = Moments.of(torch.randn(4 * embed_dim, embed_dim, generator=g))
    write_statistics(path, moments=moments, null_text=null, fingerprint=fingerprint)
    return str(path)


def stored_codec(embed_dim: int, net: dict[str, Any]) -> str:
    """A codec file for an AR prior's network, fitted on made-up embeddings; nothing for any other."""
    sizes = net.get("init_args", {})
    if "code_length" not in sizes:
        return ""
    g = torch.Generator().manual_seed(8)
    pairs = torch.randn(2, 4 * embed_dim, embed_dim, generator=g)
    wanted = {name: sizes[name] for name in ("code_length", "buckets", "dot_buckets") if name in sizes}
    path = Path(tempfile.mkdtemp()) / "codec.safetensors"
    EmbeddingCodec.fit(lambda: iter([tuple(pairs)]), **wanted).save(path)
    return str(path)
