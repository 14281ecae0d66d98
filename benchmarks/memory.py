"""Memory of a training step of every tiny and small config, on a CPU: weights, gradients, Adam's moments, the average
and activations.

A process of its own for each, whose peak is taken above what it held before there was a network. The small configs are
for one GPU: their peak is measured at two small batches, and the line through both is read at the config's.
"""

import copy
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from measure import Row, show
from parts import build

#: Batches of the small configs: their activations are more than their gradients, and yet a matter of seconds.
FEW = {"clip": (8, 16), "prior": (16, 32), "ar_prior": (8, 16), "decoder": (4, 8), "upsampler": (4, 8)}
NAMES = ["clip/tiny", "clip/tiny-judge", *(f"{part}/tiny" for part in FEW if part != "clip")]


def step(name: str, batch: int) -> dict[str, float]:
    """GiB: what the libraries hold, the peak of two steps above it, and the config's own batch.

    The first step, on two rows, is there for Adam's moments.
    """
    libraries = resident()
    part = build(name)
    task = part.task.train()
    averaged = [copy.deepcopy(task.state_dict()) for callback in part.trainer["callbacks"] if "EMA" in str(callback)]
    optimizer = task.optimizer()
    for n in (2, batch or part.batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=part.trainer.get("precision") == "bf16-mixed"):
            loss = task.training_step(part.batch(n), 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del averaged
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"libraries": libraries, "peak": peak - libraries, "batch": part.batch_size}


def resident() -> float:
    """GiB of this process now."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20


def measure(name: str, batch: int = 0) -> dict[str, float]:
    """``step`` in a process of its own; batch 0 is the config's."""
    words = [sys.executable, "-W", "ignore", __file__, "--step", name, str(batch)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def rows() -> list[Row]:
    """GiB at the peak."""
    measured = []
    for name in NAMES:
        found = measure(name)
        note = f"above {found['libraries']:.2f} GiB of libraries"
        measured.append(Row(f"memory: {name}, batch {found['batch']}", found["peak"], None, "GiB", None, None, note))
    for part, (few, more) in FEW.items():
        at_few, at_more = (measure(f"{part}/small", batch) for batch in (few, more))
        slope = (at_more["peak"] - at_few["peak"]) / (more - few)
        batch = at_few["batch"]
        peak = at_few["peak"] + slope * (batch - few)
        note = f"{at_few['peak']:.2f} at batch {few}, {at_more['peak']:.2f} at {more}, and on that line; in bf16"
        measured.append(Row(f"memory: {part}/small, batch {batch}", peak, None, "GiB", None, None, note))
    return measured


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(step(sys.argv[2], int(sys.argv[3]))))
    else:
        show(rows)
