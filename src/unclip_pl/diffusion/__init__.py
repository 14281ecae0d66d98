"""Gaussian diffusion: schedules, parameterisations, objectives and solvers; nothing here knows what is diffused."""

from unclip_pl.diffusion.analytic import PosteriorMSE
from unclip_pl.diffusion.guidance import (
    autoguided,
    check_guidance,
    check_interval,
    clip_x0,
    guided,
    in_interval,
    within,
)
from unclip_pl.diffusion.inpainting import Inpaint
from unclip_pl.diffusion.inversion import Inversion
from unclip_pl.diffusion.loss import hybrid_loss, simple_loss, variational_bound
from unclip_pl.diffusion.process import (
    Denoise,
    Denoised,
    GaussianDiffusion,
    LogitNormalTime,
    PowerTime,
    TimeDensity,
    UniformTime,
    noise_like,
    same_levels,
)
from unclip_pl.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    Posterior,
    Schedule,
    StraightPath,
    VariancePreserving,
)
from unclip_pl.diffusion.solvers import DDIM, Ancestral, DPMSolver, Heun, Progress, Sampler, check_eta, time_grid

__all__ = [
    "DDIM",
    "Ancestral",
    "CosineSchedule",
    "DPMSolver",
    "Denoise",
    "Denoised",
    "GaussianDiffusion",
    "Heun",
    "Inpaint",
    "Inversion",
    "LinearSchedule",
    "LogitNormalTime",
    "Posterior",
    "PosteriorMSE",
    "PowerTime",
    "Progress",
    "Sampler",
    "Schedule",
    "StraightPath",
    "TimeDensity",
    "UniformTime",
    "VariancePreserving",
    "autoguided",
    "check_eta",
    "check_guidance",
    "check_interval",
    "clip_x0",
    "guided",
    "hybrid_loss",
    "in_interval",
    "noise_like",
    "same_levels",
    "simple_loss",
    "time_grid",
    "variational_bound",
    "within",
]
