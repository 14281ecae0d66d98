"""Write the reference of the documentation site, all of it read off the package: ``conf.py`` calls it at each build.

``configs.md`` has every class that a config can name, with its keys and defaults; ``commands.md`` the commands with
their options; ``python.md`` and the pages below it the docstrings.
"""

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

import unclip_pl
from unclip_pl import cli
from unclip_pl.commands.configs import header
from unclip_pl.data.datamodule import ResumableDataModule, StoreDataModule
from unclip_pl.evaluation.callbacks import ValidationScores
from unclip_pl.settings import shipped_configs
from unclip_pl.tasks import EmbeddingTask, Task
from unclip_pl.training.cli import LINKS

#: Parts of the package that are no interface: what a command does, and names of other people's.
INSIDE = re.compile(r"unclip_pl\.(__main__|cli|moved|commands.*|training\.private)$")
#: What a config names at its top level: its key, and the base of the classes that may stand there.
TOP = {
    "model": (LightningModule,),
    "data": (LightningDataModule,),
    "trainer.callbacks, .strategy": (Callback, Strategy),
}
#: Classes at its top level that others derive from and that do nothing alone.
BASES = (Task, EmbeddingTask, ResumableDataModule, StoreDataModule, ValidationScores)
#: Keys of a Task and of its network that the data determine.
LINKED = {target.rpartition(".")[2] for _, target in LINKS}


def modules() -> list[Any]:
    """Import every module of the package that is an interface."""
    names = [info.name for info in pkgutil.walk_packages(unclip_pl.__path__, "unclip_pl.")]
    return [importlib.import_module(name) for name in sorted(names) if not INSIDE.match(name)]


def classes() -> list[type]:
    """Return every public class of these modules."""
    return [
        kind
        for module in modules()
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
    ]


def parameters(entry: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, Any, str]]:
    """Yield the parameters of a class or function, what ``**kwargs`` passes on among them, with type and meaning."""
    function: Any = entry.__init__ if inspect.isclass(entry) else entry  # type: ignore[misc]
    types = typing.get_type_hints(function)
    owner = next(one for one in entry.__mro__ if "__init__" in vars(one)) if inspect.isclass(entry) else entry
    said = {arg.arg_name: arg.description or "" for arg in parse(inspect.getdoc(owner) or "").params}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield from parameters(parent) if (parent := heir(entry)) else ()
        elif parameter.name != "self" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            yield parameter, types.get(parameter.name, Any), said.get(parameter.name, "")


def heir(kind: Any) -> type | None:
    """Return the class that a constructor's ``**kwargs`` go to; None if torch or Python has it."""
    owner = next(i for i, one in enumerate(kind.__mro__) if "__init__" in vars(one))
    above = (one for one in kind.__mro__[owner + 1 :] if "__init__" in vars(one))
    return next((one for one in above if one.__module__.startswith(("unclip_pl.", "lightning."))), None)


def named(annotation: Any) -> Iterator[type]:
    """Yield the classes of the package in an annotation."""
    if inspect.isclass(annotation) and annotation.__module__.startswith("unclip_pl."):
        yield annotation
    for part in typing.get_args(annotation):
        yield from named(part)


def configurable(bases: tuple[type, ...], known: list[type]) -> list[type]:
    """Return the classes that may stand at a key of the top level."""
    return [kind for kind in known if issubclass(kind, bases) and kind not in BASES and not inspect.isabstract(kind)]


def inner(found: list[type], known: list[type]) -> dict[type, list[type]]:
    """Return the classes that arguments of other classes ask for, each with the classes that may stand there."""
    asked: dict[type, list[type]] = {}
    waiting = list(found)
    while waiting:
        for _, annotation, _ in parameters(waiting.pop(0)):
            for base in named(annotation):
                if base not in asked and base not in found:
                    kinds = [kind for kind in known if issubclass(kind, base) and not inspect.isabstract(kind)]
                    asked[base] = kinds
                    waiting += kinds
    return asked


