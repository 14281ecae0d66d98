"""``unclip reproduce``: a recipe's stages in order, each once."""

import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track

from unclip_pl.cli import dispatch
from unclip_pl.commands.plan import Stage, spell_out, work, write_out
from unclip_pl.data.shards import Shard, list_shards
from unclip_pl.errors import MissingFileError
from unclip_pl.files import previous_of, sha256, write_json
from unclip_pl.generation.provenance import STAGES, commit
from unclip_pl.generation.run import write_run
from unclip_pl.report import draw, log, summary
from unclip_pl.report.study import CELLS

#: In the run's folder: what the source's shards hold.
SHARDS = "shards.json"


def reproduce(
    stages: dict[str, Stage],
    run: str,
    source: str = "{run}/data",
    *,
    compare: str | None = None,
    base: str = "",
    base_recipe: str = "",
    results: str = "",
    shorthand: dict[str, str] | None = None,
) -> None:
    """Run a recipe: finished stages are skipped, an interrupted one goes on, a changed one is done again.

    Args:
        stages: by name, in order.
        run: folder of everything that is made.
        source: shards to work on, for recipes that do not make their own. When they change, what reads them is done
            again.
        compare: config of the comparison; ``run.json`` takes CLIP, judge, decoder and priors from it.
        base: folder of a run that this one builds on.
        base_recipe: what makes that run where there is none yet.
        results: folder of what is kept, small enough to be committed: measurements, and the report on them. What is
            measured stays measured, also where the run is lost.
        shorthand: words that many commands share; ``{NAME}`` stands for them.
    """
    root = Path(run)
    root.mkdir(parents=True, exist_ok=True)
    place = str(Path(source.replace("{run}", str(root))))
    places = {"{run}": str(root), "{source}": place, "{base}": base, "{results}": results, "{precision}": precision()}
    shards = [] if "{run}" in source else _contents(list_shards(source), root / SHARDS)
    console = Console()
    if base:
        _bring_about(base, base_recipe, [] if "{run}" in source else ["--source", source])
    recipe = Recipe(write_out(spell_out(stages, shorthand or {})), root, places, shards)
    wanted = work(recipe.stages, recipe.done, lambda name: recipe.kept(name) is not None)
    for number, name in enumerate(recipe.stages, 1):
        title = f"[{number}/{len(recipe.stages)}] {name}"
        if name not in wanted:
            done = (
                f"done in {recipe.record(name)['seconds']:.0f} s" if recipe.record(name) else "what it was for is done"
            )
            console.print(f"{title}: {done}, skipped", style="dim")
            continue
        words = recipe.words(name)
        console.rule(f"{title}: unclip {shlex.join(words)}", align="left")
        key, record = recipe.key(name), recipe.record(name)
        resumed = record.get("key") == key and not record.get("done")
        if not resumed:
            _set_aside(root, name, recipe.kept(name))
            stamp = secrets.token_hex(8)
            # What is kept is shared: its notes name no folder of this machine.
            command = shlex.split(recipe.stages[name].run) if recipe.kept(name) else words
            record = {"key": key, "stamp": stamp, "command": command, "seconds": 0.0, "done": False, "commits": []}
        record["commits"] = list(dict.fromkeys([*record.get("commits", []), commit()]))  # several, if it was resumed
        recipe.write(name, record)
        if compare and words[0] == "test":
            write_run(root, describe_run(compare, root))
        started = time.perf_counter()
        try:
            dispatch([*words, *_resume(root, name, words)])
        finally:
            record["seconds"] += time.perf_counter() - started
            recipe.write(name, record)
        record["done"] = True
        recipe.write(name, record)
        console.print(f"{title}: {record['seconds']:.0f} s")
    folder = Path(results or root)
    if (folder / CELLS).is_dir():
        report = draw(folder)  # again, now that the last stage's own time is known
        summary(folder, report)
        if results:
            log(report, root / "study")
    total = sum(recipe.record(name).get("seconds", 0.0) for name in recipe.stages)
    console.rule(f"all {len(recipe.stages)} stages done, {total / 60:.1f} minutes: {results or root}", align="left")


