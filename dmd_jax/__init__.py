"""Distribution Matching Distillation in JAX: the parts for people who bring their own networks.

A denoiser is any function `denoise(params, x_t, level, cond) -> x0`. Source: arXiv 2311.18828.
"""

from dmd_jax.discrete_samplers import ddim, dpm_solver_pp, pndm, unipc
from dmd_jax.losses import (
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    edm_weight,
    regression_loss,
    snr_weight,
)
from dmd_jax.models.denoisers import discrete_denoiser, edm_denoiser, guided
from dmd_jax.objectives import Draws, draw, fake_score_loss, generator_loss, one_architecture
from dmd_jax.samplers import euler, heun, one_step
from dmd_jax.schedules import NoiseLevel, NoiseSchedule, forward_diffusion, score

__all__ = [
    "Draws",
    "NoiseLevel",
    "NoiseSchedule",
    "ddim",
    "denoising_loss",
    "discrete_denoiser",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "dpm_solver_pp",
    "draw",
    "edm_denoiser",
    "edm_weight",
    "euler",
    "fake_score_loss",
    "forward_diffusion",
    "generator_loss",
    "guided",
    "heun",
    "one_architecture",
    "one_step",
    "pndm",
    "regression_loss",
    "score",
    "snr_weight",
    "unipc",
]
