"""On a GPU: how much of its arithmetic training steps reach, what the replayed samplers save, that no step waits.

Not one of `make bench`'s, whose peers need not be there. Run `python benchmarks/gpu.py` where torch finds a GPU, with
the names of some sections or none for all of them; it writes gpu.json and gpu.md into results/benchmarks. A step is
forward, backward and fused AdamW in bfloat16 autocast, on a batch on the device, captions as long as the context.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ar_decoding import captions, network, values
from measure import Row, flops, table
from parts import Part, build
from rich.console import Console
from run import commit
from torch import Tensor, nn

from unclip_pl.callbacks import WarmupEMA
from unclip_pl.diffusion import Ancestral
from unclip_pl.nn.layers import Block
from unclip_pl.priors import DiffusionPrior

DEVICE = torch.device("cuda")
#: Dense bfloat16 by the datasheet of an H100 or H200 in an SXM module, FLOP/s: what MFU is a share of.
PEAK = 989e12


def seconds(call: Callable[[], Any], rounds: int = 10) -> float:
    """Median of some calls by the device's own clock, after three to warm up."""
    for _ in range(3):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def to_device(batch: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """A batch, which may hold batches."""
    moved = []
    for part in batch:
        if not isinstance(part, Tensor):
            moved.append(to_device(part))
        else:
            moved.append(part.to(DEVICE, memory_format=memory_format) if part.ndim == 4 else part.to(DEVICE))
    return type(batch)(*moved)


def step_of(task: Any, given: Any, average: WarmupEMA | None = None) -> Callable[[], None]:
    """One training step."""
    task.train()
    optimizer = task.optimizer()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = task.loss(given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trained(name: str, part: Part, batch: int, target: float | None, note: str, **kwargs: Any) -> Row:
    """A row of one part's training step: MFU, and in the note milliseconds, samples and memory."""
    torch.cuda.reset_peak_memory_stats()
    step = step_of(part.task, to_device(part.batch(batch), **kwargs))
    step()
    work = flops(step)
    took = seconds(step)
    held = torch.cuda.max_memory_allocated() / 2**30
    speed = f"{took * 1e3:.1f} ms, {batch / took:,.0f} samples/s, {work / took / 1e12:.0f} TFLOP/s, {held:.1f} GiB"
    parameters = sum(p.numel() for p in part.task.net.parameters()) / 1e6
    label = f"{name}, {parameters:,.0f} M parameters, batch {batch}"
    return Row(label, work / took / PEAK * 100, None, "% MFU", None, target, f"{speed}; {note}")


def released() -> None:
    """What the last row held."""
    gc.collect()
    torch.cuda.empty_cache()


def compiled(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Every block by itself: the same graph serves all that are alike."""
    torch._dynamo.config.recompile_limit = 64
    for block in module.modules():
        if isinstance(block, kinds):
            block.compile(dynamic=False)


def prior() -> list[Row]:
    """The paper's diffusion prior, whose step fits one GPU whole."""
    part = build("prior/paper", "cuda")
    rows = [trained("prior/paper", part, part.batch_size, 45, "as it is")]
    compiled(part.task.net, (Block,))
    rows.append(trained("prior/paper, compiled", part, part.batch_size, 45, "torch.compile of every block"))
    return rows


def decoder() -> list[Row]:
    """The paper's decoder."""
    part = build("decoder/paper", "cuda")
    rows = [trained("decoder/paper", part, 16, 35, "as it is")]
    released()
    part.task.net.to(memory_format=torch.channels_last)
    rows.append(trained("decoder/paper", part, 16, 35, "channels_last", memory_format=torch.channels_last))
    return rows


def small() -> list[Row]:
    """A step of every small config, at its own batch."""
    rows = []
    for name in ("clip", "prior", "ar_prior", "decoder", "upsampler"):
        part = build(f"{name}/small", "cuda")
        rows.append(trained(f"{name}/small", part, part.batch_size, None, "as it is"))
        del part
        released()
    return rows


def samplers() -> list[Row]:
    """CUDA graphs in the samplers of both priors, against the same steps launched one kernel at a time."""
    import unclip_pl.nn.ar_prior as ar
    import unclip_pl.priors as priors

    net = network(319).to(DEVICE)
    text = to_device(captions())
    table_of_values = values(319).to(DEVICE)

    def decoded() -> Tensor:
        g = torch.Generator(DEVICE).manual_seed(2)
        return net.generate(text, values_of=table_of_values, generator=g)[:, 0]

    part = build("prior/small", "cuda")
    prior = DiffusionPrior("", Ancestral(64), guidance=2.0)
    prior.task = part.task.eval()
    prior.task.space.scaling = "unit"
    pairs = to_device(part.batch(8))

    def embedded() -> Tensor:
        return prior.embed(pairs.text, generator=torch.Generator(DEVICE).manual_seed(3))

    def launched(step: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
        return step

    rows = []
    for label, call, module in (
        ("AR prior decoding, batch 8, 321 positions, 256 × 4", decoded, ar),
        ("prior sampling, batch 8, 64 steps guided, 512 × 12", embedded, priors),
    ):
        recorded = module.recorded
        ours, drawn = seconds(call, 5), call()
        module.recorded = launched
        peer, again = seconds(call, 3), call()
        module.recorded = recorded
        note = f"CUDA graph against launched kernels; the same to {(drawn.double() - again.double()).abs().max():.0e}"
        rows.append(Row(label, ours * 1e3, peer * 1e3, "ms", peer / ours, None, note))
    return rows


def waits() -> list[Row]:
    """Steps of every tiny config with torch's alarm for whatever waits for the device; an alarm is an error."""
    rows = []
    for name in ("clip", "prior", "ar_prior", "decoder", "upsampler"):
        part = build(f"{name}/tiny", "cuda")
        task = part.task.train()
        given = to_device(part.batch(8))
        optimizer = task.optimizer()
        average = WarmupEMA()
        average._device = DEVICE
        super(WarmupEMA, average).setup(None, task, "fit")

        def step(task: Any = task, given: Any = given, optimizer: Any = optimizer, average: Any = average) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = task.training_step(given, 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update(task)

        step()
        found = 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        except RuntimeError as error:
            found, text = 1, str(error)
            print(f"{name}/tiny waits: {text[:300]}", file=sys.stderr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows.append(
            Row(f"waits for the device in a step: {name}/tiny", found, None, "", None, 0, "clipping and EMA too")
        )
    return rows


SECTIONS = {"waits": waits, "samplers": samplers, "prior": prior, "decoder": decoder, "small": small}


def describe_gpu() -> dict[str, str]:
    """Device, versions and commit."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=[*SECTIONS, []], help="sections; all if none is given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "benchmarks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU here: nothing measured.", file=sys.stderr)
        return 1
    rows = []
    for name in options.only or SECTIONS:
        rows += SECTIONS[name]()
        released()
        Console(width=200).print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"meta": describe_gpu(), "rows": [row._asdict() for row in rows]}
    (options.out / "gpu.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
