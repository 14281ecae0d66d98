"""``unclip reproduce``: a recipe's stages in order, each once and each as a process of its own.

Which stages have work to do is decided in :mod:`unclip_pl.commands.plan`.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import track

from unclip_pl.commands.launch import Process
from unclip_pl.commands.plan import Recipe, Stage, digest
from unclip_pl.data.shards import Shard, list_shards
from unclip_pl.data.store import MANIFEST, read_manifest
from unclip_pl.errors import InputError
from unclip_pl.files import alone, previous_of, sha256, write_json, write_text
from unclip_pl.generation.provenance import CLAIMS, PROFILE, STAGES
from unclip_pl.nn.kernels import fast_bfloat16
from unclip_pl.origin import commit
from unclip_pl.settings import find, no_config, read_yaml

#: File in the run's folder: what the source's shards hold.
SHARDS = "shards.json"
#: Seconds between two looks at the running stages.
PAUSE = 0.05


def reproduce(
    stages: dict[str, Stage],
    run: str,
    source: str = "{run}/data",
    *,
    compare: str | None = None,
    upsamplers: list[dict] | None = None,  # dict[str, Any] would have the parser build what stands under class_path
    base: str = "",
    base_recipe: str = "",
    results: str = "",
    claims: str = "",
    only: str = "",
    dry_run: bool = False,
    jobs: PositiveInt = 1,
) -> None:
    """Run a recipe: finished stages are skipped, an interrupted one goes on, a changed one is done again.

    Args:
        stages: the stages by name, in order.
        run: folder of everything that is made.
        source: shards to work on, for recipes that do not make their own; a store of embeddings, for recipes that need
            no more. When they change, what reads them is done again.
        compare: config of the comparison; ``run.json`` takes CLIP, judge, decoder and priors from it.
        upsamplers: specs of upsamplers that ``run.json`` gives the decoder, and the comparison leaves out.
        base: folder of a run that this one builds on, or a file of it that ``unclip bundle --for_study`` wrote.
        base_recipe: recipe of that run, followed where there is none yet.
        results: folder of what is kept, small enough to be committed: measurements, and the report on them. What is
            measured stays measured, also where the run is lost.
        claims: table of the claims that the report sets beside what was measured, such as configs/claims/binding.yaml;
            without it the paper's on priors.
        only: the one stage to run, by its name; what it needs has to be done already.
        dry_run: say what would run, and why; write nothing.
        jobs: stages that run side by side where none needs the other. Each computes with its share of the threads, and
            with all of them where nothing in the recipe can run beside it.
    """
    for config in filter(None, (compare, claims)):
        if not find(config).is_file():
            raise no_config(config)
    shown = source.replace("{run}", str(Path(run)))
    places = {"{run}": str(Path(run)), "{source}": shown if "://" in shown else str(Path(shown))}
    places |= {"{base}": str(Path(base)) if base else "", "{results}": results, "{precision}": precision()}
    shards = "" if source.startswith(("{run}", "{base}")) else _read_through(source, Path(run), not dry_run)
    recipe = Recipe(stages, places, base_recipe, shards)
    _check_source(stages, Path(places["{source}"]), Path(run))
    if dry_run:
        _show(recipe, recipe.plan(only), only)
        return
    with ExitStack() as locks:
        for folder in (run, results) if results else (run,):
            locks.enter_context(only_one(Path(folder)))
        if claims:  # before anything is measured: the report of a study that was cut needs them too
            write_text(Path(results or run) / CLAIMS, find(claims).read_text(encoding="utf-8"))
        Master(recipe, compare, upsamplers, jobs).run(recipe.plan(only))
        if not only:
            report(Path(results or run), Path(run) / "study" if results else None)
    total = sum(recipe.record(name).get("seconds", 0.0) for name in recipe.stages)
    _say(f"{only or 'all'} done, {total / 60:.1f} minutes for all stages so far: {results or run}")


class Master:
    """Runs stages, and notes what becomes of them. Of those that can run, measurements come first.

    Args:
        recipe: the stages.
        compare: config of the comparison, which describes the run.
        upsamplers: specs of the upsamplers that the run has beside it.
        jobs: stages that run side by side.
    """

    def __init__(
        self,
        recipe: Recipe,
        compare: str | None = None,
        upsamplers: list[dict[str, Any]] | None = None,
        jobs: int = 1,
    ) -> None:
        self.recipe = recipe
        self.compare = compare
        self.upsamplers = upsamplers or []
        self.jobs = jobs
        self.threads = int(os.environ.get("OMP_NUM_THREADS", "0").partition(",")[0] or 0) or torch.get_num_threads()
        self.running: dict[str, tuple[Process, dict[str, Any], float]] = {}

    def run(self, plan: Mapping[str, str]) -> None:
        """Run stages; after a failure the running ones end and no further one starts.

        Args:
            plan: the stages to run, and why.

        Raises:
            SystemExit: a stage failed or was interrupted; with its exit status.
        """
        for name in self.recipe.stages:
            if name not in plan:
                record = self.recipe.record(name)
                _say(self._title(name, f"done in {record['seconds']:.0f} s, skipped" if record else "skipped"), "dim")
        waiting, status = list(plan), 0
        while self.running or (waiting and not status):
            try:
                free = self.jobs - len(self.running) if not status else 0
                busy = {*waiting, *self.running}
                ready = [name for name in waiting if not busy.intersection(self.recipe.stages[name].needs)]
                # What is measured stays, also where the study is cut.
                for name in sorted(ready, key=lambda name: not self.recipe.kept(name))[:free]:
                    self._start(name, plan[name])
                    waiting.remove(name)
                time.sleep(PAUSE)
                codes = {name: process.poll() for name, (process, *_) in self.running.items()}
                ended = [self._end(name, code) for name, code in codes.items() if code is not None]
                status = next(filter(None, [status, *ended]), 0)
            except KeyboardInterrupt:
                status = status or 128 + signal.SIGINT
                self._send(signal.SIGINT)
            except SystemExit:  # what the command line makes of SIGTERM
                status = status or 128 + signal.SIGTERM
                self._send(signal.SIGTERM)
        if status:
            print("Run the same command again: it goes on where it stopped.", file=sys.stderr)
            raise SystemExit(status)

    def _start(self, name: str, reason: str) -> None:
        recipe, key, lock = self.recipe, self.recipe.key(name), self._lock(name)
        with alone(lock):  # the process of a killed `reproduce` may still be saving
            pass
        record, inputs = recipe.record(name), recipe.inputs(name)
        same = record.get("key") == key and (recipe.kept(name) or record["inputs"] == inputs)
        if not (same and not record["done"]):
            _set_aside(recipe.root, recipe.out(name))
            record = {"key": key, "stamp": secrets.token_hex(8), "seconds": 0.0, "commits": []}
        words = [*recipe.words(name), *_resume(recipe.out(name), recipe.words(name))]
        words += ["--jobs", str(self.jobs)] if words[0] == "reproduce" and self.jobs > 1 else []
        threads = self.threads if name in recipe.alone else max(1, self.threads // self.jobs)
        record |= {"command": recipe.stages[name].run, "out": recipe.stages[name].out, "inputs": inputs}
        record |= {"done": False, "threads": threads, "precision": recipe.places["{precision}"]}
        record["commits"] = list(dict.fromkeys([*record["commits"], commit()]))  # several, if it was resumed
        self._write(name, record)
        for copy, content in recipe.filled(name).values():
            write_text(copy, yaml.safe_dump(content, sort_keys=False))
        if self.compare and words[0] in ("test", "bundle"):
            from unclip_pl.generation.run import write_run  # imports for seconds, as does the report

            write_run(recipe.root, describe_run(self.compare, self.upsamplers))
        Console().rule(_number(recipe, name), align="left")
        _say(f"unclip {shlex.join(words)}  # {reason}")
        side = self.jobs > 1 and words[0] != "reproduce"
        label, variables = (f"[{name}] ", {"OMP_NUM_THREADS": str(threads)}) if side else ("", {})
        process = Process(words, recipe.notes(name) / f"{name}.log", lock, label, variables)
        self.running[name] = process, record, time.perf_counter()

    def _end(self, name: str, status: int) -> int:
        """Note how a stage ended; return its exit status."""
        _, record, started = self.running[name]
        record["seconds"] += time.perf_counter() - started
        record["ended"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        out = self.recipe.out(name)
        record["done"] = status == 0 and out.exists()
        if (profile := out / PROFILE).is_file():
            record["profile"] = json.loads(profile.read_bytes())
        self._write(name, record)
        del self.running[name]
        self._lock(name).unlink(missing_ok=True)
        if status:
            log = self.recipe.notes(name) / f"{name}.log"
            print(f"Stage {name!r} ended with status {status}; its output: {log}.", file=sys.stderr)
        elif not record["done"]:
            print(f"error: stage {name!r} did not write {out}: correct its `out:` in the recipe.", file=sys.stderr)
        else:
            _say(self._title(name, f"{record['seconds']:.0f} s"))
        return status or int(not record["done"])

    def _lock(self, name: str) -> Path:
        """Return the file that a stage's process locks. The run's folder exists: `only_one` has made it."""
        return self.recipe.root / STAGES / f".{name}.lock"

    def _send(self, number: int) -> None:
        for process, *_ in self.running.values():
            process.send(number)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        write_json(self.recipe.notes(name) / f"{name}.json", record, indent=2)

    def _title(self, name: str, text: str) -> str:
        return f"{_number(self.recipe, name)}: {text}"


def _check_source(stages: Mapping[str, Stage], source: Path, run: Path) -> None:
    """Keep a recipe that makes its own shards away from the user's.

    Raises:
        InputError: it would write them outside its run.
    """
    if any(stage.out == "{source}" for stage in stages.values()) and not source.resolve().is_relative_to(run.resolve()):
        raise InputError(
            f"This recipe makes its own shards. Expected --source inside {run}. Got {source}: leave --source out, or "
            "use a recipe that reads shards, such as configs/reproduce/emoji.yaml."
        )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a run's or a study's folder to this process.

    Raises:
        InputError: another process has it.
    """
    (folder / STAGES).mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(alone(folder / STAGES / ".lock", wait=False))
        except BlockingIOError:
            raise InputError(f"Another `unclip reproduce` works on {folder}. Wait until it ends, or stop it.") from None
        yield


