"""LightningCLI with arguments linked to the data, with our callbacks, and with exact resume."""

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from unclip_pl.errors import InputError
from unclip_pl.files import read_checkpoint, write_json
from unclip_pl.nn.kernels import fast_bfloat16
from unclip_pl.origin import COMMAND, commit
from unclip_pl.settings import expanded, read_yaml
from unclip_pl.tasks import Task
from unclip_pl.training.callbacks import FiniteLoss, StepProgressBar, TimeLimit
from unclip_pl.training.loggers import log_settings
from unclip_pl.training.private import ConfiguredCLI
from unclip_pl.training.resume import BEST, LAST, CheckpointFiles, ExactResume, Signals

#: Arguments that the data determine: (source, target). No config may write them.
LINKS = (
    ("data.embed_dim", "model.init_args.net.init_args.embed_dim"),
    ("data.text_embed_dim", "model.init_args.net.init_args.text_embed_dim"),
    ("data.text_width", "model.init_args.net.init_args.text_width"),
    ("data.context_length", "model.init_args.net.init_args.context_length"),
    ("data.statistics", "model.init_args.statistics"),
    ("data.clip_name", "model.init_args.name"),
)


class UnclipCLI(ConfiguredCLI):
    """``unclip fit|validate|test|predict``: a Task and a DataModule, both named in the config.

    Args:
        model_class: base of the classes that ``model`` may name.
        data_class: base of the classes that ``data`` may name.
        args: words of the command line.
        parser_class: class of the parser, which decides the form of its errors.
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
        self.words = args
        super().__init__(
            model_class,
            data_class,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},  # our samplers know their rank
            parser_class=parser_class,
            parser_kwargs={"prog": "unclip"},
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True, "words": args},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take widths and files from the data: a config that wrote them could contradict the data."""
        for source, target in LINKS:
            parser.link_arguments(source, target, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and replace ``~`` in every path."""
        super().parse_arguments(parser, args)
        self.config = expanded(self.config)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # asked on instances alone
        """Return Lightning's subcommand of this line, without the option to unpickle a checkpoint.

        The parsers of the other three would take half of the time, and read nothing.
        """
        every = LightningCLI.subcommands().items()
        return {name: skipped | {"weights_only"} for name, skipped in every if name in self.words[:1]}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what makes runs exact to resume, and our progress bar unless the config has one or wants none.

        Raises:
            InputError: the Trainer refuses its settings.
        """
        settings = (self.config_init[self.subcommand] if self.subcommand else self.config_init).trainer
        own = settings.callbacks or []
        refuse_tools(settings.barebones, own)
        refuse_half_weights(str(settings.precision))
        bar = settings.enable_progress_bar is not False and not any(isinstance(one, ProgressBar) for one in own)
        self.signals = Signals()
        added = [ExactResume(), self.signals, FiniteLoss(), *([StepProgressBar()] if bar else [])]
        limit = [TimeLimit(settings.max_time, "step", verbose=False)] if settings.max_time else []
        self.trainer_defaults["callbacks"] = added + limit
        plugins = settings.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFiles()]
        try:
            trainer: Any = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"Expected settings that Lightning's Trainer takes. Correct them: {error}") from error
        only_plain(trainer.strategy)
        if 0 < trainer.overfit_batches < 1:
            trainer.limit_val_batches = 1.0  # such a share of a small split may be less than one batch
        return trainer

    def _find_checkpoint(self) -> None:
        """Let ``--ckpt_path best`` or ``last`` name the file, also of another command: in this logger's newest version.

        A fit that finds no ``last`` begins, as the first start of a job that is requeued does.

        Raises:
            InputError: there is none.
        """
        config = self.config_init[self.subcommand]
        file = {"best": BEST, "last": LAST}.get(str(config.ckpt_path))
        if file is None:
            return
        folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
        if folder is None and self.trainer.log_dir:
            folder = Path(self.trainer.log_dir) / "checkpoints"
        found = [] if folder is None else [Path(folder) / file, *Path(folder).parent.parent.glob(f"version_*/*/{file}")]
        found = [path for path in found if path.is_file()]
        if not found and file == LAST and self.subcommand == "fit":
            rank_zero_only(print)(f"no {LAST} in {folder}: training begins.", file=sys.stderr)
            config.ckpt_path = None
            return
        if not found:
            how = "train with `monitor` in StepCheckpoint" if file == BEST else "train first"
            raise InputError(
                f"Expected {file} of an earlier fit in {folder}. Got no such file: give --ckpt_path FILE, or {how}."
            )
        config.ckpt_path = str(max(found, key=lambda path: path.stat().st_mtime))

    def before_fit(self) -> None:
        """Find the checkpoint, and name what will cost time or has no effect: slow products, dropped callbacks."""
        self._find_checkpoint()
        device, precision = self.trainer.strategy.root_device.type, str(self.trainer.precision)
        if device == "cpu" and precision.startswith("bf16") and not fast_bfloat16(device):
            _warn(
                "this processor has no fast products in bfloat16, and a step in them can take many times as long as in "
                "float32. Give --trainer.precision 32-true."
            )
        kept = {_class_name(one) for one in self.config[self.subcommand].trainer.callbacks or []}
        dropped = [name for name in dict.fromkeys(callbacks_in(self.words)) if name not in kept]
        if dropped:
            _warn(
                f"{' and '.join(dropped)} will not run, since a later `callbacks:` replaces the list. Write "
                "`callbacks+:` (on the command line `--trainer.callbacks+=…`) to add to it."
            )

    def before_validate(self) -> None:
        """Find the checkpoint, or say that weights are random, where nothing was loaded."""
        self._find_checkpoint()
        config = self.config[self.subcommand]
        if isinstance(self.model, Task) and not config.ckpt_path:
            _warn("these are the scores of untrained, random weights. Give a checkpoint as --ckpt_path FILE.")

    before_test = before_predict = before_validate

    def fit(self, **kwargs: Any) -> None:
        """Train. A run that is stopped early prints why, and the checkpoint to go on from.

        Raises:
            SIGTERMException: SIGTERM arrived; everything is saved.
            KeyboardInterrupt: Ctrl-C arrived; everything is saved.
        """
        before = signal.getsignal(signal.SIGTERM)
        try:
            self.trainer.fit(**kwargs)
            if why := early_end(self.trainer):
                self._say_stopped(why)
            elif not self.trainer.callback_metrics:
                self._say_stopped(f"nothing left to train at step {self.trainer.global_step:,}, see trainer.max_steps")
        except SIGTERMException:
            self._say_stopped(f"stopped at step {self.trainer.global_step}")
            if self.signals.ctrl_c:
                raise KeyboardInterrupt from None
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def _say_stopped(self, why: str) -> None:
        last = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        saved = f"{last} goes on from there (--ckpt_path)" if last and Path(last).is_file() else "nothing is saved"
        rank_zero_only(print)(f"{why}: {saved}.", file=sys.stderr)


