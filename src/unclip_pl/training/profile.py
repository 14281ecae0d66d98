"""The profile of a fit: steps a second, arithmetic a second, and the share of time in which the GPU computes."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.files import write_json
from unclip_pl.generation.provenance import PROFILE

#: Dense bfloat16 peak in FLOP/s by the datasheet, by a word of the card's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class StageProfile(Callback):
    """Write ``profile.json`` at the end of a fit: steps a second, MFU and the busy share of the GPU.

    MFU (model FLOPs utilisation) is the arithmetic per second over the bfloat16 peak in the card's datasheet. Times
    run from the warm-up to the end of training, validation and checkpoints included. The busy share is measured in the
    last steps: the time in which a kernel of this process runs, over wall clock. They are left out of the times, and
    they come last since the recorder slows every launch of a kernel that follows, also after it has ended.

    Args:
        warmup: steps of this fit that are left out of every time.
        window: last steps, whose kernels are recorded.
    """

    def __init__(self, warmup: int = 10, window: int = 10) -> None:
        self.warmup = warmup
        self.window = window
        self._steps = 0
        self._flops = 0
        self._busy: float | None = None
        self._started = 0.0
        self._timed: tuple[int, float] | None = None  # steps and seconds before the recorder
        self._window_started = 0.0
        self._counter: FlopCounterMode | None = None
        self._recorder: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the counter, the clock or the recorder at the step that each begins with."""
        on_gpu = pl_module.device.type == "cuda"
        if self._steps == 1:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        if self._steps == self.warmup:
            _wait(on_gpu)
            self._started = time.perf_counter()
        rest = trainer.estimated_stepping_batches - trainer.global_step
        if on_gpu and self._timed is None and self._steps > self.warmup and rest <= self.window:
            _wait(on_gpu)
            self._timed = self._steps - self.warmup, time.perf_counter() - self._started
            self._recorder = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
            self._recorder.start()
            self._window_started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Read the counter or the recorder where this step ends its measurement."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops, self._counter = self._counter.get_total_flops(), None
        self._steps += 1
        if self._recorder is not None and trainer.global_step >= trainer.estimated_stepping_batches:
            _wait(True)
            wall = time.perf_counter() - self._window_started
            self._recorder.stop()
            kernels = [e.time_range for e in self._recorder.events() or [] if e.device_type == DeviceType.CUDA]
            self._busy = union((k.start, k.end) for k in kernels) / 1e6 / wall
            self._recorder = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file. A fit shorter than the warm-up writes none."""
        folder = trainer.log_dir  # asks every rank, and one rank alone writes
        if folder is None or not trainer.is_global_zero or self._steps <= self.warmup:
            return
        on_gpu = pl_module.device.type == "cuda"
        _wait(on_gpu)
        steps, seconds = self._timed or (self._steps - self.warmup, time.perf_counter() - self._started)
        name = torch.cuda.get_device_name(pl_module.device) if on_gpu else "CPU"
        peak = next((peak for word, peak in PEAKS.items() if word in name), None)
        done = self._flops * steps / seconds
        write_json(
            Path(folder) / PROFILE,
            {
                "device": name,
                "steps": steps,
                "steps_per_second": steps / seconds,
                "flops_per_step": self._flops,
                "flops_per_second": done,
                "mfu": done / peak if peak else None,
                "gpu_busy": self._busy,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(pl_module.device) if on_gpu else None,
            },
            indent=2,
        )


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length that intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