class Recipe:
    """Written-out stages and what is known of them on disk.

    Args:
        stages: without matrices.
        root: the run's folder.
        places: what stands for ``{run}`` and its like.
        shards: what the source's hold.
    """

    def __init__(self, stages: dict[str, Stage], root: Path, places: dict[str, str], shards: list[str]) -> None:
        self.stages = stages
        self.root = root
        self.places = places
        self.shards = shards

    def words(self, name: str) -> list[str]:
        """The command, its places filled in."""
        return [_fill(word, self.places) for word in shlex.split(self.stages[name].run)]

    def kept(self, name: str) -> Path | None:
        """The file under ``{results}`` that a stage writes, if it does: what follows an option called ``out``."""
        words = shlex.split(self.stages[name].run)
        files = [b for a, b in pairwise(words) if re.fullmatch(r"--(.*\.)?out", a) and b.startswith("{results}/")]
        return Path(_fill(files[0], self.places)) if files else None

    def key(self, name: str) -> str:
        """Changes when what a stage gives may change; not with where the run lies, nor how its folder is written."""
        if self.kept(name):
            return self.lasting(name)
        stage = self.stages[name]
        # A stage that was made again, though nothing of it changed, has another stamp: what it gave is not the same.
        needs = [f"{self.key(need)} {self.record(need).get('stamp', '')}" for need in stage.needs]
        needs += self.shards if "{source}" in stage.run else []
        needs += self._base(stage.run)
        return _digest([shlex.split(stage.run), _configs(self.words(name)), needs])

    def lasting(self, name: str) -> str:
        """Changes with the recipe alone, and not with how often something was made again."""
        stage = self.stages[name]
        needs = [self.lasting(need) for need in stage.needs]
        return _digest([shlex.split(stage.run), _configs(self.words(name)), needs])

    def done(self, name: str) -> bool:
        """Whether a stage's result is there, of this very key."""
        try:
            key = self.key(name)
        except FileNotFoundError:  # a config that another stage is still to write
            return False
        record, kept = self.record(name), self.kept(name)
        there = kept.is_file() if kept else bool(_made(self.root, name))
        return record.get("key") == key and record.get("done", False) and there

    def record(self, name: str) -> dict[str, Any]:
        """What was noted when the stage ran."""
        return _records(self._notes(name)).get(name, {})

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Note it: beside the measurements for those, in the run for all else."""
        _write(self._notes(name), name, record)

    def _notes(self, name: str) -> Path:
        return Path(self.places["{results}"]) if self.kept(name) else self.root

    def _base(self, run: str) -> list[str]:
        """Stamps of the base's stages that a command names; of all of them where it names the base alone."""
        named = set(re.findall(r"\{base\}/?([^\s/]*)", run))
        return [
            f"{name} {record.get('stamp', '')}"
            for name, record in (_records(Path(self.places["{base}"])) if named else {}).items()
            if named & {"", name, f"{name}.safetensors"}
        ]


def _bring_about(base: str, recipe: str, words: list[str]) -> None:
    """The run that this one builds on; a finished one is taken as it is.

    Raises:
        FileNotFoundError: there is none, and nothing that says how to make it.
    """
    if (Path(base) / "run.json").is_file():
        return
    if not recipe:
        raise MissingFileError(f"No run at {base}: expected one that this recipe builds on, or base_recipe to make it.")
    dispatch(["reproduce", "--config", recipe, "--run", base, *words])


def _configs(words: list[str]) -> list[Any]:
    """What the configs say that a command names: comments and layout do not count."""
    return [resolved(Path(b)) for a, b in pairwise(words) if a == "--config"]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def resolved(path: Path) -> Any:
    """A YAML file's content with the files that it names by relative path put in their place."""
    if not path.is_file():
        raise MissingFileError(f"No config at {path}: expected a YAML file, such as those under configs/.")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: inline(value) for key, value in node.items()}
        if isinstance(node, list):
            return [inline(value) for value in node]
        if isinstance(node, str) and node.endswith((".yaml", ".yml")) and (path.parent / node).is_file():
            return resolved(path.parent / node)
        return node

    return inline(_read_yaml(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=256)
def _read_yaml(path: Path, changed: int) -> Any:
    """A recipe of many stages asks for the same few files again and again."""
    return yaml.safe_load(path.read_text())


def describe_run(compare: str, root: Path) -> dict[str, Any]:
    """``run.json`` from the comparison's config: sampled pictures and compared numbers come from the same priors."""
    model = resolved(Path(compare))["model"]["init_args"]
    return {name: model[name] for name in ("clip", "judge", "decoder", "priors")} | {"store": "store"}


def precision() -> str:
    """What ``{precision}`` stands for: mixed, where this machine multiplies in bfloat16; elsewhere that is slower."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch that we take
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


def _fill(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def _contents(shards: list[Shard], notes: Path) -> list[str]:
    """What shards hold, whatever their dates say: a copy is the same. Read through once, and again when touched."""
    seen = json.loads(notes.read_text()) if notes.is_file() else {}
    local: dict[str, dict[str, Any]] = {}
    for shard in track([shard for shard in shards if not shard.remote], "Reading shards", transient=True):
        stat = shard.path.stat()
        now = {"size": stat.st_size, "changed_ns": stat.st_mtime_ns}
        known = seen.get(shard.name, {})
        same = {name: known.get(name) for name in now} == now
        local[shard.name] = now | {"sha256": known["sha256"] if same else sha256(shard.path)}
    write_json(notes, local)
    return [f"{shard.name} {shard.stamp() if shard.remote else local[shard.name]['sha256']}" for shard in shards]


def _records(root: Path) -> dict[str, dict[str, Any]]:
    path = root / STAGES
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(root: Path, name: str, record: dict[str, Any]) -> None:
    """Into ``stages.json``, whole or not at all."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f"{STAGES}.tmp"
    temporary.write_text(json.dumps(_records(root) | {name: record}, indent=2) + "\n")
    os.replace(temporary, root / STAGES)


def _made(root: Path, name: str) -> list[Path]:
    """What a stage leaves bears its name: a folder, or a file."""
    return [path for path in (root / name, root / f"{name}.safetensors") if path.exists()]


def _set_aside(root: Path, name: str, kept: Path | None) -> None:
    """What an earlier recipe made is not deleted: it moves to ``replaced/``."""
    for path in [kept] if kept and kept.exists() else _made(root, name):
        target = root / "replaced" / f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)


def _resume(root: Path, name: str, words: list[str]) -> list[str]:
    checkpoint = root / name / "checkpoints" / "last.ckpt"
    found = checkpoint.is_file() or previous_of(checkpoint).is_file()
    return ["--ckpt_path", str(checkpoint)] if words[0] == "fit" and found else []
