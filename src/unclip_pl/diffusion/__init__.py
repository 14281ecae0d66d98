"""Gaussian diffusion: schedules, parameterisations, objectives and samplers; nothing here knows what is diffused."""

from unclip_pl.diffusion.analytic import PosteriorMSE
from unclip_pl.diffusion.inversion import Inversion, check_eta
from unclip_pl.diffusion.loss import hybrid_loss, simple_loss, variational_bound
from unclip_pl.diffusion.process import (
    Denoised,
    GaussianDiffusion,
    PowerTime,
    TimeDensity,
    UniformTime,
    noise_like,
)
from unclip_pl.diffusion.sampling import (
    DDIM,
    Ancestral,
    Denoise,
    Sampler,
    check_guidance,
    clip_x0,
    dynamic_threshold,
    guided,
    time_grid,
)
from unclip_pl.diffusion.schedule import CosineSchedule, LinearSchedule, Posterior, Schedule

__all__ = [
    "DDIM",
    "Ancestral",
    "CosineSchedule",
    "Denoise",
    "Denoised",
    "GaussianDiffusion",
    "Inversion",
    "LinearSchedule",
    "Posterior",
    "PosteriorMSE",
    "PowerTime",
    "Sampler",
    "Schedule",
    "TimeDensity",
    "UniformTime",
    "check_eta",
    "check_guidance",
    "clip_x0",
    "dynamic_threshold",
    "guided",
    "hybrid_loss",
    "noise_like",
    "simple_loss",
    "time_grid",
    "variational_bound",
]
