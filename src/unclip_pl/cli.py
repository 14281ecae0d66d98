"""The command line: the first word picks what is imported, so that ``unclip --help`` answers in a second.

``fit``, ``validate``, ``test`` and ``predict`` go to LightningCLI. Every other word names a module of
:mod:`unclip_pl.commands`, whose function is called with the options as its arguments.
"""

import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ArgumentParser

from unclip_pl.errors import InputError
from unclip_pl.imports import kept
from unclip_pl.moved import moved_in
from unclip_pl.settings import STAGE_LOCK, expanded, find, no_config, parse_yaml, read_yaml

#: Every command by what a person wants to do, with a line about it.
GROUPS = {
    "draw pictures": {
        "sample": 'draw images: unclip sample "a large red star" --run runs/quickstart',
        "vary": "draw variations of pictures: unclip vary PICTURE…",
        "interpolate": "draw what lies between two pictures or captions: unclip interpolate PICTURE PICTURE",
        "edit": 'apply a text diff: unclip edit PICTURE… --current "a red circle" --caption "a blue circle"',
        "inpaint": 'draw a part of a picture again: unclip inpaint PICTURE --mask MASK --caption "a blue circle"',
        "reconstruct": "invert pictures and draw them again: unclip reconstruct PICTURE…",
        "probe": "draw from more and more dimensions of an embedding: unclip probe PICTURE…",
        "play": "draw, edit and look inside on a page in the browser: unclip play",
    },
    "train everything at once": {
        "reproduce": "run the stages of a recipe that are not done: --config configs/reproduce/*.yaml",
        "configs": "list the configs of the package, or copy them to be edited: unclip configs copy FOLDER NAME…",
    },
    "prepare data": {
        "pack": "make image-caption shards: shapes, folder, coco or emoji",
        "precompute": "encode shards with a frozen CLIP into an embedding store",
    },
    "train one part": {
        "fit": "train a part: --config configs/{clip,prior,ar_prior,decoder,upsampler}/*.yaml",
        "validate": "measure a part's loss on the validation split",
        "codec": "fit the AR prior's codec (PCA and buckets) on a store",
        "linear": "fit the linear prior (ridge regression) on a store",
    },
    "measure and compare": {
        "test": "score a model or compare the priors: --config configs/{evaluate,compare}/*.yaml",
        "predict": "write embeddings (priors) or images (decoder, upsampler)",
        "runs": "show trainings and measurements in a table: unclip runs [FOLDER…] --sort val/loss",
        "report": "draw a run's or a study's report again from what was measured",
    },
    "bring in and hand on": {
        "import": "use somebody else's checkpoints or embeddings: unclip import {karlo,embeddings} PATH…",
        "bundle": "pack a run into one file, in half precision: unclip bundle RUN",
        "unbundle": "make a run of a bundle: unclip unbundle FILE RUN",
        "export": "write a run for other tools: unclip export diffusers RUN FOLDER",
    },
}
#: Commands that LightningCLI runs, and those that are plain functions.
COMMANDS = {word: what for group in GROUPS.values() for word, what in group.items()}
TRAINER = {word: COMMANDS.pop(word) for word in ("fit", "validate", "test", "predict")}
#: Commands that, interrupted and given again, go on where they stopped.
RESUMABLE = ("import", "pack", "precompute", "reproduce")

#: Mistakes that a user can mend: they become one line. Every other error shows its traceback.
EXPECTED = (InputError, OSError, UnicodeDecodeError, yaml.YAMLError)
#: Name of Lightning's own class for such mistakes, whose import would take seconds.
EXPECTED_NAME = "MisconfigurationException"
#: Option that prints a shell's completion.
COMPLETION = "--print_completion"
#: What every one-line error ends with.
DEBUG_HINT = "(--debug shows the traceback)"

#: Parameters of commands that stand before the options. Their help is in the command's docstring.
POSITIONAL = ("captions", "paths", "pictures", "ends", "names")

#: Options whose files are also found under ``./configs`` and in the package.
SECTIONS = ("--config", "--model", "--data", "--trainer")

#: Parameter of commands whose type is a dataclass: its fields are options like all others.
SHARED = "options"

#: Warnings of Lightning, torch and Pillow that tell our users nothing.
NOISE = (
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is written in place in training
    ".*does not have many workers.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ".*is an instance of `nn.Module` and is already saved during checkpointing.*",  # wanted: rebuilt from the config
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # a run may go on in another folder
    ".*GPU available but not used.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*args parameter is intended to run from within Python.*",
    ".*you need to define a `flops_per_batch` attribute.*",  # throughput is counted in samples
    ".*could be decompression bomb.*",  # our own limit is lower, and refuses
    "(?s).*deprecated in v4.*",  # Lightning 2.6 calls jsonargparse by older names
    "(?s).*JsonargparseDeprecationWarning.*",
)


