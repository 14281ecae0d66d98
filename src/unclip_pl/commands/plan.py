"""A recipe before it runs: its stages written out, what is known of each, and which of them have work to do."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import sha256
from unclip_pl.generation.provenance import STAGES, stage_records
from unclip_pl.settings import expanded, find, read_yaml

#: The stage that makes the run which a recipe builds on.
BASE = "base"


@dataclass
class Stage:
    """One command of a recipe.

    Args:
        run: the command line after ``unclip``. Words in braces stand for the recipe's folders and files: ``{run}``,
            ``{source}``, ``{base}``, ``{results}`` and ``{out}``; ``{precision}`` is the machine's. They may also stand
            in the configs that the command names.
        out: the folder or file that the stage writes.
        needs: names of the stages whose results it reads.
        matrix: values of further words in ``run``, ``out`` and ``needs``: the stage is done once for each combination,
            as ``stage-VALUE-…``.
    """

    run: str
    out: str
    needs: list[str] = field(default_factory=list)
    matrix: dict[str, list[str | int | float]] = field(default_factory=dict)


def combinations(name: str, stage: Stage) -> dict[str, dict[str, Any]]:
    """Return a stage's full names, one for each combination of its matrix, with the values of each."""
    rows = [dict(zip(stage.matrix, values, strict=True)) for values in product(*stage.matrix.values())]
    return {"-".join([name, *map(str, row.values())]): row for row in rows}


