"""``unclip reproduce``: a recipe's stages in order, each once."""

import hashlib
import json
import os
import secrets
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from unclip_pl.cli import dispatch
from unclip_pl.data.shards import list_shards
from unclip_pl.evaluation.provenance import STAGES
from unclip_pl.evaluation.report import render
from unclip_pl.pipeline import write_run


@dataclass
class Stage:
    """One command of a recipe.

    Args:
        run: the command line after ``unclip``; ``{run}`` is the run's folder, ``{source}`` the shards.
        needs: stages whose results it reads.
    """

    run: str
    needs: list[str] = field(default_factory=list)


def reproduce(stages: dict[str, Stage], run: str, source: str = "{run}/data", *, compare: str | None = None) -> None:
    """Run a recipe: finished stages are skipped, an interrupted one goes on, a changed one is done again.

    Args:
        stages: by name, in order.
        run: folder of everything that is made.
        source: shards to work on, for recipes that do not make their own. When they change, what reads them is done
            again.
        compare: config of the comparison; ``run.json`` takes CLIP, judge, decoder and priors from it.
    """
    root = Path(run)
    root.mkdir(parents=True, exist_ok=True)
    places = {"{run}": str(root), "{source}": str(Path(source.replace("{run}", str(root))))}
    shards = [] if "{run}" in source else [_state(shard) for shard in list_shards(source)]
    console = Console()
    _check_needs(stages)
    keys: dict[str, str] = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        words = [_fill(word, places) for word in shlex.split(stage.run)]
        # A stage that was made again, though nothing of it changed, has another stamp: what it gave is not the same.
        needs = [f"{keys[need]} {_records(root)[need].get('stamp', '')}" for need in stage.needs]
        keys[name] = stage_key(words, [*needs, *shards] if "{source}" in stage.run else needs)
        record = _records(root).get(name, {})
        title = f"[{number}/{len(stages)}] {name}"
        if record.get("key") == keys[name] and record.get("done") and _made(root, name):
            console.print(f"{title}: done in {record['seconds']:.0f} s, skipped", style="dim")
            continue
        console.rule(f"{title}: unclip {shlex.join(words)}", align="left")
        resumed = record.get("key") == keys[name] and not record.get("done")
        if not resumed:
            _set_aside(root, name)
            stamp = secrets.token_hex(8)
            record = {"key": keys[name], "stamp": stamp, "command": words, "seconds": 0.0, "done": False}
        _write(root, name, record)
        if compare and words[0] == "test":
            write_run(root, describe_run(compare, root))
        started = time.perf_counter()
        try:
            dispatch([*words, *_resume(root, name, words)])
        finally:
            record["seconds"] += time.perf_counter() - started
            _write(root, name, record)
        record["done"] = True
        _write(root, name, record)
        console.print(f"{title}: {record['seconds']:.0f} s")
    if (root / "report.json").is_file():
        render(root)  # again, now that the last stage's own time is known
    total = sum(_records(root)[name]["seconds"] for name in stages)
    console.rule(f"all {len(stages)} stages done, {total / 60:.1f} minutes: {root}", align="left")


def stage_key(words: list[str], needs: list[str]) -> str:
    """Changes when the command, a config it names (or one named in there), or a stage it needs changes.

    Comments and layout of a config do not count.
    """
    configs = [resolved(Path(words[i + 1])) for i, word in enumerate(words[:-1]) if word == "--config"]
    return hashlib.sha256(json.dumps([words, configs, needs], sort_keys=True).encode()).hexdigest()[:16]


def resolved(path: Path) -> Any:
    """A YAML file's content with the files that it names by relative path put in their place."""
    if not path.is_file():
        raise FileNotFoundError(f"No config at {path}: expected a YAML file, such as those under configs/.")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: inline(value) for key, value in node.items()}
        if isinstance(node, list):
            return [inline(value) for value in node]
        if isinstance(node, str) and node.endswith((".yaml", ".yml")) and (path.parent / node).is_file():
            return resolved(path.parent / node)
        return node

    return inline(yaml.safe_load(path.read_text()))


def describe_run(compare: str, root: Path) -> dict[str, Any]:
    """``run.json`` from the comparison's config: sampled pictures and compared numbers come from the same priors."""
    model = resolved(Path(compare))["model"]["init_args"]
    return {name: model[name] for name in ("clip", "judge", "decoder", "priors")} | {"store": "store"}


def _fill(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def _state(shard: Path) -> str:
    stat = shard.stat()
    return f"{shard.name} {stat.st_size} {stat.st_mtime_ns}"


def _check_needs(stages: dict[str, Stage]) -> None:
    before: set[str] = set()
    for name, stage in stages.items():
        unknown = set(stage.needs) - before
        if unknown:
            raise ValueError(f"Stage {name!r} needs {sorted(unknown)}. Expected stages that stand before it.")
        before.add(name)


def _records(root: Path) -> dict[str, dict[str, Any]]:
    path = root / STAGES
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(root: Path, name: str, record: dict[str, Any]) -> None:
    """Into ``stages.json``, whole or not at all."""
    temporary = root / f"{STAGES}.tmp"
    temporary.write_text(json.dumps(_records(root) | {name: record}, indent=2) + "\n")
    os.replace(temporary, root / STAGES)


def _made(root: Path, name: str) -> list[Path]:
    """What a stage leaves bears its name: a folder, or a file."""
    return [path for path in (root / name, root / f"{name}.safetensors") if path.exists()]


def _set_aside(root: Path, name: str) -> None:
    """What an earlier recipe made is not deleted: it moves to ``replaced/``."""
    for path in _made(root, name):
        target = root / "replaced" / f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)


def _resume(root: Path, name: str, words: list[str]) -> list[str]:
    checkpoint = root / name / "checkpoints" / "last.ckpt"
    return ["--ckpt_path", str(checkpoint)] if words[0] == "fit" and checkpoint.is_file() else []