def plain(text: str) -> str:
    """Return a docstring's text as one line of Markdown for a cell of a table."""
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_<\[|$])", r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [piece.replace("|", r"\|") for piece in pieces[1::2]]
    return "`".join(pieces)


def kind_of(annotation: Any, shown: dict[str, type]) -> str:
    """Return a type as Markdown; a class that has a table of its own is a link to it."""
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    text = re.sub(r"(?:[a-z_]\w*\.)+(?=[A-Z]\w*)", "", text).replace("NoneType", "None")
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text)
    names = "|".join(shown) or "$^"
    pieces = re.split(rf"\b({names})\b", text.replace("|", r"\|"))
    return "".join(
        f"[`{piece}`](#key-{piece.lower()})" if piece in shown else f"`{piece.strip()}`" if piece.strip() else ""
        for piece in pieces
    )


def linked(entry: Any, name: str) -> bool:
    """Return whether the data determine a key: one of a Task, or of a network that a Task trains."""
    trained = {
        kind for task in classes() if issubclass(task, Task) for kind in [typing.get_type_hints(task).get("net")]
    }
    owner = inspect.isclass(entry) and issubclass(entry, (Task, *filter(inspect.isclass, trained)))
    return owner and name in LINKED


def value(parameter: inspect.Parameter, entry: Any = None) -> str:
    """Return a default as YAML would have it."""
    default = parameter.default
    if linked(entry, parameter.name):
        return "from the data"
    if default is inspect.Parameter.empty:
        return "required"
    words = {None: "null", True: "true", False: "false", "": "''"}
    text = words[default] if isinstance(default, bool | str | None) and default in words else repr(default)
    return f"`{text}`".replace("|", r"\|")


