"""Measure on a GPU: the share of its peak that training steps reach, what replayed samplers save, that no step waits.

`make bench` does not run this script. Run `python benchmarks/gpu.py` where torch finds a GPU, with the names of some
sections, or without names for all; it writes gpu.json and gpu.md into results/benchmarks. A step is
forward, backward and fused AdamW in bfloat16 autocast, on a batch on the device, captions as long as the context.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ar_decoding import captions, network, values
from lightning import Trainer
from measure import Row, cells, flops, table
from parts import Part, build
from rich.console import Console
from torch import Tensor

import unclip_pl.generation.priors
import unclip_pl.nn.ar_prior
from unclip_pl.diffusion import Ancestral
from unclip_pl.origin import commit
from unclip_pl.parts import count_parameters
from unclip_pl.training.callbacks import WarmupEMA, compile_blocks

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


def to_device(batch: Any) -> Any:
    """A batch, which may hold batches."""
    return type(batch)(*(part.to(DEVICE) if isinstance(part, Tensor) else to_device(part) for part in batch))


def step_of(task: Any, given: Any) -> Callable[[], None]:
    """One training step."""
    task.train()
    optimizer = task.optimizer()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = task.training_step(given, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def counted(part: Part, batch: int) -> int:
    """FLOPs of a step. Before anything is compiled: where torch has counted, it compiles no more."""
    return flops(step_of(part.task, to_device(part.batch(batch))))


def trained(name: str, part: Part, batch: int, work: int, note: str = "") -> Row:
    """A row of one part's training step: MFU, and in the note milliseconds, samples and memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    took = seconds(step_of(part.task, to_device(part.batch(batch))))
    held = torch.cuda.max_memory_allocated() / 2**30
    speed = f"{took * 1e3:.1f} ms, {batch / took:,.0f} samples/s, {work / took / 1e12:.0f} TFLOP/s, {held:.1f} GiB"
    label = f"{name}, {count_parameters(part.task.net) / 1e6:,.0f} M parameters, batch {batch}"
    return Row(label, work / took / PEAK * 100, None, "% MFU", None, None, f"{speed}{note}")


def prior() -> list[Row]:
    """The paper's diffusion prior, whose step fits one GPU whole: at least 45 % is to be reached."""
    part = build("prior/paper", "cuda")
    work = counted(part, 64)
    rows = [trained("prior/paper", part, n, n * work // 64) for n in (64, 128)]
    compile_blocks(part.task)
    return rows + [trained("prior/paper", part, n, n * work // 64, "; CompiledBlocks") for n in (64, 128)]


def decoder() -> Iterator[Row]:
    """The paper's decoder: at least 40 % is to be reached, with compiled norms and channels last."""
    part = build("decoder/paper", "cuda")
    work = 2 * counted(part, 16)
    yield trained("decoder/paper", part, 32, work)
    compile_blocks(part.task)
    yield trained("decoder/paper", part, 32, work, "; CompiledBlocks")


def small() -> list[Row]:
    """A step of every small config, at its own batch."""
    rows = []
    for name in ("clip", "prior", "ar_prior", "decoder", "upsampler"):
        part = build(f"{name}/small", "cuda")
        rows.append(trained(f"{name}/small", part, part.batch_size, counted(part, part.batch_size)))
    return rows


def samplers() -> list[Row]:
    """CUDA graphs in the samplers of both priors, against the same steps launched one kernel at a time."""
    net, text, table_of_values = network(319).to(DEVICE), to_device(captions()), values(319).to(DEVICE)
    part = build("prior/small", "cuda")
    priors = unclip_pl.generation.priors
    prior = priors.DiffusionPrior(priors.DiffusionPriorSpec("", Ancestral(64), guidance=2.0), part.task.eval())
    given = to_device(part.batch(8)).text

    def generator() -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(2)

    rows = []
    for label, call, module in (
        (
            "AR prior decoding, batch 8, 321 positions, 256 × 4",
            lambda: net.generate(text, values_of=table_of_values, generator=generator()),
            unclip_pl.nn.ar_prior,
        ),
        (
            "prior sampling, batch 8, 64 steps guided, 2 candidates, 512 × 12",
            lambda: prior.embed(given, generator=generator()),
            unclip_pl.generation.priors,
        ),
    ):
        ours, drawn = seconds(call, 5), call()
        with patch.object(module, "recorded", lambda step, device: step):
            peer, again = seconds(call, 3), call()
        note = f"CUDA graph against launched kernels; the same to {(drawn.double() - again.double()).abs().max():.0e}"
        rows.append(Row(label, ours * 1e3, peer * 1e3, "ms", peer / ours, None, note))
    return rows


def waits() -> list[Row]:
    """Steps of every tiny config with torch's alarm for operations that wait for the device."""
    rows = []
    for name in ("clip", "prior", "ar_prior", "decoder", "upsampler"):
        part = build(f"{name}/tiny", "cuda")
        step, average = step_of(part.task, to_device(part.batch(8))), WarmupEMA()
        average.on_fit_start(Trainer(accelerator="gpu", logger=False), part.task)
        step()
        found = 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
                average.update()
        except RuntimeError as error:
            found = 1
            print(f"{name}/tiny: {error}", file=sys.stderr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows.append(Row(f"waits for the device in a training step: {name}/tiny", found, None, "", None, 0))
    return rows


SECTIONS: dict[str, Callable[[], Iterable[Row]]] = {
    "waits": waits,
    "samplers": samplers,
    "prior": prior,
    "decoder": decoder,
    "small": small,
}
PREAMBLE = """# Benchmarks on a GPU

`python benchmarks/gpu.py` on one {device}, torch {torch}, CUDA {cuda}, commit {commit}. A plain bfloat16 product of
8,192² matrices reaches {matmul:.0f} TFLOP/s in the same run; MFU is a share of the datasheet's 989.

| what | ours | peer | unit | ratio | note |
| --- | ---: | ---: | --- | ---: | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=[*SECTIONS, []], help="sections; all if none is given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "benchmarks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU here: nothing measured.", file=sys.stderr)
        return 1
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    meta = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
        "matmul": 2 * 8192**3 / seconds(lambda: x @ x) / 1e12,
    }
    rows: list[Row] = []
    for name in options.only or SECTIONS:
        for row in SECTIONS[name]():
            rows.append(row)
            write(options.out, meta, rows)  # a later one may run out of memory, or of time
        Console(width=200).print(table(rows))
    return 0


def write(out: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """``gpu.json``, and the same as a table in ``gpu.md``."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"meta": meta, "rows": [row._asdict() for row in rows]}
    (out / "gpu.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    text = PREAMBLE.format(**meta)
    for name, ours, peer, unit, ratio, _, note in map(cells, rows):
        text += f"| {name} | {ours} | {peer} | {unit} | {ratio} | {note} |\n"
    (out / "gpu.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
