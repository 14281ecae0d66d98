"""The paper's models as configs: their sizes beside the paper's, Appendix C, and what a GPU has to hold of them.

The tables of docs/paper.md are compared with what is counted here, word by word.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from unclip_pl.cli import main
from unclip_pl.clip import ClipSpec
from unclip_pl.clip.encoder import architecture
from unclip_pl.nn.ar_prior import ARPriorTransformer
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.unet import UNet
from unclip_pl.training.sharding import units
from unclip_pl.types import TextFeatures

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
GIB = 2**30


class Part(NamedTuple):
    """A config, and what Table 3 of the paper says of it."""

    config: str
    size: float | None  # parameters; None: the paper gives none
    said: str  # how it says so
    batch: int
    steps: int | None
    optimization: dict[str, Any]
    ema: float | None


PAPER = [
    Part("clip/paper", None, "no size given", 32_768, None, {"lr": 3e-4}, None),
    Part(
        "prior/paper",
        1e9,
        "1B",
        4096,
        600_000,
        {"lr": 1.1e-4, "weight_decay": 6e-2, "betas": [0.9, 0.96], "eps": 1e-6},
        0.9999,
    ),
    Part(
        "ar_prior/paper",
        1e9,
        "1B",
        4096,
        1_000_000,
        {"lr": 1.6e-4, "weight_decay": 4e-2, "betas": [0.9, 0.91], "eps": 1e-10},
        0.999,
    ),
    Part("decoder/paper", 3.5e9, "3.5B", 2048, 800_000, {"lr": 1.2e-4}, 0.9999),
    Part("upsampler/paper", 700e6, "700M", 1024, 1_000_000, {"lr": 1.2e-4}, 0.9999),
    Part("upsampler/paper-1024", 300e6, "300M", 512, 1_000_000, {"lr": 1e-4}, 0.9999),
]
SMALL = ["prior/small", "ar_prior/small", "decoder/small", "upsampler/small"]


@cache
def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def clip(name: str) -> ClipSpec:
    return ClipSpec(**config(name)["data"]["init_args"]["clip"])


@cache
def network(name: str) -> nn.Module:
    """On no device, as the command line would link and build it."""
    spec = clip(name)
    if name.startswith("clip/"):
        sizes = architecture(spec.name)
        with torch.device("meta"):
            return open_clip.CLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"])
    net = config(name)["model"]["init_args"]["net"]
    kind = {"PriorTransformer": PriorTransformer, "ARPriorTransformer": ARPriorTransformer, "UNet": UNet}
    wanted = signature(kind[word]).parameters if (word := net["class_path"].rsplit(".", 1)[1]) in kind else {}
    linked = {key: getattr(spec, key) for key in ("embed_dim", "text_width", "context_length") if key in wanted}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    with torch.device("meta"):
        parsed = parser.parse_object({"net": net | {"init_args": net.get("init_args", {}) | linked}})
        return parser.instantiate(parsed).net


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def size_row(part: Part) -> str:
    n = count(network(part.config))
    apart = "" if part.size is None else f"{100 * (n / part.size - 1):+.1f} %"
    return f"| `configs/{part.config}.yaml` | {n:,} | {part.said} | {apart} |"


def sizes_table() -> list[str]:
    return ["| config | parameters | Table 3 | difference |", "| --- | ---: | ---: | ---: |", *map(size_row, PAPER)]


class Held(NamedTuple):
    """What one GPU holds at the peak of a step, in bytes."""

    weights: float
    gradients: float
    adam: float
    average: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values and the result, never the matrix between them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


def _under_autocast(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Autocast runs layer norms in float32: they keep such an input."""
    assert norm.weight is not None
    assert norm.bias is not None
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class Activations:
    """Tensors kept for the backward pass, each once, but for weights: outside the units watched, and inside each."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for p in net.parameters()}
        self.outside: dict[int, Tensor] = {}
        self.inside: list[dict[int, Tensor]] = []

    def keep(self, place: dict[int, Tensor], tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.weights:
            place[key] = tensor
        return tensor

    @contextmanager
    def counting(self, place: dict[int, Tensor]) -> Iterator[None]:
        with saved_tensors_hooks(lambda tensor: self.keep(place, tensor), lambda tensor: tensor):
            yield

    def watch(self, unit: nn.Module) -> None:
        forward = unit.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            for tensor in tree_leaves((args, kwargs)):
                self.keep(self.outside, tensor)
            self.inside.append({})
            with self.counting(self.inside[-1]):
                return forward(*args, **kwargs)

        unit.forward = counted  # type: ignore[method-assign]

    def bytes(self) -> int:
        """With the inside of that unit which keeps most: where units are watched, only one is whole at a time."""
        places = [self.outside | place for place in self.inside] or [self.outside]
        return max(sum(tensor.untyped_storage().nbytes() for tensor in place.values()) for place in places)


def training_pass(name: str, net: nn.Module) -> None:
    """One forward pass of one GPU's batch, in bfloat16, on captions of full length."""
    data, spec = config(name)["data"]["init_args"], clip(name)
    B, d, L = data["batch_size"], spec.embed_dim, spec.context_length

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    def longs(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    mask = torch.empty(B, L, dtype=torch.bool, device="meta")
    text = TextFeatures(longs(B, L), floats(B, L, spec.text_width), mask, floats(B, d))
    index = torch.empty(B, device="meta")
    if isinstance(net, PriorTransformer):
        K = config(name)["model"]["init_args"].get("draws_per_caption", 1)
        net(floats(B, K, d), index[:, None].expand(B, K), net.encode_prefix(text))
    elif isinstance(net, ARPriorTransformer):
        net(text, longs(B), longs(B, net.code_length), floats(B, net.code_length))
    elif isinstance(net, UNet):
        side = data["image_size"]
        if net.condition_encoder is None:
            net(floats(B, 6, side // 4, side // 4), index)  # a crop
        else:
            net(floats(B, 3, side, side), index, net.encode_condition(floats(B, d), text, mask[:, 0]))


def held(name: str) -> Held:
    """Count what a GPU holds: float32 weights, gradients and average, Adam's two moments, bfloat16 for the rest."""
    trainer = config(name)["trainer"]
    callbacks = [callback["class_path"].rsplit(".", 1)[1] for callback in trainer["callbacks"]]
    net = network(name).to(torch.bfloat16)
    n, ranks = count(net), trainer.get("num_nodes", 1) * trainer.get("devices", 1)
    if "strategy" in trainer and "FullySharded" in str(trainer["strategy"]):
        blocks = [count(unit) for unit in units(net)]
        # Between its forward and its backward the rest, and two blocks; the gradients of one, and their sum in float32.
        gathered = 2 * (n - sum(blocks)) + (2 * 2 + 2 + 4) * max(blocks)
    else:
        gathered = 2 * n  # autocast's copies
    activations = Activations(net)
    with pytest.MonkeyPatch.context() as patch:
        if "strategy" not in trainer:
            patch.setattr(nn.LayerNorm, "forward", _under_autocast)
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: _Attention.apply(q, k, v))
        watched = list(units(net)) if "ActivationCheckpointing" in callbacks else []
        for unit in watched:
            activations.watch(unit)
        with activations.counting(activations.outside):
            training_pass(name, net)
        for unit in watched:
            del unit.forward
    net.float()
    return Held(*(b * n / ranks for b in (4, 4, 8, 4)), gathered, activations.bytes())


def memory_row(name: str) -> str:
    memory = held(name)
    numbers = " | ".join(f"{value / GIB:.2f}" for value in (*memory, memory.total))
    trainer, data = config(name)["trainer"], config(name)["data"]["init_args"]
    ranks = trainer.get("num_nodes", 1) * trainer.get("devices", 1)
    return f"| `configs/{name}.yaml` | {ranks} x {data['batch_size']} | {numbers} |"


def memory_table() -> list[str]:
    words = "| config | GPUs x batch | weights | gradients | Adam | average | gathered | activations | GiB |"
    return [words, "| --- |" + " ---: |" * 8, *map(memory_row, [part.config for part in PAPER[1:]] + SMALL)]


def test_the_sizes_are_the_papers() -> None:
    """Where Table 3 speaks of one network, to 10 %; where it counts otherwise, the parts are what it says."""
    for part in PAPER:
        if part.size and part.config not in ("prior/paper", "ar_prior/paper"):
            assert count(network(part.config)) == pytest.approx(part.size, rel=0.1), part.config
    # "1B" is what the blocks of a transformer hold: 12 L w^2. The AR prior has two of them.
    stack = 12 * 24 * 2048**2
    assert stack == pytest.approx(1.2e9, rel=0.01)
    assert count(network("prior/paper")) == pytest.approx(stack, rel=0.02)
    ar: Any = network("ar_prior/paper")
    assert count(ar.text_encoder) == pytest.approx(1.2e9, rel=0.1)
    assert count(ar) - count(ar.text_encoder) == pytest.approx(0.8e9, rel=0.02)
    decoder: Any = network("decoder/paper")
    assert count(decoder.condition_encoder.text_encoder) == pytest.approx(1.2e9, rel=0.1)
    assert count(decoder) - count(decoder.condition_encoder.text_encoder) == pytest.approx(2.3e9, rel=0.02)


@pytest.mark.parametrize("part", PAPER, ids=lambda part: part.config)
def test_the_settings_are_appendix_cs(part: Part) -> None:
    settings = config(part.config)
    data, trainer = settings["data"]["init_args"], settings["trainer"]
    ranks = trainer["num_nodes"] * trainer["devices"]
    assert data["batch_size"] * ranks * trainer["accumulate_grad_batches"] == part.batch
    assert trainer["precision"] == "bf16-mixed"
    given = settings["model"]["init_args"]["optimization"]
    assert {key: given.get(key) for key in part.optimization} == part.optimization
    if part.steps is None:  # CLIP
        return
    assert trainer["max_steps"] == part.steps
    assert given.keys() == part.optimization.keys()  # nothing that the paper does not have
    callbacks = {callback["class_path"]: callback.get("init_args", {}) for callback in trainer["callbacks"]}
    assert callbacks["unclip_pl.training.callbacks.WarmupEMA"] == {"decay": part.ema}
    assert "unclip_pl.training.sharding.ActivationCheckpointing" in callbacks
    assert trainer["strategy"] == {"class_path": "unclip_pl.training.sharding.FullySharded"}


def test_the_shapes_are_table_3s() -> None:
    prior: Any = network("prior/paper")
    assert (prior.width, len(prior.transformer.resblocks), prior.transformer.resblocks[0].attn.heads) == (2048, 24, 32)
    assert prior.context_length == 256
    ar: Any = network("ar_prior/paper")
    block = ar.transformer.resblocks[0]
    assert (block.ln_1.weight.numel(), len(ar.transformer.resblocks), block.attn.heads) == (1664, 24, 26)
    assert (ar.code_length, ar.buckets) == (319, 1024)
    decoder: Any = network("decoder/paper")
    for text in (ar.text_encoder, decoder.condition_encoder.text_encoder):
        heads = text.transformer.resblocks[0].attn.heads
        assert (text.width, len(text.transformer.resblocks), heads, text.context_length) == (2048, 24, 32, 256)
    for name, channels, mult, res_blocks, dropout in (
        ("decoder/paper", 512, [1, 2, 3, 4], 3, 0.1),
        ("upsampler/paper", 320, [1, 2, 3, 4], 3, 0.1),
        ("upsampler/paper-1024", 192, [1, 1, 2, 2, 4, 4], 2, 0.0),
    ):
        net: Any = network(name)
        assert net.channels == channels
        assert [level.layers[0].block.conv2.out_channels // channels for level in net.down] == mult
        assert all(len(level.layers) == res_blocks for level in net.down)
        assert net.down[0].layers[0].block.dropout.p == dropout
        attends = [level.layers[0].attention is not None for level in net.down]
        assert attends == ([False, True, True, True] if name == "decoder/paper" else [False] * len(mult))
    assert decoder.conv_out.out_channels == 6
    assert decoder.down[1].layers[0].attention.heads == 2 * 512 // 64


@pytest.mark.parametrize("name", [part.config for part in PAPER] + [*SMALL, "clip/small"])
def test_the_header_says_how_large_and_that_nobody_has_run_it(name: str) -> None:
    header = (CONFIGS / f"{name}.yaml").read_text().split("model:")[0]
    said = " ".join(header.replace("# ", " ").split())
    assert f"{count(network(name)):,} parameters" in said
    assert "No run of it has been made" in said


@pytest.mark.parametrize("name", [part.config for part in PAPER] + [*SMALL, "clip/small"])
def test_it_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", f"configs/{name}.yaml", "--print_config"]
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("table", [sizes_table, memory_table])
def test_the_document_shows_these_numbers(table: Callable[[], list[str]]) -> None:
    counted = "\n".join(table())
    assert counted in (ROOT / "docs/paper.md").read_text(), f"expected in docs/paper.md:\n{counted}"


def test_memory_is_what_can_be_counted_by_hand() -> None:
    prior = held("prior/paper")
    n, tokens, width = count(network("prior/paper")), 64 * 257, 2048
    assert prior.weights + prior.gradients + prior.adam + prior.average == pytest.approx(20 * n / 32)
    # The stream into every block; and the keys and values that its suffix reads, parts of one tensor with the queries.
    kept = 2 * 24 * tokens * width * (1 + 3)
    # ... and one block: the stream between its halves, two norms, queries to values, what they give; the MLP's 4 + 4.
    block = 2 * tokens * width * (1 + 2 + 3 + 1 + 8)
    assert prior.activations == pytest.approx(kept + block, rel=0.02)
