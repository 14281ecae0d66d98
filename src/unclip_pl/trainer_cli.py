"""LightningCLI with our links, our callbacks, and no surprises on resume."""

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn

from unclip_pl.callbacks import StepProgressBar
from unclip_pl.cli import LINKS


class UnclipCLI(LightningCLI):
    """``unclip fit|validate|test|predict``: a Task and a DataModule, both named in the config.

    Args:
        model_class: base of what ``model`` may name.
        data_class: base of what ``data`` may name.
        args: words of the command line.
        run: False builds everything and runs nothing.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        data_class: type[LightningDataModule],
        args: list[str],
        *,
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With our bar, unless none is wanted or the config brings its own."""
        own = self._get(self.config_init, "trainer.callbacks") or []
        wanted = self._get(self.config_init, "trainer.enable_progress_bar") is not False
        if wanted and not any(isinstance(callback, ProgressBar) for callback in own):
            self.trainer_defaults["callbacks"] = [StepProgressBar()]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Leave ``last.ckpt`` at the last step, whatever the checkpoint interval."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                self.trainer.save_checkpoint(Path(callback.dirpath) / "last.ckpt")
                return


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
