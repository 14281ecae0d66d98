"""Where a report's numbers come from: commit, machine, versions, settings, times."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: What ``unclip reproduce`` writes of its stages, in the run's folder.
STAGES = "stages.json"
#: Longer lists, such as a sampler's times, follow from the other settings.
FEW = 8
PACKAGES = ("unclip_pl", "torch", "lightning", "open_clip_torch", "torchmetrics", "numpy")


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions."""
    return {"commit": commit(), "hardware": _hardware(device), "versions": _versions()}


def settings(thing: Any) -> Any:
    """An object of ours as plain data: its class and constructor arguments. Call it before weights are loaded."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, dict):
        return {str(key): settings(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple) and not hasattr(thing, "_fields"):
        return [settings(value) for value in thing] if len(thing) <= FEW else f"{len(thing)} values"
    name = type(thing).__name__.removesuffix("Spec")
    if isinstance(thing, torch.nn.Module):
        return name
    # Slots-less objects of ours and of the user's: attributes are constructor arguments until something is loaded.
    values = {key: settings(value) for key, value in getattr(thing, "__dict__", {}).items() if not key.startswith("_")}
    return {"class": name, **values}


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return what each stage of ``unclip reproduce`` took in seconds."""
    path = folder / STAGES
    records = json.loads(path.read_text()) if path.is_file() else {}
    return {name: record["seconds"] for name, record in records.items()}


def wall_seconds(folder: Path) -> float:
    """Return the seconds in which stages ran."""
    return sum(stage_seconds(folder).values())


def commit() -> str:
    """Of the working tree that this code belongs to; marked where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = [subprocess.run([*git, *words], capture_output=True, text=True, timeout=10) for words in _QUESTIONS]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if any(answer.returncode for answer in run):
        return "unknown"
    commit, changes, _ = (answer.stdout.strip() for answer in run)
    return f"{commit} with local changes" if changes else commit


_QUESTIONS = (
    ["rev-parse", "--short=12", "HEAD"],
    # A study writes its cells into results/ as they come: that changes no number of the next one.
    ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"],
    ["ls-files", "--error-unmatch", Path(__file__).name],
)


def _hardware(device: torch.device) -> str:
    cpu = f"{os.cpu_count()} × {_processor()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name != "unknown"), platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "source"
    return found
