"""Tasks, one for each part of unCLIP (:mod:`unclip_pl.parts`): the part with its loss, its batch and its optimizer."""

from unclip_pl.parts.base import Optimization
from unclip_pl.tasks.ar_prior import ARPriorTask, MixturePriorTask
from unclip_pl.tasks.base import EmbeddingTask, Task
from unclip_pl.tasks.clip import ClipTask
from unclip_pl.tasks.decoder import DecoderTask
from unclip_pl.tasks.prior import DiffusionPriorTask
from unclip_pl.tasks.regression import RegressionPriorTask
from unclip_pl.tasks.upsampler import UpsamplerTask

__all__ = [
    "ARPriorTask",
    "ClipTask",
    "DecoderTask",
    "DiffusionPriorTask",
    "EmbeddingTask",
    "MixturePriorTask",
    "Optimization",
    "RegressionPriorTask",
    "Task",
    "UpsamplerTask",
]
