"""``unclip precompute`` as a process: killed, terminated, interrupted, and as several."""

import itertools
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
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


def adding(words: list[str], *more: str) -> list[str]:
    """The command with further options; its store still follows."""
    return [*words[:-1], *more, words[-1]]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_parts_and_their_end_killed_at_any_moment(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path, kills: int
) -> None:
    """Two parts at a time are killed and started again; so is the end, once all parts are done."""
    parts, end = [adding(words, "--part", f"{part}/2") for part in (1, 2)], [adding(words, "--finish")]
    assert ended(start(end[0], tmp_path / "first")) == 1  # waits for the server's imports
    begin = time.monotonic()
    assert ended(start(parts[0], tmp_path / "first")) == 0
    duration, moment = time.monotonic() - begin, random.Random(0)
    assert ended(start(end[0], tmp_path / "first")) == 1
    assert "all 2 parts. Got none or not all of 2/2: run them again" in (tmp_path / "first.log").read_text()
    for lines in (parts, end):
        hits = 0
        while hits < kills:
            processes = [start(line, tmp_path / "store") for line in lines]
            time.sleep(moment.uniform(0, duration))
            for process in processes:
                process.kill()
            hits += sum(ended(process) == -signal.SIGKILL for process in processes)
            if hits < kills and all(process.exitcode == 0 for process in processes) and lines is parts:
                (tmp_path / "store").rename(tmp_path / f"done-{time.monotonic_ns()}")
        for line in lines:
            assert ended(start(line, tmp_path / "store")) == 0
    assert contents(tmp_path / "store") == undisturbed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--part", "0/4"], "from 1/N to N/N, such as 3/64. Got '0/4'"),
        (["--part", "1/4", "--finish"], "--finish without --part. Got both"),
        (["--finish", "--verify"], "--finish without --verify. Got both"),
        (["--finish"], "12 of 12 shards have no embeddings"),
    ],
)
def test_parts_that_make_no_sense(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main([*adding(words, *more), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_no_store(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "s3://bucket/store"]) == 1
    assert "Expected a folder as --store. Got s3://bucket/store" in capsys.readouterr().err


def snippets(language: str) -> list[str]:
    """Code blocks about parts in docs/scale.md."""
    text = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    section = text[text.index("### In parts") : text.index("## Training a prior")]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_snippets_are_commands() -> None:
    """Their lines parse, and their Python and YAML does."""
    lines = re.findall(r"unclip precompute [^'\"\n]*", "".join(snippets(r"\w+")))
    assert len(lines) == 5
    for line in lines:
        assert main([*shlex.split(re.sub(r"\$\(\(.*?\)\)", "1", line))[1:], "--print_config"]) == 0
    (python,), (sky,) = snippets("python"), snippets("yaml")
    compile(python, "docs/scale.md", "exec")
    assert yaml.safe_load(sky).keys() == {"num_nodes", "resources", "run"}


@pytest.mark.slow  # four processes that import everything
def test_the_slurm_array_as_processes(words: list[str], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    array, end = (block.replace("/64", "/3") for block in snippets("bash")[:2])
    options = dict(itertools.pairwise(words))
    for name, value in (("clip.name ViT-L-14", "clip.name"), ("clip.pretrained openai", "clip.pretrained")):
        array, end = (script.replace(name, f"{value} {options[f'--{value}']}") for script in (array, end))
    (tmp_path / "unclip").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m unclip_pl "$@" --accelerator cpu --batch_size 16\n'
    )
    (tmp_path / "unclip").chmod(0o755)
    place = {"SHARDS": options["--source"], "STORE": str(tmp_path / "store")}
    place |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    numbers = [{"SLURM_ARRAY_TASK_ID": str(number)} for number in (1, 2, 3)]
    started = [subprocess.Popen(["bash", "-c", array], env=os.environ | place | number) for number in numbers]
    assert [process.wait(600) for process in started] == [0, 0, 0]
    subprocess.run(["bash", "-c", end], env=os.environ | place, check=True)
    assert contents(tmp_path / "store") == undisturbed


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
