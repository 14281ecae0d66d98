"""Tools of every benchmark: two sides timed in turns, the machine's best speed, rows, and their table.

A script has ``rows()`` and ends in ``show(rows)``. It prints its table; ``run.py`` collects the rows of all.
"""

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

#: Seconds since some moment.
clock = time.perf_counter
#: What operators are called that multiply matrices or convolve, and the others that touch every number.
PRODUCTS = ("conv", "::mm", "::bmm", "::addmm", "::baddbmm", "attention")
PASSES = (
    "silu", "gelu", "softmax", "native_group_norm", "layer_norm", "adamw", "::cat", "::copy_", "::add", "::mul",
    "::lerp", "::sum",
)  # fmt: skip


class Row(NamedTuple):
    """One line of the table.

    name: what was measured.
    ours, peer: in ``unit``; peer is None where nobody else does it.
    ratio: how many times better ours is, above 1 in every unit; None without a peer.
    target: the ratio to reach; without a peer, the limit that ours must keep; None where nothing was promised.
    note: what is behind it: FLOP/s against a plain matmul's, what was compared, what was left out.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    target: float | None
    note: str = ""


class Floor(NamedTuple):
    """The best speed of this machine, measured in the same process with the same number of threads."""

    matmul: float  # FLOP/s, float32
    matmul_bf16: float  # FLOP/s
    memcpy: float  # bytes/s, read and written

    def flops(self, done: float, *, bf16: bool = False) -> str:
        """``done`` FLOP/s beside the matmul's."""
        best = self.matmul_bf16 if bf16 else self.matmul
        kind = "bf16" if bf16 else "float32"
        return f"{done / 1e9:.0f} of {best / 1e9:.0f} GFLOP/s ({kind} matmul), {done / best:.0%}"


@cache
def floor() -> Floor:
    """Matmul of 1,024² matrices as in a linear layer, and a copy of 256 MB."""
    speeds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        speeds.append(2 * 1024**3 / fastest(lambda x=x, w=w: F.linear(x, w), rounds=12))
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)
    return Floor(*speeds, 2 * source.nbytes / fastest(lambda: target.copy_(source), rounds=5))


def fastest(call: Callable[[], Any], rounds: int = 5) -> float:
    """Return the seconds of the fastest of some calls after a warm-up: other work on the machine only adds time."""
    call()
    return side_by_side({"": call}, rounds)[""]


def side_by_side(sides: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Seconds of each side's fastest call. The sides take turns, so that a busy machine slows all of them.

    Nothing is called to warm up: the outputs were compared before, or should have been.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    for _ in range(rounds):
        for name, call in sides.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: min(times) for name, times in seconds.items()}


def flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs of the matmuls, convolutions and attentions in one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def gap(ours: Tensor, peer: Tensor) -> float:
    """Largest difference, in units of the peer's root mean square."""
    return ((ours - peer).abs().max() / peer.square().mean().sqrt()).item()


def expect_equal(ours: Tensor, peer: Tensor, tolerance: float) -> str:
    """Say how far the outputs lie apart; there is nothing to time where they differ.

    Raises:
        AssertionError: more than ``tolerance`` of the peer's root mean square.
    """
    distance = gap(ours, peer)
    assert distance <= tolerance, f"outputs differ by {distance:.1e} of their size; expected at most {tolerance:.0e}"
    return f"outputs equal to {distance:.0e}"


def shares(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the share of the time that products and convolutions take, and that of all kernels.

    What is left goes to Python, autograd and the choice of kernels.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    times = {event.key: event.self_cpu_time_total for event in record.key_averages()}

    def share(*words: str) -> float:
        return sum(t for name, t in times.items() if any(word in name for word in words)) / sum(times.values())

    return share(*PRODUCTS), share(*PRODUCTS, *PASSES)


def limits(call: Callable[[], Any], seconds: dict[str, float], peer: str) -> str:
    """Say how many times a peer's speed ours would be if nothing but kernels took time, and nothing but products."""
    (products, kernels), ratio = shares(call), seconds[peer] / seconds["ours"]
    return f"{ratio / kernels:.2f} × if its kernels alone took time, {ratio / products:.2f} × if its products alone did"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of seconds = c · size^p, by least squares on logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(s) for s in seconds]).slope


def growth(what: str, sizes: Sequence[float], seconds: Sequence[float]) -> Row:
    """A row that says how cost grows."""
    points = ", ".join(f"{size:,.0f}: {second:.3g} s" for size, second in zip(sizes, seconds, strict=True))
    return Row(f"growth: {what}", exponent(sizes, seconds), None, "exponent", None, None, points)


def faster(name: str, seconds: dict[str, float], peer: str, target: float | None, note: str = "") -> Row:
    """A row of milliseconds out of :func:`side_by_side`, whose own side is called "ours"."""
    ours, theirs = seconds["ours"] * 1e3, seconds[peer] * 1e3
    return Row(name, ours, theirs, "ms", theirs / ours, target, note)


def show(rows: Callable[[], list[Row]]) -> None:
    """Measure and print; ``--json FILE`` writes rows and floor as well."""
    parser = argparse.ArgumentParser(description=rows.__doc__)
    parser.add_argument("--json", type=Path, help="where to write the rows as well")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    measured, best = rows(), floor()
    Console(width=200).print(table(measured))
    print(
        f"floor: matmul {best.matmul / 1e9:.0f} GFLOP/s in float32, {best.matmul_bf16 / 1e9:.0f} in bf16, "
        f"memcpy {best.memcpy / 1e9:.1f} GB/s"
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": [row._asdict() for row in measured], "floor": best._asdict()}))


def table(rows: list[Row]) -> Table:
    """For the terminal."""
    shown = Table()
    for title in ("what", "ours", "peer", "unit", "ratio", "target", "note"):
        shown.add_column(title, justify="left" if title in ("what", "note") else "right")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def cells(row: Row) -> list[str]:
    """A row as text."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f} ×"
    target = "" if row.target is None else f"≥ {row.target:g} ×" if row.ratio is not None else f"≤ {row.target:g}"
    return [row.name, number(row.ours), number(row.peer), row.unit, ratio, target, row.note]
