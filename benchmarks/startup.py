"""What a user waits for: the help, the bars of ``unclip sample`` on a terminal, and its pictures; files are cached.

The run has the tiny configs' networks with random weights; the four pictures are of the weights in the package.
"""

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import Row, clock, fastest, show
from parts import build

from unclip_pl.clip import ClipSpec
from unclip_pl.generation.run import write_run
from unclip_pl.interop.runs import write_checkpoint

COMMAND = [sys.executable, "-m", "unclip_pl"]


def make_run(root: Path) -> None:
    """A CLIP, a prior and a decoder that ``unclip sample`` takes, drawn as the quickstart's are."""
    clip = ClipSpec("tiny-rn", str(root / "clip.pt"))
    torch.save(ClipSpec(clip.name).load().model.state_dict(), clip.pretrained)
    for name in ("prior", "decoder"):
        part = build(f"{name}/tiny")
        write_checkpoint(root / name / "checkpoints" / "last.ckpt", part.task, part.settings)
    prior = {"checkpoint": "prior/checkpoints/last.ckpt"}
    sampler = {"class_path": "unclip_pl.diffusion.DDIM", "init_args": {"steps": 15}}
    decoder = {"checkpoint": "decoder/checkpoints/last.ckpt", "image_size": 32, "sampler": sampler}
    write_run(
        root,
        {
            "clip": {"name": clip.name, "pretrained": clip.pretrained},
            "decoder": {"class_path": "unclip_pl.generation.decoding.DecoderSpec", "init_args": decoder},
            "priors": {
                "diffusion": {"class_path": "unclip_pl.generation.priors.DiffusionPriorSpec", "init_args": prior}
            },
        },
    )


def until(words: list[str], marks: list[str]) -> list[float]:
    """Seconds until each text is seen on the terminal that a command writes to; it is ended then."""
    terminal, end = pty.openpty()
    start, seen, seconds = clock(), "", []
    process = subprocess.Popen(words, stdin=end, stdout=end, stderr=end, env=os.environ | {"COLUMNS": "120"})
    os.close(end)
    for mark in marks:
        while mark not in seen:
            seen += os.read(terminal, 65_536).decode(errors="replace")  # an error where the command is over
        seconds.append(clock() - start)
    process.kill()
    process.wait()
    os.close(terminal)
    return seconds


def rows() -> list[Row]:
    """Seconds, the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        sample = [*COMMAND, "sample", "a red star", "--run", folder, "--out", f"{folder}/sample.png"]
        times = zip(*(until(sample, ["reading", "drawing"]) for _ in range(4)), strict=True)
        reading, drawing = (min(turns) for turns in times)
        words = [*COMMAND, "sample", "a large red star", "--out", f"{folder}/four.png"]
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        four = fastest(lambda: subprocess.run(words, env=one, check=True, capture_output=True), rounds=3)
    usage = min(until([*COMMAND, "--help"], ["usage: unclip"])[0] for _ in range(4))
    note = "its bar of drawing; the bar of reading the run stands after " + f"{reading:.2f} s"
    return [
        Row("startup: unclip --help", usage, None, "s", None, 1.5, ""),
        Row("startup: unclip sample, until it draws", drawing, None, "s", None, 6, note),
        Row("unclip sample, four pictures of the packaged weights, one thread, in all", four, None, "s", None, 4, ""),
    ]


if __name__ == "__main__":
    show(rows)
