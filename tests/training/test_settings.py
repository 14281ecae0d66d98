"""Settings of Lightning's that its own documentation recommends: each works here, or one line says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from unclip_pl.cli import main
from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint
from unclip_pl.parts import load_part
from unclip_pl.training.callbacks import LOOK, FiniteLoss, SampleGrid, TimeLimit
from unclip_pl.training.cli import build, callbacks_in
from unclip_pl.training.resume import CheckpointFiles

Small = Callable[..., list[str]]
STOP = "--trainer.max_steps"
EVERY = ["--trainer.callbacks", "unclip_pl.training.callbacks.WarmupEMA"]
EVERY += ["--trainer.callbacks+=unclip_pl.training.resume.StepCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]


class Seen(Callback):
    """The batches of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[torch.Tensor]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, *_: Any) -> None:
        if not self.epochs:
            self.epochs.append([])  # resumed inside an epoch
        self.epochs[-1].append(torch.cat([batch.image_embed, batch.text.embed]))


@pytest.mark.parametrize(("share", "count"), [("2", 2), ("0.34", 2)])
def test_overfit_batches_are_the_same_in_every_epoch(share: str, count: int, small: Small, tmp_path: Path) -> None:
    words = ["--trainer.overfit_batches", share, STOP, "6", "--trainer.val_check_interval", "1.0"]
    cli = build(small("prior", tmp_path, *words, "--trainer.check_val_every_n_epoch", "1"))
    cli.trainer.callbacks.append(seen := Seen())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    first, *others = seen.epochs
    assert len(first) == count
    assert len(others) == 2
    for epoch in others:
        for one, other in zip(epoch, first, strict=True):
            assert torch.equal(one, other)


def test_a_resumed_fit_overfits_the_same_batches(small: Small, tmp_path: Path) -> None:
    first = build(small("prior", tmp_path, STOP, "3"))
    first.trainer.fit(first.model, datamodule=first.datamodule)
    batches = []
    for resume in (None, first.trainer.checkpoint_callback.last_model_path):
        cli = build(small("prior", tmp_path, "--trainer.overfit_batches", "1", STOP, "5"))
        cli.trainer.callbacks.append(seen := Seen())
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
        batches.append(next(epoch[0] for epoch in seen.epochs if epoch))
    assert torch.equal(*batches)


def test_a_fit_that_diverges_stops_and_keeps_what_is_whole(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small("prior", tmp_path, *EVERY, "--model.init_args.optimization.lr", "1e30")
    assert main(["fit", *line, "--trainer.gradient_clip_val", "null"]) == 1
    said = capsys.readouterr().err
    assert "Got NaN or infinity by step" in said
    assert "last.ckpt is from before" in said
    saved = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    for name in ("state_dict", "current_model_state"):
        assert all(value.isfinite().all() for key, value in saved[name].items() if key.startswith("net."))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_of_float16_is_no_divergence(scaled: bool) -> None:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda wrong, all: wrong)
    plugin = SimpleNamespace(scaler=object() if scaled else None)
    trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=plugin, checkpoint_callback=None, global_step=1)
    check, module, bad = FiniteLoss(), LightningModule(), {"loss": torch.tensor(torch.inf)}
    if not scaled:
        with pytest.raises(InputError, match="no checkpoint was written"):
            check.on_train_batch_end(trainer, module, bad)
        return
    for n in range(LOOK):
        check.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.0)} if n == LOOK // 2 else bad)
    for _ in range(LOOK - 1):
        check.on_train_batch_end(trainer, module, bad)
    with pytest.raises(InputError, match="diverged"):
        check.on_train_batch_end(trainer, module, bad)


