"""A stage as a process of its own: it looks as when typed, leaves a log, and ends when ``unclip reproduce`` does."""

import os
import re
import shutil
import signal
import subprocess
import sys
from codecs import getincrementaldecoder
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import IO, Any, TextIO

from unclip_pl.files import alone
from unclip_pl.settings import STAGE_LOCK

#: What a stage's words are given to.
PROGRAM = (sys.executable, "-m", "unclip_pl")
#: Seconds that the rest of an ended process's output may take. A process of its own that it left behind keeps it open.
PATIENCE = 10.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_held = ExitStack()


class Process:
    """A command line of ``unclip`` at work.

    Its output goes to this process's own as it comes, and line by line into the log.

    Args:
        words: command line after ``unclip``.
        log: file that the output is added to.
        lock: file that keeps a second process of the same stage waiting, also when the first ``reproduce`` is dead.
        label: text in front of every line where stages run side by side; progress bars then show their end alone.
        variables: what the process's environment has besides this one's.
    """

    def __init__(self, words: Sequence[str], log: Path, lock: Path, label: str, variables: dict[str, str]) -> None:
        size = shutil.get_terminal_size()
        debug = ["--debug"] if "--debug" in sys.argv else []
        told = {STAGE_LOCK: str(lock), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        told |= {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
        if sys.stdout.isatty() and not label:
            told["TTY_COMPATIBLE"] = "1"  # rich draws its bars
        # In a group of its own Ctrl-C reaches it by this process alone, once.
        own: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        self._process = subprocess.Popen(
            [*PROGRAM, *words, *debug], env=os.environ | told | variables,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **own,
        )  # fmt: skip
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")
        self._turn = Lock()
        pairs = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._readers = [Thread(target=self._copy, args=(*pair, label), daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    def poll(self) -> int | None:
        """Return the exit status as a shell gives it; None while the process runs."""
        status = self._process.poll()
        if status is None:
            return None
        for reader in self._readers:
            reader.join(PATIENCE)
        self._log.close()
        return 128 - status if status < 0 else status

    def send(self, number: int) -> None:
        """Pass a signal on: Ctrl-C to all that the stage has started, as a terminal does; others to the stage."""
        with suppress(ProcessLookupError):
            if os.name != "posix":
                return  # the console has told the process already
            if number == signal.SIGINT:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _copy(self, stream: IO[bytes], terminal: TextIO, label: str) -> None:
        decode, rest = getincrementaldecoder("utf-8")("replace").decode, ""
        while chunk := os.read(stream.fileno(), 1 << 16):
            text = decode(chunk)
            *lines, rest = (rest + text).split("\n")
            self._write(terminal, label, "" if label else text, lines)
        self._write(terminal, label, "", [rest] if rest else [])

    def _write(self, terminal: TextIO, label: str, text: str, lines: list[str]) -> None:
        last = [_ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2]) for line in lines]  # a bar as it was in the end
        with self._turn, suppress(OSError, ValueError):  # a closed terminal stops no stage
            self._log.writelines(f"{line}\n" for line in last)
            self._log.flush()
            terminal.write("".join(f"{label}{line}\n" for line in last if line.strip()) if label else text)
            terminal.flush()


def belong(lock: str) -> None:
    """Make this process a stage's: wait for an earlier one of the same stage, and end when ``reproduce`` does.

    Args:
        lock: the stage's lock file. The system opens it when this process ends.
    """
    Thread(target=_follow, daemon=True).start()
    _held.enter_context(alone(Path(lock)))


def _follow() -> None:
    """Wait for the end of standard input, which ``reproduce`` never writes to and which its death closes."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
