"""Where a number comes from: commit, machine, versions, threads, settings, times."""

import json
import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unclip_pl.generation.bundle import read_notes
from unclip_pl.origin import commit

#: Folder of a run, or of a study's results, in which ``unclip reproduce`` notes its stages: a record and a log of each.
STAGES = "stages"
#: File in the folder of a study's results: its own table of claims.
CLAIMS = "claims.yaml"
#: File in the folder of a fit: its steps a second, MFU, and the busy share of the GPU.
PROFILE = "profile.json"
#: Longer lists, such as a sampler's times, follow from the other settings.
FEW = 8
PACKAGES = ("unclip_pl", "torch", "lightning", "open_clip_torch", "torchmetrics", "numpy")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return commit, hardware, threads and versions: all that may change a number's last digits."""
    return {"commit": commit(), "hardware": _hardware(device), "versions": _versions()}


def settings(thing: Any) -> Any:
    """Return an object as plain data: its class and constructor arguments. Call it before weights are loaded."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, dict):
        return {str(key): settings(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple) and not hasattr(thing, "_fields"):
        return [settings(value) for value in thing] if len(thing) <= FEW else f"{len(thing)} values"
    name = type(thing).__name__.removesuffix("Spec")
    if isinstance(thing, torch.nn.Module):
        return name
    # Until something is loaded, the attributes of these objects are their constructor arguments.
    values = {key: settings(value) for key, value in getattr(thing, "__dict__", {}).items() if not key.startswith("_")}
    return {"class": name, **values}


def stage_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what ``unclip reproduce`` noted of each stage, in the order in which they ended.

    Args:
        folder: folder of a run, or of a study's results.

    Returns:
        Records by the stage's name, each with ``command``, ``out``, ``seconds``, ``ended`` (UTC; absent in a stage that
        was measured before times were noted), ``done``, ``commits``, ``threads``, ``profile`` (of a fit that wrote
        one), and the stamps that tell results apart.
    """
    files = sorted((folder / STAGES).glob("[!.]*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return dict(sorted(records.items(), key=lambda item: item[1].get("ended", "")))


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return what each stage of ``unclip reproduce`` took in seconds, in the order in which they ended."""
    return {name: record["seconds"] for name, record in stage_records(folder).items()}


def stage_profiles(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the profiles of the stages that wrote one (``StageProfile``), in the order in which they ended."""
    return {name: record["profile"] for name, record in stage_records(folder).items() if "profile" in record}


def trained_on_shapes(run: Path) -> bool:
    """Return whether a run was trained on rendered shapes, by what is noted of its stages."""
    noted = [*read_notes(run).get("recipe", {}).values(), *(x["command"] for x in stage_records(run).values())]
    return any("pack shapes" in command for command in noted)


def wall_seconds(folder: Path) -> float:
    """Return the seconds in which at least one stage ran: less than their sum where stages ran side by side."""
    total, until = 0.0, float("-inf")
    for record in sorted(stage_records(folder).values(), key=_started):
        start, seconds = _started(record), record["seconds"]
        if "ended" not in record:
            total += seconds
            continue
        total += max(0.0, start + seconds - max(start, until))
        until = max(until, start + seconds)
    return total


def _started(record: dict[str, Any]) -> float:
    """Return the second at which a stage started, had it run without a break."""
    return datetime.fromisoformat(record["ended"]).timestamp() - record["seconds"] if "ended" in record else 0.0


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
