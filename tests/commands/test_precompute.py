"""``unclip precompute`` as a process: killed, terminated, interrupted, and as several."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unclip_pl.cli import main
from unclip_pl.clip.encoder import build_clip

#: Forks start in milliseconds from a server that has imported everything once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["unclip_pl.cli", "unclip_pl.commands.precompute", "lightning.fabric"])

COMMAND = """
import os, sys
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
from unclip_pl.cli import main
sys.exit(main(words))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All of the command but its store: twelve shards of forty images."""
    folder = tmp_path_factory.mktemp("precompute")
    counts = ["--train", "440", "--val", "20", "--heldout", "0", "--shard_size", "40", "--num_workers", "1"]
    assert main(["pack", "shapes", "--out", str(folder / "source"), *counts]) == 0
    torch.manual_seed(0)
    save_file(
        {key: value.contiguous() for key, value in build_clip("tiny-rn").state_dict().items()},
        folder / "clip.safetensors",
    )
    return [
        *["precompute", "--source", str(folder / "source"), "--batch_size", "16", "--accelerator", "cpu"],
        *["--clip.name", "tiny-rn", "--clip.pretrained", str(folder / "clip.safetensors"), "--store"],
    ]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed")
    assert main([*words, str(store)]) == 0
    return contents(store)


def start(words: list[str], store: Path) -> BaseProcess:
    log = str(store.with_suffix(".log"))
    process = SERVER.Process(target=exec, args=(COMMAND, {"words": [*words, str(store)], "log": log}))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(600)
    return process.exitcode


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment(words: list[str], undisturbed: dict[str, bytes], tmp_path: Path, kills: int) -> None:
    assert ended(start(words, tmp_path / "first")) == 0  # waits for the server's imports
    begin = time.monotonic()
    assert ended(start(words, tmp_path / "second")) == 0
    duration, moment, hits = time.monotonic() - begin, random.Random(0), 0
    while hits < kills:
        process = start(words, tmp_path / "store")
        time.sleep(moment.uniform(0, duration))
        process.kill()
        hits += ended(process) == -signal.SIGKILL
        if process.exitcode == 0:  # it was faster: from the start again, after a look at what it made
            assert contents(tmp_path / "store") == undisturbed
            (tmp_path / "store").rename(tmp_path / f"done-{time.monotonic_ns()}")
    assert ended(start(words, tmp_path / "store")) == 0
    assert contents(tmp_path / "store") == undisturbed  # no temporary file either


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted: the same"), (signal.SIGTERM, 143, "terminated: the same")],
)
def test_stopped_by_a_signal(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path, number: int, status: int, said: str
) -> None:
    process, store = start(words, tmp_path / "store"), tmp_path / "store"
    wait_until(lambda: any(store.glob("*.safetensors")) or not process.is_alive())
    assert process.pid
    os.kill(process.pid, number)
    assert ended(process) == status
    assert (tmp_path / "store.log").read_text() == f"{said} command goes on where it stopped.\n"
    made = contents(store)
    assert 0 < len(made) < 12
    assert made.items() <= undisturbed.items()
    assert ended(start(words, store)) == 0
    assert contents(store) == undisturbed


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def command(words: list[str], store: Path) -> subprocess.Popen[str]:
    """Start a command like a user: with several devices, Lightning runs this very command line again."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "unclip_pl", *words, str(store)]
    return subprocess.Popen(line, env=one_thread, stderr=subprocess.PIPE, text=True, process_group=0)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(words: list[str], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    process = command([*words[:-1], "--devices", "2", words[-1]], tmp_path / "store")
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert contents(tmp_path / "store") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_first_of_two_processes_is_stopped(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    """The other one ends too, and the same command finishes what both began."""
    twice, store = [*words[:-1], "--devices", "2", words[-1]], tmp_path / "store"
    process = command(twice, store)
    wait_until(lambda: any(store.glob("*.safetensors")))
    process.send_signal(number)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -number), said
    wait_until(lambda: not group_is_alive(process.pid))
    assert main([*words, str(store)]) == 0
    assert contents(store) == undisturbed


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_that_a_launcher_started_must_be_spoken_of(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([*words, str(tmp_path)]) == 1
    assert "the 4 processes" in capsys.readouterr().err
