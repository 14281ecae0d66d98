"""Run every benchmark beside this file in a process of its own, and write results/benchmarks/."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Row, cells, table
from rich.console import Console

from unclip_pl.origin import commit

HERE = Path(__file__).parent
PACKAGES = ("unclip_pl", "torch", "lightning", "torchmetrics", "diffusers", "dalle2-pytorch", "numpy")


def main() -> int:
    """Measure, print and write; 1 if a script failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="*", help="names of scripts; all if none is given. The files in --out then hold these alone"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "benchmarks")
    options = parser.parse_args()
    scripts = sorted(path for path in HERE.glob("*.py") if re.search(r"^ +show\(rows\)$", path.read_text(), re.M))
    if unknown := set(options.only) - {path.stem for path in scripts}:
        parser.error(f"Expected scripts among {', '.join(path.stem for path in scripts)}. Got {', '.join(unknown)}.")
    chosen = [path for path in scripts if not options.only or path.stem in options.only]
    started, rows, floors, seconds, failed = time.perf_counter(), [], {}, {}, []
    for path in chosen:
        begin = time.perf_counter()
        result = measure(path)
        seconds[path.stem] = round(time.perf_counter() - begin, 1)
        if result is None:
            failed.append(path.stem)
            continue
        rows += [Row(**row) for row in result["rows"]]
        floors[path.stem] = result["floor"]
    Console(width=200).print(table(rows))
    meta = describe() | {"floor": floors, "seconds": seconds, "failed": failed}
    write(options.out, meta, rows)
    print(f"{len(rows)} rows in {(time.perf_counter() - started) / 60:.1f} minutes: {options.out}")
    return 1 if failed else 0


def measure(path: Path) -> dict[str, Any] | None:
    """Rows and floor of one script; None if it failed, which the others survive."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, "-W", "ignore", str(path), "--json", str(out)]
        code = subprocess.run(words, cwd=HERE.parent).returncode
        return json.loads(out.read_text()) if code == 0 and out.is_file() else None


def describe() -> dict[str, Any]:
    """Hardware, versions and commit."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text() if info.is_file() else "").splitlines()
        if line.startswith("model name")
    ]
    model = names[0] if names else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"hardware": {"cpu": model, "cores": cores, "gpu": gpu}, "versions": versions, "commit": commit()}


PREAMBLE = """# Benchmarks

`make bench` on {cores} cores of {cpu}, {gpu}, commit {commit}; {versions}.

A ratio compares the fastest calls of two sides that are timed in turns in one process. Where both have the same
weights, their outputs are compared first. A target of a ratio (≥) says how many times better ours should be; a target
of a plain figure (≤) is its limit. `gpu.md` has measurements on a GPU, by `benchmarks/gpu.py`.

| what | ours | peer | unit | ratio | target | note |
| --- | ---: | ---: | --- | ---: | ---: | --- |
"""
FLOORS = """
The best speed of the machine, measured by each script in its own process:

| script | float32 matmul, GFLOP/s | bf16 matmul, GFLOP/s | memcpy, GB/s | took, s |
| --- | ---: | ---: | ---: | ---: |
"""


def write(out: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """Write ``benchmarks.json``, and the same as a table in ``README.md``."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"meta": meta, "rows": [row._asdict() for row in rows]}
    (out / "benchmarks.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    hardware = meta["hardware"] | {"gpu": meta["hardware"]["gpu"] or "no GPU"}
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    text = PREAMBLE.format(**hardware, commit=meta["commit"], versions=versions)
    for row in map(cells, rows):
        text += f"| {' | '.join(row)} |\n"
    text += FLOORS
    for name, best in meta["floor"].items():
        figures = [f"{best[key] / 1e9:.0f}" for key in ("matmul", "matmul_bf16", "memcpy")]
        text += f"| {name} | {' | '.join(figures)} | {meta['seconds'][name]:.0f} |\n"
    (out / "README.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
