"""Runs that can be cut at any moment: when a checkpoint is taken, how it gets to disk, and the random state in it.

What else a resumed run needs is where it belongs: the position in the data in ``data.datamodule``, the optimizer's
settings in ``tasks.base``. Together they make it the same run, bit for bit on CPU.
"""

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from unclip_pl.files import previous_of, read_checkpoint, replacing


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints are whole or not there, and one that went bad on disk does not end the run.

    Written under a temporary name in the same folder and renamed (Lightning goes through the system's temporary folder,
    and copies where that is another file system); what is replaced stays as ``*.previous.ckpt``, and is read with a
    warning in place of a damaged one. Nothing but plain data is ever read, see
    :func:`~unclip_pl.files.read_checkpoint`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Lightning's for URLs."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed here
            left.unlink(missing_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            if path.is_file():
                _keep(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """The checkpoint, or the one before it where this one is damaged.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: what is there cannot be read.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=True)
        try:
            return read_checkpoint(path)
        except (FileNotFoundError, ValueError) as error:
            previous = previous_of(Path(path))
            if not previous.is_file():
                raise
            checkpoint = read_checkpoint(previous)
            rank_zero_warn(f"{error} Going on from the one before: {previous}, step {checkpoint['global_step']}.")
            return checkpoint


def _keep(path: Path) -> None:
    """Give a file its second name; there is no moment without the first, where the file system knows hard links."""
    previous = previous_of(path)
    spare = previous.with_name(f".{previous.name}.tmp")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
        spare.replace(previous)
    except OSError:
        path.replace(previous)


class StepCheckpoint(ModelCheckpoint):
    """``last.ckpt`` every n steps, at the last step, and when SIGTERM or Ctrl-C ends the run.

    Lightning's ModelCheckpoint saves before a validation that is due at the same step, and whoever resumes there never
    makes up for it. Here the validation comes first, or is made up for. Nothing is saved between two optimizer steps,
    where gradients are half accumulated.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints.
        dirpath: folder; None is ``checkpoints`` in the logger's.
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._due = False  # left to the validation that follows
        self._owed = False  # a validation that the resumed run was cut in

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Makes up for the validation that a signal has cut."""
        super().on_train_start(trainer, *_)
        if self._owed:
            self._owed = False
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves where it is due, or leaves it to the validation that follows."""
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return
        due = trainer.global_step % self._every_n_train_steps == 0 or _ends(trainer) or trainer.received_sigterm
        if not (due or self._due):
            return
        fetcher: Any = loop._data_fetcher
        self._due = sum(trainer.num_val_batches) > 0 and loop.epoch_loop._should_check_val_fx(fetcher)
        if not self._due:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves what was left to it."""
        if self._due or trainer.received_sigterm:
            self._due = False
            self._save(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Steps count, not epochs."""

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """For runs that end early, by time or by another callback."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves on SIGTERM, which Lightning answers between two batches: after anything else, nothing is whole.

        A validation that is cut at the very last step is not saved: nothing would make up for it.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if not isinstance(exception, SIGTERMException) or trainer.fit_loop._should_accumulate():
            return
        self._owed = bool(trainer.validating)
        if not _ends(trainer) if self._owed else not progress.is_last_batch:
            self._save(trainer)

    @property
    def state_key(self) -> str:
        """The same whatever the settings: they may change on resume."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and whether a validation is owed."""
        return super().state_dict() | {"owed": self._owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        super().load_state_dict(state_dict)
        self._owed = state_dict["owed"]

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _ends(trainer: Trainer) -> bool:
    """Whether the fit is over with this batch."""
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return last_step or (last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


class ExactResume(Callback):
    """The state of every global generator (Python's, NumPy's, torch's on CPU and GPU) of every rank, there and back.

    What workers make needs none: a batch is a pure function of the sampler's seed, epoch and rows.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes it down, by rank."""
        states = [random_state()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps it until everything is built that draws numbers."""
        self._saved = checkpoint.get("random_state", [])
        if self._saved and len(self._saved) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is of {len(self._saved)} processes, and there are {trainer.world_size} now: what "
                "follows is a good run, but not the same."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts it back, and opens the epoch that follows one whose last batch the checkpoint is of.

        Lightning closes the finished one and leaves it at that: its count of epochs would be one behind from here on.
        A new run begins with a state that depends on ``seed_everything`` alone, on any number of processes.
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
            torch.manual_seed(random.getrandbits(63))  # another stream than the one that made the weights


def random_state() -> dict[str, Any]:
    """Of this process, as plain data."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Signals(Callback):
    """SIGTERM during a fit is Lightning's: it ends the batch, and the checkpoint is saved. So is the first Ctrl-C.

    The second Ctrl-C stops at once. Several processes agree on the batch: Lightning has each of them broadcast from
    inside its signal handler, in the midst of whatever they exchange there, and they hang.
    """

    def __init__(self) -> None:
        self.ctrl_c = False
        self._asked = False
        self._trainer: Trainer | None = None
        self._before: Any = None

    def on_fit_start(self, *_: Any) -> None:
        """Takes other handlers of SIGTERM away, which Lightning would call too."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._finish_step)
            if trainer.world_size > 1:
                self._trainer = trainer
                signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Asks the others."""
        self._agree(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Likewise."""
        if not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_end(self, *_: Any) -> None:
        """Listens no more."""
        self._restore()

    def on_exception(self, *_: Any) -> None:
        """Likewise."""
        self._restore()

    def _ask(self, number: int, _: Any) -> None:
        launcher = self._trainer.strategy.launcher if self._trainer else None
        if launcher is not None and not self._asked:
            launcher.kill(signal.Signals(number))
        self._asked = True

    def _agree(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            trainer._signal_connector.received_sigterm = True

    def _finish_step(self, *_: Any) -> None:
        self.ctrl_c = True
        self._restore()
        signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
