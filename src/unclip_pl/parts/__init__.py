"""Parts of unCLIP, one class each: a network with its conditions, embedding space and null text; drawing takes no more.

A Task (:mod:`unclip_pl.tasks`) is a part with its loss, its batch and its optimizer.
"""

from unclip_pl.parts.ar_prior import ARPriorPart, MixturePriorPart
from unclip_pl.parts.base import EmbeddingPart, Optimization, Part, TrainingRecord, count_parameters
from unclip_pl.parts.decoder import DecoderPart
from unclip_pl.parts.loading import load_part
from unclip_pl.parts.prior import DiffusionPriorPart
from unclip_pl.parts.regression import RegressionPriorPart
from unclip_pl.parts.upsampler import UpsamplerPart

__all__ = [
    "ARPriorPart",
    "DecoderPart",
    "DiffusionPriorPart",
    "EmbeddingPart",
    "MixturePriorPart",
    "Optimization",
    "Part",
    "RegressionPriorPart",
    "TrainingRecord",
    "UpsamplerPart",
    "count_parameters",
    "load_part",
]