def _warn(text: str) -> None:
    rank_zero_only(print)(f"warning: {text}", file=sys.stderr)


def early_end(trainer: Any) -> str:
    """Return what ended a fit before its last step or epoch, and where; empty where nothing did."""
    if trainer.fast_dev_run or 0 <= trainer.max_steps <= trainer.global_step:
        return ""
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return ""
    why = "stopped"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (callback.time_remaining() or 0.0) < 0:
            why = f"stopped by max_time (time limit) after {timedelta(seconds=round(callback.time_elapsed()))}"
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
            why = f"stopped by EarlyStopping on {callback.monitor}"
    return f"{why}, step {trainer.global_step:,}" + (f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else "")


def callbacks_in(words: list[str]) -> Iterator[str]:
    """Yield the class names of the callbacks in the config files of a command line."""
    for before, word in pairwise(["", *words]):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if option not in ("--config", "--trainer") or not Path(value).is_file():
            continue
        content = read_yaml(Path(value))
        settings = content.get("trainer") if option == "--config" else content
        for key in ("callbacks", "callbacks+"):
            named = (settings or {}).get(key) or []
            yield from map(_class_name, named if isinstance(named, list) else [named])


def _class_name(callback: Any) -> str:
    return str(callback if isinstance(callback, str) else callback["class_path"]).rpartition(".")[2]


#: Tools of Lightning that change what our tasks and data do not have, and what to do instead.
TOOLS = {
    "LearningRateFinder": "try some values of model.init_args.optimization.lr in short fits",
    "BatchSizeFinder": "try some values of data.init_args.batch_size with --trainer.max_steps 20",
}


