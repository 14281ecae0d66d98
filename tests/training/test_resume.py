"""A run that was cut goes on as if it had not been: the same losses and the same weights, bit for bit."""

import io
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from unclip_pl.cli import main
from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint
from unclip_pl.training.cli import build
from unclip_pl.training.private import accumulates
from unclip_pl.training.resume import CheckpointFiles, Signals, StepCheckpoint, random_state, set_random_state

Small = Callable[..., list[str]]
PARTS = ("prior", "ar_prior", "decoder", "upsampler", "clip")
#: Draws from the global generator inside the network, too.
DROPOUT = {part: ["--model.init_args.net.init_args.dropout", "0.1"] for part in ("decoder", "upsampler")}
STEPS = 13
#: A closed terminal, where the system has a signal for it.
HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)
#: What a checkpoint holds besides the run's state: times and paths.
BESIDES = ("train_seconds", "callbacks", "config", "hyper_parameters")


@dataclass
class Fit(Callback):
    """What a fit showed: its losses by step, its validation losses, and its last state."""

    train: dict[int, float] = field(default_factory=dict)
    val: dict[int, float] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    last: Path | None = None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        if not accumulates(trainer):
            self.train[trainer.global_step] = outputs["loss"].item()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.val[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


class Keep(Callback):
    """Copies of ``last.ckpt``, as runs that are killed after some steps leave it."""

    def __init__(self, folder: Path, *steps: int) -> None:
        folder.mkdir(exist_ok=True)
        self.at = {step: folder / f"at-{step}.ckpt" for step in steps}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        last = Path(trainer.checkpoint_callback.dirpath) / "last.ckpt"
        if trainer.global_step in self.at and last.is_file():
            self.at[trainer.global_step].write_bytes(last.read_bytes())


def fit(line: list[str], *callbacks: Callback, resume: Path | str | None = None, every: int = 1) -> Fit:
    """Run it, and forget all that the process knew before."""
    cli = build(line)
    seen = Fit()
    cli.trainer.callbacks[:0] = [seen, *callbacks]
    for callback in cli.trainer.callbacks:
        if isinstance(callback, StepCheckpoint):
            callback.every_n_train_steps = every
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    seen.last = Path(cli.trainer.checkpoint_callback.last_model_path)
    seen.weights = state(read_checkpoint(seen.last))
    return seen


UNCUT: dict[str, Fit] = {}


def fit_once(line: list[str]) -> Fit:
    """The run that is never cut, made once for all tests of these options. The logger's folder does not count."""
    options = " ".join(word for word, before in zip(line, ["", *line], strict=False) if "save_dir" not in before)
    if options not in UNCUT:
        UNCUT[options] = fit(line)
    return UNCUT[options]


def state(node: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number of a checkpoint but the time it took and where it lies."""
    if isinstance(node, dict):
        items = [(key, value) for key, value in node.items() if key not in BESIDES]
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        return {path: torch.as_tensor(node)} if isinstance(node, torch.Tensor | int | float) else {}
    return {key: leaf for name, value in items for key, leaf in state(value, f"{path}/{name}").items()}


def assert_same(one: Fit, other: Fit, since: int, *, validated: bool = True) -> None:
    """From a step on: losses, validation losses (also of that step, if it was cut), all the last checkpoint has."""
    assert {k: v for k, v in one.train.items() if k > since} == other.train
    assert {k: v for k, v in one.val.items() if k > since - (not validated)} == other.val
    assert one.weights.keys() == other.weights.keys()
    different = [key for key, value in one.weights.items() if not torch.equal(value, other.weights[key])]
    assert not different


@pytest.mark.parametrize("part", PARTS)
def test_it_goes_on_inside_an_epoch(part: str, small: Small, tmp_path: Path) -> None:
    line = small(part, tmp_path, *DROPOUT.get(part, []))
    keep = Keep(tmp_path, 7)
    whole = fit(line, keep, every=7)
    assert list(whole.train) == list(range(1, STEPS + 1))
    assert list(whole.val) == [4, 8, 12]
    assert_same(whole, fit(line, resume=keep.at[7], every=7), since=7)


def test_muon_goes_on_inside_an_epoch(small: Small, tmp_path: Path) -> None:
    line = small("prior", tmp_path, "--model.init_args.optimization.muon_lr", "0.01")
    whole = fit(line, keep := Keep(tmp_path, 7), every=7)
    assert_same(whole, fit(line, resume=keep.at[7], every=7), since=7)


def test_cut_again_and_again_and_at_the_end_of_an_epoch(small: Small, tmp_path: Path) -> None:
    line = small("prior", tmp_path)
    whole = fit(line, keep := Keep(tmp_path, 4, 6, 12))
    for step in (4, 6, 12):
        assert_same(whole, fit(line, keep, resume=keep.at[step]), since=step)  # the next was kept by this one


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_every_step(part: str, workers: int, small: Small, tmp_path: Path) -> None:
    line = small(part, tmp_path, *DROPOUT.get(part, []), "--data.init_args.num_workers", str(workers))
    keep = Keep(tmp_path, *range(1, STEPS))
    whole = fit(line, keep)
    for step, checkpoint in keep.at.items():
        assert_same(whole, fit(line, resume=checkpoint), since=step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        "accumulate_grad_batches 2",
        "limit_train_batches 4",
        "max_epochs 2 max_steps -1 val_check_interval 1.0 check_val_every_n_epoch 1",
    ],
)
def test_whatever_an_epoch_is(settings: str, small: Small, tmp_path: Path) -> None:
    pairs = zip(settings.split()[::2], settings.split()[1::2], strict=True)
    line = small("prior", tmp_path, *(word for key, value in pairs for word in (f"--trainer.{key}", value)))
    whole = fit(line, keep := Keep(tmp_path, 2, 3, 4, 5, 6, 7))
    for step, checkpoint in keep.at.items():
        assert_same(whole, fit(line, resume=checkpoint), since=step)


def test_a_longer_run_is_what_it_would_have_been(small: Small, tmp_path: Path) -> None:
    line = [*small("prior", tmp_path), "--model.init_args.optimization.decay", "constant"]
    whole = fit(line)
    short = fit([*line, "--trainer.max_steps", "10"])
    assert short.last is not None
    assert_same(whole, fit(line, resume=short.last), since=10)


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGINT, 130, 9), (HANG_UP, 143, 9), (signal.SIGTERM, 143, 6), (signal.SIGTERM, 143, 8)],
    ids=["ctrl-c", "closed terminal", "at the end of an epoch", "inside a validation"],
)
def test_a_signal_ends_the_step_saves_and_says_where(
    number: signal.Signals,
    status: int,
    step: int,
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = small("prior", tmp_path)
    whole = fit_once(small("prior", tmp_path / "whole"))

    def strike(_: Any, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == step - 1:
            signal.raise_signal(number)

    before = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Signals, "on_train_batch_start", strike)
    assert main(["fit", *line]) == status
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = tmp_path / "prior-tiny" / "version_0" / "checkpoints" / "last.ckpt"
    assert f"stopped at step {step}: {last} goes on from there" in said
    monkeypatch.undo()
    assert_same(whole, fit(line, resume=last), since=step, validated=step != 8)


def test_a_signal_between_two_batches_of_a_step_waits_for_the_step(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small("prior", tmp_path, "--trainer.accumulate_grad_batches", "2")
    whole = fit([*line, "--trainer.logger.init_args.name", "whole"])

    def strike(_: Any, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Signals, "on_train_batch_start", strike)
    assert main(["fit", *line, "--trainer.callbacks.every_n_train_steps", "100"]) == 143
    monkeypatch.undo()
    last = tmp_path / "prior-tiny" / "version_0" / "checkpoints" / "last.ckpt"
    assert f"stopped at step 5: {last} goes on from there" in capsys.readouterr().err
    assert_same(whole, fit(line, resume=last), since=5)


class End(Callback):
    """Ends a fit at a step, as a time limit or EarlyStopping does."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._end)

    def _end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("hook", "step", "batches"),
    [
        ("on_train_batch_end", 7, 1),
        ("on_validation_end", 8, 1),
        ("on_train_epoch_end", 6, 1),
        ("on_train_batch_end", 5, 2),
    ],
)
def test_a_fit_that_a_callback_ends_goes_on_as_if_it_had_not(
    hook: str, step: int, batches: int, small: Small, tmp_path: Path
) -> None:
    """The checkpoint holds the weights beside their average, and the position inside the epoch."""
    line = small("prior", tmp_path, "--trainer.accumulate_grad_batches", str(batches))
    whole = fit([*line, "--trainer.logger.init_args.name", "whole"])
    cut = fit(line, End(hook, step), every=100)
    assert max(cut.train) == step
    assert_same(whole, fit(line, resume=cut.last), since=step)


def test_last_is_found_by_name(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*small("prior", tmp_path), "--ckpt_path", "last"]
    assert main(["validate", *line]) == 1
    assert "Expected last.ckpt of an earlier fit" in capsys.readouterr().err
    assert main(["fit", *line, "--trainer.max_steps", "2"]) == 0
    assert "training begins" in capsys.readouterr().err
    assert main(["fit", *line, "--trainer.max_steps", "4"]) == 0
    assert "version_0/checkpoints/last.ckpt at step 2" in capsys.readouterr().err
    assert main(["validate", *line]) == 0
    assert "random" not in capsys.readouterr().err


def test_the_best_score_holds_in_another_folder(tmp_path: Path) -> None:
    first, second, other = (
        StepCheckpoint(dirpath=str(tmp_path / name), monitor=f"val/{score}")
        for name, score in (("a", "loss"), ("b", "loss"), ("b", "embed_fd"))
    )
    first.best_model_score = torch.tensor(0.5)
    for resumed, expected in ((second, 0.5), (other, None)):
        resumed.load_state_dict(first.state_dict())
        assert resumed.best_model_score == expected


def kill(line: list[str], last: Path, delay: float = 0.0) -> int:
    """Start a fit as a process, and kill it some seconds after it has saved. The step that is on disk then."""
    before = last.stat().st_mtime_ns if last.is_file() else 0
    resume = ["--ckpt_path", str(last)] if before else []
    process = subprocess.Popen([sys.executable, "-m", "unclip_pl", "fit", *line, *resume])
    while process.poll() is None and (not last.is_file() or last.stat().st_mtime_ns == before):
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return read_checkpoint(last)["global_step"]


def endless(part: str, small: Small, out: Path, workers: int) -> list[str]:
    """Options of a fit that saves every other step, and knows nothing of its end."""
    line = small(part, out, *DROPOUT.get(part, []), "--data.init_args.num_workers", str(workers))
    line += ["--model.init_args.optimization.decay", "constant", "--trainer.max_steps", "1000000"]
    line += ["--trainer.callbacks", "unclip_pl.training.callbacks.WarmupEMA"]
    line += ["--trainer.callbacks+", "unclip_pl.training.resume.StepCheckpoint"]
    return [*line, "--trainer.callbacks.every_n_train_steps", "2", "--trainer.logger.init_args.version", ""]


def test_sigkill(small: Small, tmp_path: Path) -> None:
    line = endless("prior", small, tmp_path / "cut", workers=2)
    last = tmp_path / "cut" / "prior-tiny" / "checkpoints" / "last.ckpt"
    step = kill(line, last)
    end = ["--trainer.max_steps", str(step + 5)]
    whole = fit([*endless("prior", small, tmp_path, workers=2), *end])
    assert_same(whole, fit([*line, *end], resume="last"), since=step)  # Lightning finds it in the run's folder
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "last.previous.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_at_random_moments(part: str, workers: int, small: Small, tmp_path: Path) -> None:
    line = endless(part, small, tmp_path / "cut", workers)
    last = tmp_path / "cut" / f"{part.replace('_', '-')}-tiny" / "checkpoints" / "last.ckpt"
    steps = [kill(line, last, delay=random.random() / 4) for _ in range(4)]
    assert steps == sorted(steps)
    end = ["--trainer.max_steps", str(steps[-1] + 5)]
    whole = fit([*endless(part, small, tmp_path, workers), *end])
    assert_same(whole, fit([*line, *end], resume=last), since=steps[-1])
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "last.previous.ckpt"]