def test_weights_that_are_not_finite_are_refused(
    mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mini_run / "decoder" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(whole)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("weight"))
    checkpoint["state_dict"][name][0] = torch.nan
    torch.save(checkpoint, broken := tmp_path / "broken.ckpt")
    with pytest.raises(InputError, match=rf"broken.ckpt.*NaN or infinity in {name}"):
        load_part(broken, LightningModule)  # type: ignore[type-var]
    description = json.loads((mini_run / "run.json").read_text())
    description["decoder"]["init_args"]["checkpoint"] = str(broken)
    (mini_run / "run.json").rename(kept := mini_run / "kept.json")
    (mini_run / "run.json").write_text(json.dumps(description))
    try:
        assert main(["sample", "a red star", "--run", str(mini_run), "--out", str(tmp_path / "x.png")]) == 1
    finally:
        kept.replace(mini_run / "run.json")
    said = capsys.readouterr().err
    assert "Expected finite numbers" in said
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(
    precision: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times would be half as well: 184 different ones of a thousand."""
    assert main(["fit", *small("prior", tmp_path, "--trainer.precision", precision, STOP, "1")]) == 1
    said = capsys.readouterr().err
    assert f"Got {precision}: use bf16-mixed" in said
    assert "Traceback" not in said


def test_the_average_is_float32_in_float64(small: Small, tmp_path: Path) -> None:
    assert main(["fit", *small("prior", tmp_path, "--trainer.precision", "64-true", STOP, "4")]) == 0
    saved, kind = read_checkpoint(next(tmp_path.rglob("last.ckpt"))), torch.float64
    weights = {name: value for name, value in saved["current_model_state"].items() if name.endswith("weight")}
    assert {value.dtype for value in weights.values()} == {kind}
    assert {saved["state_dict"][name].dtype for name in weights} == {torch.float32}
    assert any(not torch.equal(saved["state_dict"][name].to(kind), value) for name, value in weights.items())


def test_float16_is_unscaled_and_clipped(small: Small, tmp_path: Path) -> None:
    plugin = "{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed, device: cpu}}"
    (tmp_path / "half.yaml").write_text(f"trainer: {{gradient_clip_val: 1.0e-3, plugins: [{plugin}]}}\n")

    class Norms(Callback):
        norms: list[float] = []

        def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            self.norms += [torch.nn.utils.get_total_norm(grads).item()] if grads else []

    cli = build([*small("prior", tmp_path), "--config", str(tmp_path / "half.yaml"), STOP, "4"])
    cli.trainer.callbacks.append(seen := Norms())
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert seen.norms
    assert max(seen.norms) < 1.1e-3


def test_every_logger_that_takes_pictures_gets_the_grid(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Pictures(CSVLogger):
        got: list[tuple[Any, ...]] = []

        def log_image(self, key: str, images: list[Any], step: int) -> None:
            self.got.append((key, images[0].shape, step))

    class Drawer(LightningModule):
        def draw(self, batch: Any, generator: torch.Generator) -> torch.Tensor:
            return torch.zeros(2, 3, 4, 4)

    class Batch:
        def __init__(self, image: torch.Tensor) -> None:
            self.image = image

        def __iter__(self) -> Any:
            return iter([self.image])

    own = [Pictures(tmp_path), CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    grid, trainer = SampleGrid(every_n_steps=1, num=2), Trainer(logger=own, accelerator="cpu")
    grid.on_fit_start(trainer, Drawer())
    assert ["CSVLogger cannot show the pictures of SampleGrid" in str(w.message) for w in recwarn].count(True) == 1
    grid._next = 0
    grid.on_validation_batch_end(trainer, Drawer(), None, Batch(torch.zeros(2, 3, 4, 4)), 0)
    assert len(own[0].got) == 1
    with pytest.warns(UserWarning, match="CSVLogger cannot show the pictures of SampleGrid"):
        grid.on_fit_start(Trainer(logger=CSVLogger(tmp_path), accelerator="cpu"), Drawer())
    with pytest.raises(InputError, match="Got LightningModule, which draws no pictures: leave it out"):
        grid.on_fit_start(trainer, LightningModule())


def test_max_time_counts_this_start_and_says_that_it_ended_the_fit(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small("prior", tmp_path, STOP, "100000", "--trainer.max_time", "00:00:00:01", *EVERY)
    line += ["--trainer.logger.init_args.version", ""]
    steps = []
    for more in ([], ["--ckpt_path", "{last}"]):
        last = next(tmp_path.rglob("last.ckpt"), None)
        assert main(["fit", *line, *(word.format(last=last) for word in more)]) == 0
        said = capsys.readouterr().err
        assert "stopped by max_time" in said
        assert "of 100,000" in said
        assert "last.ckpt goes on from there" in said
        steps.append(read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"])
    assert 0 < steps[0] < steps[1]
    assert not TimeLimit(duration={"seconds": 1}).state_dict()


def test_a_finished_fit_says_that_nothing_is_left(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small("prior", tmp_path, STOP, "1")
    assert main(["fit", *line]) == 0
    assert "stopped" not in (said := capsys.readouterr().err)
    assert "nothing left" not in said
    assert main(["fit", *line, "--ckpt_path", str(next(tmp_path.rglob("last.ckpt")))]) == 0
    assert "nothing left to train at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_slow_products_are_named_before_they_cost_hours(
    fast: bool, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unclip_pl.training.cli.fast_bfloat16", lambda _: fast)
    assert main(["fit", *small("prior", tmp_path, "--trainer.precision", "bf16-mixed", STOP, "1")]) == 0
    assert ("no fast products in bfloat16" in capsys.readouterr().err) is not fast


def test_callbacks_that_a_later_config_drops_are_named(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [{class_path: LearningRateMonitor}]}\n")
    line = [*small("prior", tmp_path, STOP, "1"), "--config", str(tmp_path / "mine.yaml")]
    assert list(callbacks_in(line)) == ["WarmupEMA", "PriorScores", "StepCheckpoint", LearningRateMonitor.__name__]
    assert main(["fit", *line]) == 0
    assert "WarmupEMA and PriorScores and StepCheckpoint will not run" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks+: [{class_path: LearningRateMonitor}]}\n")
    assert main(["fit", *line]) == 0
    assert "will not run" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--trainer.callbacks+=LearningRateFinder", "optimization.lr"),
        ("--trainer.callbacks+=BatchSizeFinder", "batch_size"),
        ("--trainer.barebones=true", "StageProfile"),
        ("--trainer.callbacks+=unclip_pl.training.resume.StepCheckpoint", "more than one stateful callback"),
    ],
)
def test_what_this_project_does_not_have_is_one_line(
    setting: str, said: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *small("prior", tmp_path, setting)]) == 1
    assert said in capsys.readouterr().err


def test_scores_of_random_weights_are_called_that(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *small("prior", tmp_path)]) == 0
    assert "untrained, random weights" in capsys.readouterr().err


def test_a_deleted_checkpoint_leaves_no_empty_folder(tmp_path: Path) -> None:
    files = CheckpointFiles()
    for name in ("step=1-val/loss=0.1.ckpt", "step=2-val/loss=0.2.ckpt"):
        files.save_checkpoint({"state_dict": {}}, tmp_path / name)
    files.remove_checkpoint(tmp_path / "step=1-val/loss=0.1.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step=2-val"]