def refuse_tools(barebones: bool, callbacks: list[Any]) -> None:
    """Refuse what Lightning would fail at later.

    Raises:
        InputError: there is such a tool among the callbacks, or ``barebones`` is on.
    """
    for name in {type(callback).__name__ for callback in callbacks} & TOOLS.keys():
        raise InputError(f"Expected callbacks that work with our tasks. Got {name}: leave it out, and {TOOLS[name]}.")
    if barebones:
        raise InputError(
            "Expected trainer.barebones false, since a fit logs and saves. Got true: add "
            "unclip_pl.training.profile.StageProfile to the callbacks to measure speed."
        )


def refuse_half_weights(precision: str) -> None:
    """Refuse weights in half precision.

    Lightning makes everything half then: a thousand training times become 184 to 500, and statistics and quantiles of
    embeddings lose what tells neighbours apart.

    Raises:
        InputError: the precision is such a one.
    """
    if precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise InputError(
            f"Expected a trainer.precision that keeps weights, times and statistics in float32. Got {precision}: use "
            "bf16-mixed, which multiplies as fast."
        )


def only_plain(strategy: Strategy) -> None:
    """Make a strategy of Lightning's that reads checkpoints by pickle check first that a file holds plain data only.

    FSDP and DeepSpeed are such strategies. Loading anything else raises an ``InputError``.
    """
    kind = type(strategy)
    if kind.load_checkpoint is Strategy.load_checkpoint or not kind.__module__.startswith("lightning."):
        return
    load = strategy.load_checkpoint

    def checked(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            raise InputError(
                f"Expected a checkpoint in one file. Got {checkpoint_path}, a folder of shards, which torch would "
                "unpickle. Save with trainer.strategy.init_args.state_dict_type full."
            )
        read_checkpoint(checkpoint_path, mmap=True)
        return load(checkpoint_path, *args, **kwargs)

    setattr(strategy, "load_checkpoint", checked)  # noqa: B010 (mypy: a method)


class RunConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` and ``command.json``, and stores the config in checkpoints.

    A resumed run can then say what differs, and ``unclip runs`` what made a run.

    Args:
        *args: parser and config, see Lightning's class.
        words: command line.
        **kwargs: further options of Lightning's class.
    """

    def __init__(self, *args: Any, words: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.words = words
        self._folder: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write where something is logged or trained: a test without a logger would litter the current folder."""
        if trainer.loggers or stage == TrainerFn.FITTING:
            self._folder = trainer.log_dir  # asks every rank, and one rank alone saves
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it to the loggers, too, and note the command."""
        log_settings(trainer.loggers, self._plain())
        if self._folder:
            told = {"command": shlex.join(["unclip", *self.words]), "commit": commit()}
            write_json(Path(self._folder) / COMMAND, told, indent=2)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the config as plain data."""
        checkpoint["config"] = self._plain()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Print every setting that differs from the checkpoint's. The present setting holds."""
        if "config" not in checkpoint or trainer.state.fn != TrainerFn.FITTING:
            return
        before, now = _flat(checkpoint["config"]), _flat(self._plain())
        changed = [key for key in before | now if before.get(key) != now.get(key) and key != "ckpt_path"]
        lines = [f"  {key}: {before.get(key)} -> {now.get(key)}" for key in changed] or ["  nothing"]
        title = f"resuming {trainer.ckpt_path} at step {checkpoint['global_step']}; what differs from its config:"
        rank_zero_only(print)("\n".join([title, *lines]), file=sys.stderr)

    def _plain(self) -> dict[str, Any]:
        return yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    """Return a tree of dictionaries and lists as one dictionary with dotted paths as keys."""
    if not isinstance(config, dict | list) or not config:
        return {path: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    parts = [_flat(node, f"{path}.{name}" if path else str(name)) for name, node in items]
    return {key: leaf for part in parts for key, leaf in part.items()}


def build(args: list[str]) -> UnclipCLI:
    """Return the trainer, model and data of a config, without running them: tests and notebooks take them apart."""
    return UnclipCLI(LightningModule, LightningDataModule, args, run=False)
