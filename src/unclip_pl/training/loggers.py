"""What loggers are shown beside losses: pictures, and the settings of a run."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

#: Characters that MLflow does not take in the name of a picture.
_FOREIGN = re.compile(r"[^\w\-./ ]")


def takes_pictures(logger: Any) -> bool:
    """Return whether a logger shows pictures: TensorBoard's, MLflow's, any with ``log_image(key, images, step)``."""
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or hasattr(logger, "log_image")


def log_picture(logger: Any, title: str, picture: Tensor, step: int) -> None:
    """Show a picture (3, H, W) in [0, 1] in a logger that takes pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(title, picture, step)
    elif isinstance(logger, MLFlowLogger):
        pixels = picture.mul(255).round().byte().permute(1, 2, 0).numpy()
        logger.experiment.log_image(logger.run_id, pixels, key=_FOREIGN.sub("", title), step=step)
    else:
        logger.log_image(title, [picture], step=step)


def name_the_blind(loggers: Iterable[Any], what: str) -> None:
    """Warn once of the loggers that cannot show pictures, or that there is none."""
    loggers = list(loggers)
    blind = [type(logger).__name__ for logger in loggers if not takes_pictures(logger)]
    if blind or not loggers:
        rank_zero_warn(
            f"{', '.join(dict.fromkeys(blind)) or 'No logger'} cannot show {what}. A TensorBoardLogger, WandbLogger or "
            "MLFlowLogger can."
        )


def log_settings(loggers: Iterable[Any], config: dict[str, Any]) -> None:
    """Give a run's whole config to the loggers that keep settings beside its curves.

    TensorBoard compares the Task's settings, which Lightning gives it, and ``config.yaml`` lies beside its events.
    """
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(config)


def samples_in(batch: Any) -> int:
    """Return the number of samples in a batch, for Lightning's ``ThroughputMonitor``."""
    return len(batch[0])
