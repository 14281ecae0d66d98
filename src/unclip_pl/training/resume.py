"""Runs that can be cut at any moment: when a checkpoint is taken, how it gets to disk, and the random state in it.

The position in the data is stored by ``data.datamodule``, the optimizer's settings by ``tasks.base``. On a CPU a
resumed run equals the uninterrupted one bit for bit.
"""

import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from unclip_pl.errors import InputError
from unclip_pl.files import previous_of, read_checkpoint, replacing
from unclip_pl.training.private import (
    accumulates,
    before_the_epochs_end,
    save_last,
    stop_after_this_batch,
    stops_here,
    validation_is_due,
)


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints that are whole or absent, and reads the one before where a file is damaged.

    A checkpoint is written under a temporary name in its own folder and renamed. (Lightning goes through the system's
    temporary folder, and copies where that is another file system.) The file that it replaces stays as
    ``*.previous.ckpt``, which is read with a warning where the newer one is damaged. Only plain data are read, see
    :func:`~unclip_pl.files.read_checkpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local path; Lightning writes to URLs.

        Raises:
            InputError: the disk is full.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with replacing(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # what torch makes of an OSError
                raise InputError(
                    f"{path} cannot be written; what was there before is kept. Free some space: {error}"
                ) from error
            if path.is_file():
                _keep(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and its folder where that is empty: ``val/loss`` in a file's name makes one."""
        super().remove_checkpoint(path)
        with suppress(OSError):
            Path(path).parent.rmdir()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Return the checkpoint, or the one before where this one is damaged.

        Raises:
            MissingFileError: neither exists.
            InputError: neither can be read.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=True)
        return read_newest(Path(path))


def read_newest(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, or the one before with a warning where it is damaged.

    Raises:
        MissingFileError: neither exists.
        InputError: neither can be read.
    """
    try:
        return read_checkpoint(path, mmap=mmap)
    except InputError as error:
        previous = previous_of(path)
        if not previous.is_file():
            raise
        checkpoint = read_checkpoint(previous, mmap=mmap)
        rank_zero_warn(f"{error} Going on from the one before: {previous}, step {checkpoint['global_step']}.")
        return checkpoint


def _keep(path: Path) -> None:
    """Give a file its second name. Where the file system has hard links, the first name never disappears."""
    previous = previous_of(path)
    spare = previous.with_name(f".{previous.name}.tmp")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
        spare.replace(previous)
    except OSError:
        path.replace(previous)


#: The newest checkpoint, and that of the best validation.
LAST, BEST = "last.ckpt", "best.ckpt"


class StepCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` every n steps, at the last step, and when SIGTERM or Ctrl-C ends the run.

    With ``monitor`` it also keeps ``best.ckpt``, which ``--ckpt_path best`` reads.

    Lightning's ModelCheckpoint saves before a validation that is due at the same step, and a run resumed there never
    makes up for the validation. Here the validation comes first, or is made up for. Nothing is saved between two
    optimizer steps, where gradients are half accumulated.

    Args:
        every_n_train_steps: number of optimizer steps between two checkpoints.
        dirpath: folder of the checkpoint; None is ``checkpoints`` in the logger's folder.
        monitor: logged score of validations, such as ``val/embed_fd``, that decides which checkpoint is the best; None
            keeps no best one.
        mode: whether the smallest or the largest score is the best.
    """

    def __init__(
        self,
        every_n_train_steps: PositiveInt = 100,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self.every_n_train_steps = every_n_train_steps
        self._due = False  # a checkpoint, left to the validation that follows
        self._owed = False  # a validation, which a signal has cut

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Make up for the validation that a signal has cut."""
        super().on_train_start(trainer, *_)
        if self._owed:
            self._owed = False
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save where a checkpoint is due, or leave it to the validation that follows."""
        if accumulates(trainer):
            return
        due = trainer.global_step % self.every_n_train_steps == 0 or _ends(trainer) or _is_cut(trainer)
        if not (due or self._due):
            return
        self._due = sum(trainer.num_val_batches) > 0 and validation_is_due(trainer)
        if not self._due:
            save_last(self, trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Save the best, and what was left to the validation."""
        if self.monitor and not trainer.sanity_checking:
            self._keep_best(trainer)
        if self._due or _is_cut(trainer):
            self._due = False
            save_last(self, trainer)

    def _keep_best(self, trainer: Trainer) -> None:
        """Save where this validation is the best so far, or warn that it did not log the score."""
        if trainer.state.fn != TrainerFn.FITTING or getattr(trainer, "fast_dev_run", False):
            return
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is None:
            logged = ", ".join(sorted(key for key in trainer.callback_metrics if key.startswith("val/")))
            rank_zero_warn(
                f"StepCheckpoint keeps no {BEST}: validations do not log its monitor {self.monitor!r}, but {logged}. "
                "Add the callback that logs it, or set another monitor."
            )
            return
        sign = 1 if self.mode == "min" else -1
        if score.isfinite() and (self.best_model_score is None or sign * score < sign * self.best_model_score):
            self.best_model_score, self.best_model_path = score.clone(), str(Path(str(self.dirpath)) / BEST)
            trainer.save_checkpoint(self.best_model_path)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save where a callback ends the fit after an epoch; else steps count, not epochs."""
        if _is_cut(trainer):
            with before_the_epochs_end(trainer):
                save_last(self, trainer)

    def on_train_end(self, *_: Any) -> None:
        """Do nothing: all is saved, and Lightning has counted a cut epoch as a whole one."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, which Lightning answers between two batches. After other errors the state is not whole.

        Nothing is saved where a validation is cut at the very last step: no later step would make up for it.
        """
        if not isinstance(exception, SIGTERMException) or accumulates(trainer):
            return
        self._owed = bool(trainer.validating)
        if not (_ends(trainer) if self._owed else trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
            save_last(self, trainer)

    @property
    def state_key(self) -> str:
        """Return a key without the settings, which may change on resume."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, and whether a validation was cut."""
        return super().state_dict() | {"owed": self._owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, the best score also into another folder. What was best by another score is forgotten."""
        super().load_state_dict(state_dict)
        if state_dict["monitor"] == self.monitor:
            self.best_model_score = state_dict["best_model_score"]
        else:
            self.best_model_score, self.best_model_path = None, ""
        self._owed = state_dict["owed"]


def _ends(trainer: Trainer) -> bool:
    """Return whether the fit ends with this batch."""
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return last_step or (last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def _is_cut(trainer: Trainer) -> bool:
    """Return whether the fit ends here before its last step: by a signal or by a callback.

    The state is whole here. Later Lightning counts a cut epoch as finished, and the rest of its data would be left out.
    """
    return trainer.received_sigterm or stops_here(trainer)


class ExactResume(Callback):
    """Saves and restores every rank's global generators: Python's, NumPy's, and torch's on CPU and CUDA.

    Data workers have no state to save: a batch is a pure function of the sampler's seed, epoch and rows.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store one state for each rank."""
        states = [random_state()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until everything is built that draws numbers."""
        self._saved = checkpoint.get("random_state", [])
        if self._saved and len(self._saved) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(self._saved)} processes, and {trainer.world_size} run now. "
                "Its random numbers differ from those of the uninterrupted run, and the rest of this epoch may repeat "
                "rows or leave some out. From the next epoch on all is as usual."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of this rank, or begin a new run with one that depends on ``seed_everything`` alone.

        After a checkpoint of an epoch's last batch, Lightning ends that epoch and does not open the next: its count of
        epochs would stay one behind.
        """
        loop = trainer.fit_loop
        epochs = loop.epoch_progress
        if loop.restarted_mid_epoch and epochs.current.ready == epochs.current.completed:
            epochs.increment_ready()
            epochs.increment_started()
        if self._saved:
            set_random_state(self._saved[trainer.global_rank % len(self._saved)])
            self._saved = []
        elif not trainer.global_step:
            reset_seed()
            torch.manual_seed(random.getrandbits(63))  # not the stream that made the weights


def random_state() -> dict[str, Any]:
    """Return the state of this process's global generators as plain data."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Set this process's global generators to what :func:`random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Signals(Callback):
    """Makes SIGTERM and the first Ctrl-C end a fit after the step, with a checkpoint. The second Ctrl-C stops at once.

    A step may take several batches, whose gradients add up: Lightning would stop between them, where nothing can be
    saved. Several processes agree on the batch at which they stop. Lightning would let each broadcast from inside its
    signal handler, in the middle of another exchange, and they would hang.
    """

    def __init__(self) -> None:
        self.ctrl_c = False
        self._asked = False
        self._strategy: Strategy | None = None
        self._before: Any = None

    def on_fit_start(self, *_: Any) -> None:
        """Remove other handlers of SIGTERM, which Lightning would call as well."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._finish_step)
            self._strategy = trainer.strategy
            signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop here if a process was told to."""
        self._agree(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop here if a process was told to."""
        if not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, *_: Any) -> None:
        """Remove the handlers."""
        self._restore()

    def on_exception(self, *_: Any) -> None:
        """Remove the handlers."""
        self._restore()

    def _ask(self, number: int, _: Any) -> None:
        launcher = self._strategy.launcher if self._strategy else None
        if launcher is not None and not self._asked:
            launcher.kill(signal.Signals(number))
        self._asked = True

    def _agree(self, trainer: Trainer) -> None:
        if not accumulates(trainer) and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            stop_after_this_batch(trainer)

    def _finish_step(self, *_: Any) -> None:
        self.ctrl_c = True
        self._restore()
        signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