class Terminated(SystemExit):
    """SIGTERM arrived, or the terminal was closed. An error, so that files being written are tidied up on the way."""


class Parser(ArgumentParser):
    """A parser whose errors leave out the list of all options, and name the new path of a class that moved."""

    #: Whether errors show their traceback.
    debug: ClassVar[bool] = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if self.exit_on_error and Parser.debug:
            raise ArgumentError(None, message) from ex
        if self.exit_on_error:
            program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
            said = moved_in(message) or f"{message}\n({program} --help lists the options)"
            print(f"error: {said} {DEBUG_HINT}", file=sys.stderr)
            self.exit(2)
        super().error(message, ex)


def usage() -> str:
    """Return the text of ``unclip --help``."""
    lines = ["usage: unclip COMMAND [ARGUMENTS]   (unclip COMMAND --help for more; --debug shows tracebacks)", ""]
    for title, words in GROUPS.items():
        lines += [f"{title}:", *(f"  {word:<11} {what}" for word, what in words.items()), ""]
    return "\n".join(
        [*lines, f"unclip {COMPLETION} bash (or zsh, …) prints a script that completes commands and options."]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: words after the program's name; None reads ``sys.argv``.

    Returns:
        The exit status: 0 for success, 1 for an error of the run, 2 for words that cannot be parsed, 128 plus the
        signal's number for Ctrl-C and SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if lock := os.environ.pop(STAGE_LOCK, ""):  # `unclip reproduce` has started this process
        importlib.import_module("unclip_pl.commands.launch").belong(lock)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(importlib.import_module("importlib.metadata").version("unclip_pl"))
        return 0
    if words[0] not in TRAINER | COMMANDS | {COMPLETION: ""}:
        print(f"error: unknown command {words[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    return run(words, debug=debug)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Answer SIGTERM, and a terminal that is closed, by an exception. Only the main thread may set handlers."""
    own: dict[int, Any] = {signal.SIGTERM: _terminate}
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:  # `nohup` has it ignored
        own[hang_up] = partial(_hang_up, [fd for fd in (1, 2) if os.isatty(fd)])
    if threading.current_thread() is not threading.main_thread():
        own = {}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(*_: Any) -> None:
    raise Terminated


def _hang_up(terminals: list[int], *_: Any) -> None:
    """Go on as after SIGTERM. What is printed to a terminal that has gone would be an error before all is saved."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    signal.raise_signal(signal.SIGTERM)


@_stoppable()
def run(words: list[str], *, debug: bool = False) -> int:
    """Run a command whose name is known; see :func:`main` for the exit status."""
    again = ": the same command goes on where it stopped" if words[0] in RESUMABLE else ""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    Parser.debug = debug
    try:
        dispatch(_checked(words))
    except SystemExit as stop:  # the parser has printed what was wrong, or the help
        if isinstance(stop, Terminated) or type(stop).__name__ == "SIGTERMException":  # Lightning's
            print(f"terminated{again}.", file=sys.stderr)
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print(f"interrupted{again}.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `unclip configs | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if debug or not (isinstance(error, EXPECTED) or type(error).__name__ == EXPECTED_NAME):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnicodeDecodeError):  # it does not know its file
            said = f"Expected configs, tables and captions in UTF-8. Got another encoding: {said}."
        print(f"error: {said} {DEBUG_HINT}", file=sys.stderr)
        return 1
    return 0


def _checked(words: list[str]) -> list[str]:
    """Return a command line with ``~`` replaced, and its configs by their paths: they may be named as in the package.

    The configs are read, to find keys that occur twice.

    Raises:
        MissingFileError: a config does not exist.
        InputError: a key occurs twice.
        yaml.YAMLError: a config is no YAML.
    """
    words = expanded(words)
    for place, (before, word) in enumerate(pairwise(["", *words])):
        option, sign, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if value.startswith(("{", "[")):
            with suppress(yaml.YAMLError):  # a text may begin so
                parse_yaml(value, option)
        elif Path(value).suffix in (".yaml", ".yml") or (option == "--config" and value):
            file = find(value) if option in SECTIONS else Path(value)
            if file.is_file():
                read_yaml(file)
                words[place] = f"{option}{sign}{file}" if sign else str(file)
            elif option in SECTIONS:
                raise no_config(value)
    return words


def dispatch(words: list[str]) -> None:
    """Parse and run one command. Errors pass through."""
    command, rest = words[0], words[1:]
    if command == COMPLETION:
        print(completion(rest[0] if rest else ""))
    elif command in COMMANDS:
        call(f"unclip {command}", function_of(command), rest)
    else:
        train(words)


def function_of(command: str) -> Any:
    """Return a command's function, or its functions by the word that picks one."""
    with kept():
        module = importlib.import_module(f"unclip_pl.commands.{command}")
    return getattr(module, "COMMANDS", None) or getattr(module, command)


def completion(shell: str) -> str:
    """Return the script by which a shell completes commands and options; of LightningCLI's, ``--config`` alone.

    Raises:
        InputError: another shell, or shtab is not installed.
    """
    try:
        from shtab import SUPPORTED_SHELLS
    except ImportError as error:
        raise InputError(
            "Expected shtab, which writes completions. Got no such package: install it by `pip install shtab`."
        ) from error
    if shell not in SUPPORTED_SHELLS:
        raise InputError(
            f"Expected {COMPLETION} {'|'.join(SUPPORTED_SHELLS)}. Got {shell!r}: name one of these shells."
        )
    program = Parser(prog="unclip")
    commands = program.add_subcommands()
    for word, what in (TRAINER | COMMANDS).items():
        entry = function_of(word) if word in COMMANDS else {}
        entries: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {"": entry}
        own = entries.pop("", None)
        part = _parser(f"unclip {word}", own) if own else Parser(prog=f"unclip {word}")
        if word in TRAINER:
            part.add_argument("--config", action="config")
        commands.add_subcommand(word, part, help=what)
        if entries:
            inner = part.add_subcommands(required=False, dest="part")
            for name, function in entries.items():
                inner.add_subcommand(name, _parser(f"unclip {word} {name}", function))
    return program.get_completion_script(f"shtab-{shell}")


def call(program: str, entry: Callable[..., Any] | dict[str, Callable[..., Any]], words: list[str]) -> Any:
    """Call a plain function with a command line. Its signature is the interface, its docstring the help.

    Args:
        program: name of the program in the help.
        entry: the function, or several by the word that picks one, the one without a word as "". A parameter of
            :data:`POSITIONAL` takes the words that stand before the options.
        words: the rest of the command line.

    Raises:
        InputError: the word that picks one of several functions is missing or unknown.
    """
    if isinstance(entry, dict):
        if "" in entry and (not words or words[0].startswith("--")) and words != ["--help"]:
            return call(program, entry[""], words)
        if not words or words[0] not in entry:
            names = ", ".join(filter(None, entry))
            if words and words[0] in ("-h", "--help"):
                print(f"usage: {program} {{{names}}} [OPTIONS]   ({program} {names.split(',')[0]} --help for more)")
                return None
            raise InputError(
                f"Expected `{program}` followed by one of {names}. Got {words[0] if words else 'nothing'}. Add one."
            )
        return call(f"{program} {words[0]}", entry[words[0]], words[1:])
    parser, shared = _parser(program, entry), entry.__annotations__.get(SHARED)
    given = vars(parser.instantiate(expanded(parser.parse_args(_spelt_out(words, entry)))))
    given.pop("config", None)
    if shared is not None:
        given[SHARED] = shared(**{field.name: given.pop(field.name) for field in fields(shared)})
    return entry(**given)


def _parser(program: str, entry: Callable[..., Any]) -> Parser:
    """Return the parser of a function's signature."""
    from docstring_parser import parse

    parser = Parser(prog=program, description=(entry.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    said = {each.arg_name: each.description for each in parse(entry.__doc__ or "").params}
    positional = [name for name in POSITIONAL if name in entry.__annotations__]
    for name in positional:
        parser.add_argument(name, nargs="*", type=str, default=[], help=said.get(name))
    shared = entry.__annotations__.get(SHARED)
    if shared is not None:
        parser.add_class_arguments(shared)
    parser.add_function_arguments(
        entry, skip={*positional, SHARED} if shared else set(positional), as_group=False, sub_configs=True
    )
    return parser


def _spelt_out(words: list[str], entry: Callable[..., Any]) -> list[str]:
    """Turn a flag without a value, such as ``--verify``, into ``--verify=true``; leave out ``--from`` before paths."""
    flags = {f"--{name}" for name, kind in entry.__annotations__.items() if kind is bool}
    silent = {"--from"} if "paths" in entry.__annotations__ else set()
    alone = [word.lower() not in ("true", "false", "yes", "no") for word in [*words[1:], "--"]]
    pairs = zip(words, alone, strict=False)
    return [f"{word}=true" if word in flags and last else word for word, last in pairs if word not in silent]


def train(words: list[str]) -> Any:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with LightningCLI; draw a comparison's report afterwards."""
    with kept():
        from lightning import LightningDataModule, LightningModule
        from lightning.pytorch.cli import LightningArgumentParser

        from unclip_pl.training.cli import UnclipCLI

    class TrainerParser(Parser, LightningArgumentParser):
        """Lightning's parser, with our errors."""

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    cli = UnclipCLI(LightningModule, LightningDataModule, args=words, parser_class=TrainerParser)
    folder = getattr(cli.model, "draws", None) if words[0] == "test" else None
    if folder is not None and cli.trainer.is_global_zero:
        from unclip_pl import report

        drawn = report.draw(folder)
        report.summary(folder, drawn)
        report.show(folder, drawn, cli.trainer.loggers)
    return cli
