"""Checkpoints rebuild their part. They are data: they neither import code nor choose what is called."""

import re
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint
from unclip_pl.moved import moved_in
from unclip_pl.parts.base import Part, TrainingRecord

P = TypeVar("P", bound=Part)


def part_of(task: Any) -> type[Part] | None:
    """Return the part that a Task of this package trains, which draws without a trainer; None for any other Task.

    Args:
        task: class path that a checkpoint names: ``unclip_pl.tasks.XTask`` trains ``unclip_pl.parts.XPart``.
    """
    found = re.fullmatch(r"unclip_pl\.tasks\.(\w+)Task", task) if isinstance(task, str) else None
    part: type[Part] | None = getattr(import_module("unclip_pl.parts"), f"{found[1]}Part", None) if found else None
    return part


def _is_ours(part: type[Part]) -> bool:
    return part.__module__.startswith("unclip_pl.parts.")


def load_part(path: str | Path, expected: type[P]) -> P:
    """Rebuild a part from its checkpoint alone, with the averaged weights where EMA ran; in eval mode.

    Args:
        path: checkpoint written by ``unclip fit``, or such a file of a bundle.
        expected: class of the part that it must hold. A Task asks for the Task itself, which can train on.

    Raises:
        MissingFileError: the file does not exist.
        InputError: the checkpoint holds another part, was not written by ``unclip fit``, or is broken.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    hyper_parameters = checkpoint.get("hyper_parameters")
    if not isinstance(hyper_parameters, dict) or "_class_path" not in hyper_parameters:
        raise InputError(f"Expected a checkpoint written by `unclip fit`. {path} names no Task: give another file.")
    task = hyper_parameters["_class_path"]
    try:
        alone = part_of(task) if _is_ours(expected) else None
        cls = alone or trusted_class(task)
        check_classes(config := _without_files(hyper_parameters))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if not issubclass(cls, expected):
        raise InputError(f"{path} holds a {cls.__name__}. Expected a {expected.__name__}: give another file.")
    try:
        rebuilt: P = _rebuild(cls, config)
        rebuilt.load_state_dict(checkpoint["state_dict"])
        rebuilt.on_load_checkpoint(checkpoint)
        samples, seconds = checkpoint.get("train_samples", 0), checkpoint.get("train_seconds", 0.0)
        rebuilt.record = TrainingRecord(checkpoint["global_step"], samples, seconds)
        rebuilt.checkpoint = Path(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} does not fit its {cls.__name__} ({type(error).__name__}: {reason:.300}). Give a whole "
            "checkpoint of this version."
        ) from error
    return rebuilt.eval()


#: Constructor arguments that name files: a checkpoint carries what they held.
_FILES = ("statistics", "codec")
#: What jsonargparse would take for the import path of a class.
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def trusted_class(path: Any) -> type:
    """Return the class that a checkpoint names, if it is ours, or derives from ours and is already imported.

    A config names what its user wants to run. A checkpoint is data, perhaps a stranger's: it may neither import a
    module nor choose what is called.

    Raises:
        InputError: the name is of anything else.
    """
    module, _, name = str(path).rpartition(".")
    if module.split(".")[0] == "unclip_pl":
        try:
            owner: Any = import_module(module)
        except ImportError:
            owner = None
    else:
        owner = sys.modules.get(module)
    cls = getattr(owner, name, None)
    if not isinstance(cls, type) or not any(base.__module__.split(".")[0] == "unclip_pl" for base in cls.__mro__):
        raise InputError(
            moved_in(str(path))
            or f"the checkpoint names {path!r:.200}. Expected a class of unclip_pl, or one that derives from such a "
            "class and is imported. Import your own module before you load its checkpoint."
        )
    return cls


def check_classes(node: Any) -> None:
    """Refuse settings with a text that could be taken for the import path of anything but a trusted class.

    jsonargparse reads texts as YAML: one that would become a structure could hide a path, and is refused too.

    Raises:
        InputError: there is such a text.
    """
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, list | tuple):
        for value in node:
            check_classes(value)
    if not isinstance(node, str):
        return
    try:
        read = yaml.safe_load(node)
    except yaml.YAMLError:
        read = node
    if isinstance(read, dict | list):
        raise InputError(
            f"the checkpoint holds {node!r:.200} among its settings. Expected plain values: give another file."
        )
    if isinstance(read, str) and _IMPORT_PATH.fullmatch(read):
        trusted_class(read)


def _without_files(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in hyper_parameters.items() if not str(key).startswith("_")}
    return config | {key: "" for key in _FILES if key in config}


def _rebuild(cls: type[Part], config: dict[str, Any]) -> Any:
    if _is_ours(cls):  # it has no place for what only its training needs
        config = {key: config[key] for key in signature(cls).parameters if key in config}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "part", fail_untyped=False)
    return parser.instantiate(parser.parse_object({"part": config})).part