def test_what_lies_on_disk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, last = CheckpointFiles(), tmp_path / "last.ckpt"
    for step in range(3):
        files.save_checkpoint({"global_step": step, "weights": torch.full((1000,), step)}, last)
    assert files.load_checkpoint(last)["global_step"] == 2
    monkeypatch.setattr(torch, "save", lambda _, path: (Path(path).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        files.save_checkpoint({"global_step": 3}, last)
    assert files.load_checkpoint(last)["global_step"] == 2

    def full(_: Any, path: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"last\.ckpt cannot be written.*Free some space"):
        files.save_checkpoint({"global_step": 3}, last)
    assert files.load_checkpoint(last)["global_step"] == 2
    assert files.load_checkpoint(tmp_path / "last.previous.ckpt")["global_step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.previous.ckpt"]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of the weights: torch itself would not notice."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"junk"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    files, last = CheckpointFiles(), tmp_path / "last.ckpt"
    for step in range(2):
        files.save_checkpoint({"global_step": step, "weights": torch.rand(1000)}, last)
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match=r"not a readable checkpoint.*Going on from the one before.*step 0"):
        assert files.load_checkpoint(last)["global_step"] == 0
    last.unlink()
    with pytest.warns(UserWarning, match=r"No checkpoint at.*Going on from the one before"):
        assert files.load_checkpoint(last)["global_step"] == 0
    (tmp_path / "last.previous.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        files.load_checkpoint(last)


def test_every_generator_comes_back() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(()).item()

    draw()  # one half of a pair of Gaussians is in store now
    saved, drawn = random_state(), draw()
    assert draw() != drawn
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    set_random_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert draw() == drawn


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generators(workers: int, small: Small, tmp_path: Path) -> None:
    cli = build(small("prior", tmp_path, "--data.init_args.num_workers", str(workers)))
    cli.datamodule.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)
    before = random_state()
    batches = [list(cli.datamodule.train_dataloader()) for _ in range(2)]
    assert str(random_state()) == str(before)
    assert all(torch.equal(a.image_embed, b.image_embed) for a, b in zip(*batches, strict=True))


def test_the_config_wins_over_the_checkpoint(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = small("prior", tmp_path)
    first = fit([*line, "--trainer.max_steps", "5"])
    spec = {"lr": 3e-4, "weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-7, "warmup_steps": 0}
    for name, value in spec.items():
        line += [f"--model.init_args.optimization.{name}", str(value)]
    cli = build(line)
    seen: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.extend(dict(group, params=[]) for group in trainer.optimizers[0].param_groups)

    cli.trainer.callbacks.append(Look())
    capsys.readouterr()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=first.last)
    said = capsys.readouterr().err
    assert "model.init_args.optimization.lr: 0.004 -> 0.0003" in said
    assert f"trainer.max_steps: 5 -> {STEPS}" in said
    assert "heads" not in said
    matrices, vectors = seen[:2]
    factor = 0.5 * (1 + math.cos(math.pi * 5 / STEPS))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    for group in (matrices, vectors):
        assert group["lr"] == pytest.approx(3e-4 * factor)
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-7)
    assert seen[-2]["lr"] == pytest.approx(3e-4 * 0.5 * (1 + math.cos(math.pi * (STEPS - 1) / STEPS)))
