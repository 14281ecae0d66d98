"""One parser, one door: LightningCLI for the Tasks, plain functions for the rest."""

import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from unclip_pl.errors import InputError, MissingFileError

#: Errors that a user can mend: one line. Anything else is ours, and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, KeyError, yaml.YAMLError)
#: The same, of a class whose import would take seconds.
EXPECTED_NAMES = ("MisconfigurationException",)

#: What linked arguments are made of: never written in a config.
LINKS = (
    ("data.embed_dim", "model.init_args.net.init_args.embed_dim"),
    ("data.text_width", "model.init_args.net.init_args.text_width"),
    ("data.context_length", "model.init_args.net.init_args.context_length"),
    ("data.statistics", "model.init_args.statistics"),
    ("data.clip_name", "model.init_args.name"),
)

#: Parameters of commands that stand before the options, and their help.
POSITIONAL = {"captions": "texts to draw", "paths": "files or folders to read", "pictures": "image files"}

NOISE = (
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is written in place in training
    ".*does not have many workers.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ".*is an instance of `nn.Module` and is already saved during checkpointing.*",  # wanted: rebuilt from the config
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*WeightAveraging callback, but .* outside the 'fit' stage.*",
    ".*GPU available but not used.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*args parameter is intended to run from within Python.*",
    ".*could be decompression bomb.*",  # refused by our own limit, which is lower
)


def run(words: list[str], *, debug: bool = False) -> int:
    """Run a command line; see :func:`unclip_pl.__main__.main` for the exit status."""
    before = _on_sigterm(_terminate)
    try:
        return _run(words, debug)
    finally:
        _on_sigterm(before)


class Terminated(SystemExit):
    """SIGTERM: whatever is being written is tidied up on the way out."""


def _terminate(*_: Any) -> None:
    raise Terminated


def _on_sigterm(handler: Any) -> Any:
    """Sets the handler where that is possible; returns the one before."""
    in_main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if in_main else handler


def _run(words: list[str], debug: bool) -> int:
    from unclip_pl.__main__ import TRAINER

    again = "" if words[0] in TRAINER else ": the same command goes on where it stopped"
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        dispatch(words)
    except SystemExit as stop:  # jsonargparse has printed what was wrong, or the help
        if isinstance(stop, Terminated) or type(stop).__name__ == "SIGTERMException":  # Lightning's
            print(f"terminated{again}.", file=sys.stderr)
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print(f"interrupted{again}.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if debug or not (isinstance(error, EXPECTED) or type(error).__name__ in EXPECTED_NAMES):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnicodeDecodeError):  # does not know its file
            said = f"Expected configs, tables and captions in UTF-8. Got a file that is none: {said}."
        print(f"error: {said}", file=sys.stderr)
        return 1
    return 0


def dispatch(words: list[str]) -> None:
    """Parse and run one command; errors pass through."""
    from unclip_pl.__main__ import COMMANDS

    command, rest = words[0], words[1:]
    if command in COMMANDS:
        module = importlib.import_module(f"unclip_pl.commands.{command}")
        call(f"unclip {command}", getattr(module, "COMMANDS", None) or getattr(module, command), rest)
    else:
        train(words)


def call(program: str, entry: Callable[..., Any] | dict[str, Callable[..., Any]], words: list[str]) -> Any:
    """Call a plain function with a command line; its signature is the interface, its docstring the help.

    Args:
        program: as the help shows it.
        entry: the function, or several by name. Its ``captions`` or ``paths`` are what stands before the options.
        words: the rest of the command line.
    """
    if isinstance(entry, dict):
        if not words or words[0] not in entry:
            names = ", ".join(entry)
            if words and words[0] in ("-h", "--help"):
                print(f"usage: {program} {{{names}}} [OPTIONS]   ({program} {next(iter(entry))} --help for more)")
                return None
            raise InputError(
                f"Expected `{program}` followed by one of {names}. Got {words[0] if words else 'nothing'}."
            )
        return call(f"{program} {words[0]}", entry[words[0]], words[1:])
    parser = ArgumentParser(prog=program, description=(entry.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    positional = POSITIONAL.keys() & entry.__annotations__.keys()
    for name in positional:
        parser.add_argument(name, nargs="*", type=str, help=POSITIONAL[name])
    parser.add_function_arguments(entry, skip=set(positional), sub_configs=True)
    options = parser.instantiate_classes(parser.parse_args(_spelt_out(words, entry)))
    options.pop("config", None)
    return entry(**vars(options))


def _spelt_out(words: list[str], entry: Callable[..., Any]) -> list[str]:
    """``--verify`` means ``--verify=true``."""
    flags = {f"--{name}" for name, kind in entry.__annotations__.items() if kind is bool}
    alone = [word.startswith("--") for word in [*words[1:], "--"]]
    return [f"{word}=true" if word in flags and last else word for word, last in zip(words, alone, strict=False)]


def train(words: list[str]) -> Any:
    """``fit``, ``validate``, ``test`` or ``predict`` by LightningCLI."""
    from lightning import LightningDataModule, LightningModule

    from unclip_pl.training.cli import UnclipCLI

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    missing = [
        words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config" and not Path(words[i + 1]).is_file()
    ]
    if missing:
        raise MissingFileError(f"No config at {missing[0]}: expected a YAML file, such as those under configs/.")
    return UnclipCLI(LightningModule, LightningDataModule, args=words)
