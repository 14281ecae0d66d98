"""What we need of Lightning and cannot get by a public name. No other file uses a private name of Lightning.

Read in Lightning 2.6.6. A release may change any of it without notice, which is why pyproject.toml sets an upper bound.
``tests/test_architecture.py`` holds the other files to this rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn
from lightning.pytorch.strategies import ModelParallelStrategy


def accumulates(trainer: Trainer) -> bool:
    """Return whether this batch only adds to the gradients: the optimizer steps at a later one.

    ``trainer.global_step`` cannot tell: it is the same before a step and between two steps.
    """
    return trainer.fit_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows this training batch, by any of the Trainer's settings for that.

    The one that Lightning adds where a callback ends the fit does not count: no run that goes on makes up for it.
    """
    loop = trainer.fit_loop
    fetcher: Any = loop._data_fetcher
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stops


def stops_here(trainer: Trainer) -> bool:
    """Return whether a callback has ended the fit, such as a time limit, and the Trainer's least steps are done."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def stop_after_this_batch(trainer: Trainer) -> None:
    """Make the Trainer stop as if SIGTERM had arrived. ``trainer.received_sigterm`` is read-only."""
    trainer._signal_connector.received_sigterm = True


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Write ``last.ckpt`` now, unless this step has one. The public hooks save at their own moments only."""
    if not callback._should_skip_saving_checkpoint(trainer):
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


@contextmanager
def before_the_epochs_end(trainer: Trainer) -> Iterator[None]:
    """Set Lightning's counters back, inside the context, to what they were after the epoch's last batch.

    From a checkpoint of those it goes on at the next epoch. From one of an epoch that is counted, but not ended, it
    trains one more batch of that epoch.
    """
    loop = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress

    def move(by: int) -> None:
        batches: Any
        epochs: Any
        for batches, epochs in (
            (progress.total, loop.epoch_progress.total),
            (progress.current, loop.epoch_progress.current),
        ):
            batches.completed += by
            epochs.processed += by
        loop.epoch_loop._batches_that_stepped += by

    move(-1)
    try:
        yield
    finally:
        move(1)


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Set the size of the mesh to the number of processes, which the constructor cannot know."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


class _Instantiator(_InstantiatorFn):
    """Builds the model, and records only the linked arguments that its class takes.

    Lightning records every link among the hyperparameters of a checkpoint, which could not be rebuilt then.
    """

    def __call__(self, class_type: type[Any], *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
        self.cli._dump_config()
        model = {self.key: self.cli.config_dump[self.key]}
        links = {key: value for key, value in applied_instantiation_links.items() if _takes(model, key.split("."))}
        return super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)


def _takes(config: dict[str, Any], path: list[str]) -> bool:
    """Return whether the class at ``… init_args NAME`` in a config has an argument of that name."""
    *parents, init_args, name = path
    node: Any = config
    for key in parents:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    if init_args != "init_args" or not isinstance(node, dict) or "class_path" not in node:
        return False
    module, _, cls = node["class_path"].rpartition(".")
    return name in signature(getattr(import_module(module), cls)).parameters


class ConfiguredCLI(LightningCLI):
    """LightningCLI where YAML and command line win over what a checkpoint remembers."""

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(_Instantiator(self, "model"), LightningModule, subclasses=True)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning lets a checkpoint's hyperparameters win here."""