def write_out(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Make a stage of every combination of every matrix.

    A stage may need one combination of another stage by its full name. It may also need the other stage by its own
    name: then it needs those of its combinations that agree with the stage's own values.

    Returns:
        The stages by full name, in order. Their matrices hold one value of each word.

    Raises:
        InputError: a stage needs one that does not stand before it.
    """
    written: dict[str, Stage] = {}
    known: dict[str, dict[str, dict[str, Any]]] = {}  # name → full name → values
    for name, stage in stages.items():
        added: dict[str, Stage] = {}
        for full, own in combinations(name, stage).items():
            words = _places(own)
            wanted = [fill(need, words) for need in stage.needs]
            unknown = [need for need in wanted if need not in known and need not in written]
            if unknown:
                raise InputError(f"Stage {name!r} needs {unknown}. Expected stages before it: move it behind them.")
            needs = [n for need in wanted for n, theirs in known.get(need, {need: {}}).items() if _agree(own, theirs)]
            matrix = {key: [value] for key, value in own.items()}
            added[full] = Stage(fill(stage.run, words), fill(stage.out, words), needs, matrix)
        known[name] = combinations(name, stage)
        written |= added
    return written


def fill(node: Any, places: Mapping[str, str]) -> Any:
    """Return texts, or a tree of them, with the words of ``places`` replaced."""
    if isinstance(node, dict):
        return {key: fill(value, places) for key, value in node.items()}
    if isinstance(node, list):
        return [fill(value, places) for value in node]
    if isinstance(node, str):
        for word, place in places.items():
            node = node.replace(word, place)
    return node


def digest(content: Any) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Recipe:
    """Stages written out, and what is known of them on disk.

    Args:
        stages: the recipe's stages.
        places: what the words ``{run}``, ``{source}``, ``{base}``, ``{results}`` and ``{precision}`` stand for.
            ``{base}`` may be a folder, or a file that ``unclip bundle --for_study`` wrote.
        base_recipe: the recipe of the run at ``{base}``.
        shards: a text that changes with the content of the source's shards; empty where the recipe makes them.
    """

    def __init__(
        self, stages: dict[str, Stage], places: dict[str, str], base_recipe: str = "", shards: str = ""
    ) -> None:
        self.stages = write_out(stages)
        self.names = {name: list(combinations(name, stage)) for name, stage in stages.items()}
        self.places = places
        self.root = Path(places["{run}"])
        self.base_recipe = base_recipe
        self.shards = shards
        base = places.get("{base}", "")
        if base and BASE in stages:
            raise InputError(f"Expected no stage called {BASE!r} in a recipe that builds on a run: rename it.")
        self.bundled = Path(base).is_file()
        if base and self.bundled:
            self._add_base(f"unbundle {shlex.quote(base)} {{out}}", "{run}/base")
            self.places = places | {"{base}": f"{self.root}/base"}
        elif base:
            source = [] if shards == "" else ["--source", places["{source}"]]
            words = shlex.join(["reproduce", "--config", base_recipe or "RECIPE", "--run", base, *source])
            self._add_base(words, "{base}/run.json")

    def _add_base(self, run: str, out: str) -> None:
        self.stages = {BASE: Stage(run, out)} | {
            name: replace(stage, needs=[BASE, *stage.needs]) if "{base}" in self._text(name) else stage
            for name, stage in self.stages.items()
        }

    @cached_property
    def alone(self) -> set[str]:
        """Stages that nothing can run beside, since every other one comes before or after. No run's progress counts."""
        before: dict[str, set[str]] = {}
        for name, stage in self.stages.items():
            before[name] = set(stage.needs).union(*(before[need] for need in stage.needs))
        return {
            name
            for name in self.stages
            if all(other == name or other in before[name] or name in before[other] for other in self.stages)
        }

    def out(self, name: str) -> Path:
        """Return the folder or file that a stage writes."""
        return Path(expanded(fill(self.stages[name].out, self.places)))

    def kept(self, name: str) -> bool:
        """Return whether a stage's result is a measurement, which stays true when what it was made of is gone."""
        return self.stages[name].out.startswith("{results}/")

    def notes(self, name: str) -> Path:
        """Return the folder of a stage's record and log."""
        return Path(self.places["{results}"] if self.kept(name) else self.root) / STAGES

    def record(self, name: str) -> dict[str, Any]:
        """Return what was noted when the stage ran; empty where it never did."""
        path = self.notes(name) / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def configs(self, name: str) -> dict[str, Any]:
        """Return what the configs say that a stage names, by path; None for one that is not there yet.

        Comments and layout do not count. Values of the stage's matrix are filled in.
        """
        found: dict[str, Any] = {}
        for before, path in pairwise(shlex.split(self.stages[name].run)):
            if before == "--config" and name != BASE:
                file = find(expanded(fill(path, self.places)))
                found[path] = fill(read_yaml(file), self._own(name)) if file.is_file() else None
        return found

    def words(self, name: str) -> list[str]:
        """Return the command with its places filled in; a config that has places is the copy of :meth:`filled`."""
        copies = {path: str(copy) for path, (copy, _) in self.filled(name).items()}
        places = self._all(name)
        return [copies.get(word) or fill(word, places) for word in shlex.split(self.stages[name].run)]

    def filled(self, name: str) -> dict[str, tuple[Path, Any]]:
        """Return the path and content of a stage's own copy of each config that has places."""
        places, folder = self._all(name), self.root / STAGES
        new = {path: fill(content, places) for path, content in self.configs(name).items() if content is not None}
        return {
            path: (folder / f"{name}.{Path(path).stem}.yaml", content)
            for path, content in new.items()
            if content != read_yaml(find(expanded(fill(path, self.places))))
        }

    def key(self, name: str) -> str:
        """Return a text that changes when the recipe asks for something else.

        It is the same wherever the run lies, on every machine, and however often something was made again.
        """
        stage = self.stages[name]
        needs = [self.key(need) for need in stage.needs if need != BASE]
        content = [shlex.split(stage.run), list(self.configs(name).values()), needs]
        return digest(content)

    def inputs(self, name: str) -> dict[str, str]:
        """Return stamps of all that a stage reads. A result that was made again has another stamp."""
        stage, text = self.stages[name], self._text(name)
        stamps = {need: self.record(need).get("stamp", "") for need in stage.needs if need != BASE or self.bundled}
        if name == BASE and self.bundled:
            stamps["file"] = sha256(Path(shlex.split(stage.run)[1]))
        if "{source}" in text and self.shards:
            stamps["source"] = self.shards
        if BASE in stage.needs and not self.bundled:
            named = set(re.findall(r"\{base\}/?([^\s/\"']*)", text))
            for other, record in stage_records(Path(self.places["{base}"])).items():
                made = Path(record["out"]).name
                stamps |= {f"base/{other}": record["stamp"]} if named & {"", made} else {}
        return stamps

    def reason(self, name: str) -> str:
        """Return why a stage's result is not there as the recipe wants it; empty where it is."""
        out, record = self.out(name), self.record(name)
        if name == BASE and not self.bundled:
            return "" if out.exists() else f"there is no run at {out.parent}"
        missing = [path for path, content in self.configs(name).items() if content is None]
        if missing:
            return f"{missing[0]} is not written yet"
        if not record:
            return "it has not run yet"
        if record["key"] != self.key(name):
            same = record["command"] == self.stages[name].run
            return "a config, or a stage before it, has changed" if same else "its command has changed"
        if not record["done"]:
            return "it was interrupted"
        if not out.exists():
            return f"{out} is not there"
        now = {} if self.kept(name) else self.inputs(name)
        other = [input for input in now if now[input] != record["inputs"].get(input)]
        return f"what it reads has changed: {', '.join(other)}" if other else ""

    def plan(self, only: str = "") -> dict[str, str]:
        """Return the stages to run, in order, and why.

        What is not done is worth doing where it is a measurement, where nothing else needs it, or where a stage that
        runs needs it. So a lost training does not run again once it is measured.

        Args:
            only: the one stage to look at, by its name or a full name; empty for all.

        Raises:
            InputError: there is no such stage, or what it needs is not done.
            MissingFileError: there is no run to build on, and no recipe of it.
        """
        reasons = {name: self.reason(name) for name in self.stages}
        finished: set[str] = set()
        for name, stage in self.stages.items():
            late = [need for need in stage.needs if need not in finished]
            if not reasons[name] and late and not self.kept(name):
                reasons[name] = f"it needs {late[0]}"
            if not reasons[name]:
                finished.add(name)
        if only:
            return self._only(only, reasons, finished)
        wanted: set[str] = set()
        for name in reversed(self.stages):
            users = {user for user, stage in self.stages.items() if name in stage.needs}
            last = not users and name != BASE
            if name not in finished and (last or self.kept(name) or wanted & users):
                wanted.add(name)
        if BASE in wanted and not self.bundled:
            base = self.places["{base}"]
            if base.endswith(".zip"):
                raise MissingFileError(f"No bundle at {base}: run the recipe that writes it first.")
            if not self.base_recipe:
                raise MissingFileError(f"No run at {base}: make it first, or give --base_recipe.")
        return {name: reasons[name] for name in self.stages if name in wanted}

    def _only(self, only: str, reasons: dict[str, str], finished: set[str]) -> dict[str, str]:
        chosen = self.names.get(only) or [name for name in self.stages if name == only]
        if not chosen:
            raise InputError(f"Expected one of the stages {', '.join(self.names)}. Got {only!r}: name one of them.")
        late = {need for name in chosen for need in self.stages[name].needs} - finished - set(chosen)
        if late and any(reasons[name] for name in chosen):
            raise InputError(f"Stage {only!r} needs {', '.join(sorted(late))}, not done yet: run those stages first.")
        return {name: reasons[name] for name in chosen if reasons[name]}

    def _own(self, name: str) -> dict[str, str]:
        return _places({key: values[0] for key, values in self.stages[name].matrix.items()})

    def _all(self, name: str) -> dict[str, str]:
        return self._own(name) | {"{out}": str(self.out(name))} | self.places

    def _text(self, name: str) -> str:
        """Return all that a stage's command and configs say, a source inside the base spelt out."""
        text = f"{self.stages[name].run} {json.dumps(self.configs(name))}"
        source = self.places.get("{source}", "")
        return text.replace("{source}", source) if "{base}" in source else text


def _places(values: Mapping[str, Any]) -> dict[str, str]:
    return {f"{{{word}}}": str(value) for word, value in values.items()}


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(str(b[key]) == str(value) for key, value in a.items() if key in b)
