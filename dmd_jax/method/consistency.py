"""Consistency models and progressive distillation: functions of a denoiser on EDM's schedule.

The targets of `losses.consistency_loss`. Levels have alpha = 1. Sources: arXiv 2303.01469 and
2202.00512.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dmd_jax.method.schedules import NoiseLevel, edm_level, expand
from dmd_jax.method.types import Denoise, Params


def consistency_function(
    denoise: Denoise, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Denoise:
    """A denoiser with the boundary that f(x, sigma_min) = x (arXiv 2303.01469, appendix C).

    EDM's D = c_skip x + c_out F becomes f = c_skip' x + c_out' F of the same F, where

        c_skip' = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
        c_out'  = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2).

    Args:
      denoise: (params, x_t, level, cond) -> x0, preconditioned as EDM's with this sigma_data.

    Returns:
      f of the same arguments.
    """

    def consistent(params: Params, x_t: jax.Array, level: NoiseLevel, cond) -> jax.Array:
        denoised, sigma = denoise(params, x_t, level, cond), expand(level.sigma, x_t)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        boundary = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
        # c_out' / c_out is (sigma - sigma_min) / sigma, so F itself is never divided out.
        return boundary * x_t + (sigma - sigma_min) / sigma * (denoised - c_skip * x_t)

    return consistent


def karras_level(
    position: jax.Array, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseLevel:
    """The level at a position along Karras' curve: 0 is sigma_max, 1 sigma_min; arrays [B]."""
    position = jnp.asarray(position, jnp.float32)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return edm_level((high + position * (low - high)) ** rho)


def euler_step(x: jax.Array, denoised: jax.Array, level: NoiseLevel, end: NoiseLevel) -> jax.Array:
    """One Euler step of the probability-flow ODE from `level` to `end`.

    Args:
      denoised: the clean image as seen from x; the data point itself in consistency training.
    """
    sigma, length = expand(level.sigma, x), expand(end.sigma - level.sigma, x)
    return x + length * (x - denoised) / sigma


def heun_step(
    denoise: Denoise, params: Params, x: jax.Array, level: NoiseLevel, end: NoiseLevel, cond
) -> jax.Array:
    """One Heun step of the probability-flow ODE from `level` to `end`, two evaluations."""
    sigma, last = expand(level.sigma, x), expand(end.sigma, x)
    slope = (x - denoise(params, x, level, cond)) / sigma
    guess = x + (last - sigma) * slope
    corrected = (guess - denoise(params, guess, end, cond)) / last
    return x + (last - sigma) * (slope + corrected) / 2


def two_step_target(
    denoise: Denoise,
    params: Params,
    x: jax.Array,
    level: NoiseLevel,
    middle: NoiseLevel,
    end: NoiseLevel,
    cond,
) -> jax.Array:
    """The clean image by which one Euler step from `level` to `end` is the teacher's two.

    Progressive distillation's target (arXiv 2202.00512, Algorithm 2) for Euler steps, which on
    alpha = 1 are DDIM's.
    """
    halfway = euler_step(x, denoise(params, x, level, cond), level, middle)
    reached = euler_step(halfway, denoise(params, halfway, middle, cond), middle, end)
    sigma, length = expand(level.sigma, x), expand(end.sigma - level.sigma, x)
    return x - sigma * (reached - x) / length
