"""LightningCLI with our links, our callbacks, and no surprises on resume."""

import signal
import sys
import threading
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, _InstantiatorFn
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint
from unclip_pl.training.callbacks import StepProgressBar
from unclip_pl.training.resume import CheckpointFiles, ExactResume, Signals

#: Arguments that the data determine: (source, target). No config may write them.
LINKS = (
    ("data.embed_dim", "model.init_args.net.init_args.embed_dim"),
    ("data.text_width", "model.init_args.net.init_args.text_width"),
    ("data.context_length", "model.init_args.net.init_args.context_length"),
    ("data.statistics", "model.init_args.statistics"),
    ("data.clip_name", "model.init_args.name"),
)


class UnclipCLI(LightningCLI):
    """``unclip fit|validate|test|predict``: a Task and a DataModule, both named in the config.

    Args:
        model_class: base of what ``model`` may name.
        data_class: base of what ``data`` may name.
        args: words of the command line.
        parser_class: class of the parser, for errors of another form.
        run: False builds everything and runs nothing.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        data_class: type[LightningDataModule],
        args: list[str],
        *,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        run: bool = True,
    ) -> None:
        super().__init__(
            model_class,
            data_class,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # The samplers know their rank; the bar counts the whole fit.
            trainer_defaults={"use_distributed_sampler": False},
            parser_class=parser_class,
            parser_kwargs={"prog": "unclip"},
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Widths and files come from the data: a config that writes them would be a second truth."""
        for source, target in LINKS:
            parser.link_arguments(source, target, apply_on="instantiate")

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(_Instantiator(cli=self, key="model"), LightningModule, subclasses=True)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyperparameters win over YAML and command line; here they lose."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the option to unpickle whatever a checkpoint holds."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With what makes runs exact to resume, and with our bar, unless none is wanted or there is one."""
        own = self._get(self.config_init, "trainer.callbacks") or []
        wanted = self._get(self.config_init, "trainer.enable_progress_bar") is not False
        bar = [StepProgressBar()] if wanted and not any(isinstance(callback, ProgressBar) for callback in own) else []
        self.signals = Signals()
        self.trainer_defaults["callbacks"] = [ExactResume(), self.signals, *bar]
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFiles()]
        trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        only_plain(trainer.strategy)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train; a run that is stopped says what goes on from where.

        Raises:
            SIGTERMException: by SIGTERM, with everything saved.
            KeyboardInterrupt: by Ctrl-C, likewise.
        """
        before = signal.getsignal(signal.SIGTERM)
        try:
            self.trainer.fit(**kwargs)
        except SIGTERMException:
            last = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
            saved = f"{last} goes on from there (--ckpt_path)" if last and Path(last).is_file() else "nothing is saved"
            rank_zero_only(print)(f"stopped at step {self.trainer.global_step}: {saved}.", file=sys.stderr)
            if self.signals.ctrl_c:
                raise KeyboardInterrupt from None
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)


def only_plain(strategy: Strategy) -> None:
    """Lightning's FSDP and DeepSpeed read checkpoints in ways of their own, by pickle: a file has to prove plain first.

    Raises:
        ValueError: by the strategy, on loading anything else.
    """
    kind = type(strategy)
    if kind.load_checkpoint is Strategy.load_checkpoint or not kind.__module__.startswith("lightning."):
        return
    load = strategy.load_checkpoint

    def checked(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            raise InputError(
                f"{checkpoint_path} is a folder of shards, which torch unpickles. Expected one file: save with "
                "trainer.strategy.init_args.state_dict_type full."
            )
        read_checkpoint(checkpoint_path, mmap=True)
        return load(checkpoint_path, *args, **kwargs)

    setattr(strategy, "load_checkpoint", checked)  # noqa: B010 (mypy: a method)


class RunConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml``, and takes it along in checkpoints: a resumed run says what differs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where something is logged or trained: a test without a logger would litter the current folder."""
        if trainer.loggers or stage == TrainerFn.FITTING:
            super().setup(trainer, pl_module, stage)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As plain data."""
        checkpoint["config"] = self._plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Names every setting that is not as it was. What is given now holds."""
        if "config" not in checkpoint or trainer.state.fn != TrainerFn.FITTING:
            return
        before, now = _flat(checkpoint["config"]), _flat(self._plain())
        changed = [key for key in before | now if before.get(key) != now.get(key) and key != "ckpt_path"]
        lines = [f"  {key}: {before.get(key)} -> {now.get(key)}" for key in changed] or ["  nothing"]
        title = f"resuming {trainer.ckpt_path} at step {checkpoint['global_step']}; what differs from its config:"
        rank_zero_only(print)("\n".join([title, *lines]), file=sys.stderr)

    def _plain(self) -> dict[str, Any]:
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    """A tree of dictionaries and lists as one dictionary of dotted paths."""
    if not isinstance(config, dict | list) or not config:
        return {path: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    parts = [_flat(node, f"{path}.{name}" if path else str(name)) for name, node in items]
    return {key: leaf for part in parts for key, leaf in part.items()}


class _Instantiator(_InstantiatorFn):
    """Lightning's, which writes every link into the hyperparameters: here only those that the class takes."""

    def __call__(self, class_type: type[Any], *args: Any, applied_instantiation_links: dict, **kwargs: Any) -> Any:
        self.cli._dump_config()
        model = {self.key: self.cli.config_dump[self.key]}
        links = {key: value for key, value in applied_instantiation_links.items() if _takes(model, key.split("."))}
        return super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)


def _takes(config: dict[str, Any], path: list[str]) -> bool:
    """Whether the class that owns the last key of ``… init_args NAME`` has an argument of that name."""
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


def build(args: list[str]) -> Any:
    """Trainer, model and data of a config, unrun: what tests and notebooks take apart."""
    return UnclipCLI(LightningModule, LightningDataModule, args, run=False)
