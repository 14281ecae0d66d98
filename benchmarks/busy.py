"""What other work on the machine costs: ``unclip sample`` and a step of each tiny part, alone and beside a training.

The training is endless steps of the tiny decoder in a process of its own. All processes have the threads that a user
gets, and idle threads sleep (``OMP_WAIT_POLICY``, which ``import unclip_pl`` sets for processes that it starts).
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from measure import Row, fastest, show
from parts import build, training_step

PARTS = ("clip/tiny", "prior/tiny", "ar_prior/tiny", "decoder/tiny")
ROUNDS = 3


def step_of(name: str) -> Callable[[], None]:
    """A training step of a part in float32, at its config's batch size."""
    part = build(name)
    return training_step(part.task, lambda task, given: task.loss(given), part.batch(part.batch_size), bf16=False)


@contextmanager
def training() -> Iterator[None]:
    """Train beside what is done inside, which begins when the first steps are over."""
    process = subprocess.Popen([sys.executable, __file__, "train"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def measured(folder: str) -> dict[str, float]:
    """Seconds of a step of each part, and of ``unclip sample`` in all."""
    words = [sys.executable, "-m", "unclip_pl", "sample", "a red star", "--out", str(Path(folder) / "sample.png")]
    seconds = {"unclip sample": fastest(lambda: subprocess.run(words, check=True, capture_output=True), ROUNDS)}
    for name in PARTS:
        done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        seconds[f"a step of {name}"] = float(done.stdout)
    return seconds


def rows() -> list[Row]:
    """How many times as long each takes beside a training: half of two cores is taken, so 2 is what there is."""
    with tempfile.TemporaryDirectory() as folder:
        alone = measured(folder)
        with training():
            beside = measured(folder)
    threads = os.environ.get("OMP_NUM_THREADS", "all cores'")
    note = f"{threads} threads; {{:.2f}} s alone"
    return [
        Row(
            f"busy: {name}, beside a training",
            beside[name] / alone[name],
            None,
            "× alone",
            None,
            2,
            note.format(alone[name]),
        )
        for name in alone
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        step = step_of("decoder/tiny")
        for i in count():
            step()
            if i == 2:
                print("trains", flush=True)
    elif sys.argv[1:] and sys.argv[1] in PARTS:
        print(fastest(step_of(sys.argv[1]), rounds=5))
    else:
        show(rows)