def report(folder: Path, logs: Path | None) -> None:
    """Draw the report of a folder with cells, now that the last stage's own time is known.

    Args:
        folder: folder of a run or of a study's results.
        logs: folder for TensorBoard's events of a study's report; None for a run.
    """
    if not (folder / "cells").is_dir():
        return
    from unclip_pl.report import draw, log, summary

    content = draw(folder)
    summary(folder, content)
    if logs:
        log(folder, content, logs)


def describe_run(compare: str, upsamplers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ``run.json`` from the comparison's config: pictures and measurements come from the same priors.

    A cell's config does as well. It may name no judge and no priors.
    """
    model = read_yaml(find(compare))["model"]["init_args"]
    run = {name: model[name] for name in ("clip", "judge", "decoder", "priors") if name in model} | {"store": "store"}
    if upsamplers:
        run["decoder"]["init_args"]["upsamplers"] = upsamplers
    return run


def precision() -> str:
    """Return what ``{precision}`` stands for: mixed where this machine multiplies in bfloat16, else it is slower."""
    fast = fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16-mixed" if fast else "32-true"


def _show(recipe: Recipe, plan: Mapping[str, str], only: str) -> None:
    """Say what would run, and why; with ``only``, of nothing else."""
    for name in recipe.stages:
        if name in plan:
            _say(f"{_number(recipe, name)}: would run, since {plan[name]}: unclip {shlex.join(recipe.words(name))}")
        elif not only:
            done = not recipe.reason(name)
            _say(f"{_number(recipe, name)}: {'done' if done else 'not needed: what it was for is done'}", "dim")
    _say(f"{len(plan)} of {len(recipe.stages)} stages would run." if plan else "Nothing is to be done.")


def _number(recipe: Recipe, name: str) -> str:
    return f"[{list(recipe.stages).index(name) + 1}/{len(recipe.stages)}] {name}"


def _say(text: str, style: str = "") -> None:
    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _read_through(source: str, run: Path, note: bool) -> str:
    """Return a text that changes with what shards hold, or what a store does; not with when or where it was made."""
    if (Path(source) / MANIFEST).is_file():
        return digest([f"{record.shard} {record.sha256}" for record in read_manifest(Path(source)).values()])
    return _contents(list_shards(source), run, note)


def _contents(shards: list[Shard], run: Path, note: bool) -> str:
    """Return a text that changes with what shards hold, and not with their dates: a copy is the same.

    They are read through once, and again when touched.

    Args:
        shards: local or remote shards.
        run: folder of the run, where what was read is noted.
        note: whether to write the notes.
    """
    notes = run / SHARDS
    seen = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    local: dict[str, dict[str, Any]] = {}
    for shard in track([shard for shard in shards if not shard.remote], "Reading shards", transient=True):
        stat = shard.path.stat()
        now = {"size": stat.st_size, "changed_ns": stat.st_mtime_ns}
        known = seen.get(shard.name, {})
        same = {name: known.get(name) for name in now} == now
        local[shard.name] = now | {"sha256": known["sha256"] if same else sha256(shard.path)}
    if note:
        write_json(notes, local)
    marks = {shard.name: shard.stamp() if shard.remote else local[shard.name]["sha256"] for shard in shards}
    return digest([f"{name} {mark}" for name, mark in marks.items()])


def _set_aside(root: Path, out: Path) -> None:
    """Move what an earlier recipe made to ``replaced/`` of the run: nothing whole is deleted."""
    if out.exists():
        target = root / "replaced" / f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(out, target)


def _resume(out: Path, words: list[str]) -> list[str]:
    checkpoint = out / "checkpoints" / "last.ckpt"
    found = checkpoint.is_file() or previous_of(checkpoint).is_file()
    return ["--ckpt_path", str(checkpoint)] if words[0] == "fit" and found else []