def table(entry: Callable[..., Any], shown: dict[str, type], prefix: str = "") -> list[str]:
    """Return the table of a class's or function's keys."""
    rows = [
        f"| `{prefix}{parameter.name}` | {kind_of(annotation, shown)} | {value(parameter, entry)} | {plain(meaning)} |"
        for parameter, annotation, meaning in parameters(entry)
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else ["It has no keys.", ""]


def section(kind: type, shown: dict[str, type], level: str = "###") -> list[str]:
    """Return the section of a class: its path, its first sentence, its keys."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    summary = plain((inspect.getdoc(kind) or "").split("\n\n")[0])
    return [f"(key-{kind.__name__.lower()})=", f"{level} {kind.__name__}", "", f"{{py:class}}`{path}`", "", summary, "",
            *table(kind, shown)]  # fmt: skip


def configs() -> str:
    """Return the page of every key that a config can have."""
    known = classes()
    top = {key: configurable(bases, known) for key, bases in TOP.items()}
    top["model"].sort(key=lambda kind: not issubclass(kind, Task))  # what is trained, then what is measured
    below = inner([kind for kinds in top.values() for kind in kinds], known)
    shown = {kind.__name__: kind for kinds in [*top.values(), *below.values()] for kind in kinds}
    bases = {base.__name__: base for base in below} | shown
    lines = [
        "# Configs: every key", "",
        "A config names a class under `class_path` and its arguments under `init_args`. This page is made from the",
        "signatures and docstrings of the package. \"From the data\" marks what no config may write.", "",
    ]  # fmt: skip
    for key, kinds in top.items():
        lines += [f"## `{key}`", ""] + [line for kind in kinds for line in section(kind, bases)]
    done = {kind for kinds in top.values() for kind in kinds}
    for base, kinds in below.items():
        fresh = [kind for kind in kinds if kind not in done]
        done.update(fresh)
        if kinds == [base]:
            lines += [line for kind in fresh for line in section(kind, bases, "##")]
        elif fresh or base not in done:
            summary = plain((inspect.getdoc(base) or "").split("\n\n")[0])
            anchor = [] if base in done else [f"(key-{base.__name__.lower()})="]
            lines += [*anchor, f"## Kinds of {base.__name__}", "", summary, ""]
            lines += [line for kind in fresh for line in section(kind, bases)]
    lines += [
        "## `trainer`", "",
        "These are the keys of Lightning's Trainer, explained in its own documentation; `unclip` sets",
        "`use_distributed_sampler` to `false`, and `seed_everything` is 0.", "",
        "| key | type | default |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| `{p.name}` | {kind_of(a, {})} | {value(p)} |" for p, a, _ in parameters(Trainer)]
    lines += ["", "## Configs in the package", "", "`unclip configs` lists them.", "", "| config | |", "|---|---|"]
    lines += [f"| `{name}` | {plain(header(path))} |" for name, path in shipped_configs().items()]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Return the page of the commands, by what a person wants to do."""
    lines = ["# Commands", "", "`unclip COMMAND --help` says the same. `--debug` shows tracebacks.", ""]
    for title, words in cli.GROUPS.items():
        lines += [f"## To {title}", ""]
        for word, what in words.items():
            what = re.sub(r"((?:unclip|--config) .*)$", r"`\1`", what[0].upper() + what[1:])
            lines += [f"### unclip {word}", "", plain(what), ""]
            if word in cli.TRAINER:
                lines += [
                    "The options are the keys of configs ([every key](configs.md)), such as `--model.init_args.…` and",
                    f"`--trainer.max_steps`, and those of `Trainer.{word}`, such as `--ckpt_path`.", "",
                ]  # fmt: skip
                continue
            entry = cli.function_of(word)
            for part, function in (entry if isinstance(entry, dict) else {"": entry}).items():
                lines += [f"#### unclip {word} {part}", ""] if part else []
                lines += [plain((inspect.getdoc(function) or "").split("\n\nArgs:")[0]), "", *options(function)]
    return "\n".join(lines) + "\n"


def options(function: Callable[..., Any]) -> list[str]:
    """Return the tables of a command's options; those that it shares with others first."""
    rows = []
    for parameter, annotation, meaning in parameters(function):
        if parameter.name == cli.SHARED and is_dataclass(annotation):
            shared = [
                (p, a, m) for kind in reversed(annotation.__mro__) if is_dataclass(kind) for p, a, m in parameters(kind)
            ]
            rows += list({p.name: (p, a, m) for p, a, m in shared if m}.values())
        else:
            rows.append((parameter, annotation, meaning))
    written = [
        f"| `{'' if p.name in cli.POSITIONAL else '--'}{p.name}` | {kind_of(a, {})} | {value(p)} | {plain(m)} |"
        for p, a, m in rows
    ]
    return ["| option | type | default | meaning |", "|---|---|---|---|", *written, ""] if written else []


def python() -> dict[str, str]:
    """Return the pages of the docstrings, one for each folder of the package and one for its single files."""
    groups: dict[str, list[str]] = {}
    for module in modules():
        parts = module.__name__.split(".")
        package = len(parts) > 2 or hasattr(module, "__path__")
        groups.setdefault(parts[1] if package else "ground", []).append(module.__name__)
    pages = {}
    for name, members in groups.items():
        lines = [f"# `unclip_pl.{name}`" if name != "ground" else "# `unclip_pl`: files, settings, streams, types", ""]
        for member in members:
            title = [] if member == f"unclip_pl.{name}" else [f"## `{member.removeprefix('unclip_pl.')}`", ""]
            lines += [*title, "```{eval-rst}", f".. automodule:: {member}", "```", ""]
        pages[f"python-{name}.md"] = "\n".join(lines)
    listed = "\n".join(name.removesuffix(".md") for name in pages)
    pages["python.md"] = f"# Python\n\nThe modules of the package, layer by layer.\n\n```{{toctree}}\n{listed}\n```\n"
    return pages


def write(folder: Path) -> None:
    """Write the pages that have changed into a folder: Sphinx reads again what is newer."""
    folder.mkdir(exist_ok=True)
    for name, text in ({"configs.md": configs(), "commands.md": commands()} | python()).items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
