"""Noise schedules: the discrete levels (alpha_t, sigma_t) that a diffusion model is trained on.

The forward diffusion is x_t = alpha_t x0 + sigma_t noise everywhere in the project.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError


class NoiseLevel(NamedTuple):
    """The noise level of each example of a batch; three float arrays of one shape, usually [B].

    alpha: factor on the clean image. sigma: standard deviation of the added noise.
    time: what the network is told of the level (EDM: ln(sigma)/4; Stable Diffusion: 0..999).
    """

    alpha: jax.Array
    sigma: jax.Array
    time: jax.Array


def edm_level(sigma) -> NoiseLevel:
    """The EDM level (alpha = 1) of any sigma > 0, on or off a schedule's grid."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return NoiseLevel(jnp.ones_like(sigma), sigma, 0.25 * jnp.log(sigma))


def expand(value: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes a per-example value [B] to [B, 1, ..., 1] so that it broadcasts against `like`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def forward_diffusion(x0: jax.Array, noise: jax.Array, level: NoiseLevel) -> jax.Array:
    """x_t = alpha x0 + sigma noise.

    Args:
      x0, noise: [B, ...] of one shape.
      level: per-example level, arrays of shape [B].

    Returns:
      x_t, of x0's shape. Source: arXiv 2311.18828, section 3.2.
    """
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise


def score(x_t: jax.Array, denoised: jax.Array, level: NoiseLevel) -> jax.Array:
    """The score of the diffused distribution from a denoiser's prediction of the clean image.

    s(x_t, t) = -(x_t - alpha_t mu(x_t, t)) / sigma_t^2 (arXiv 2311.18828, Eq. 3 and 4).

    Args:
      x_t, denoised: [B, ...] of one shape. level: arrays of shape [B].
    """
    return -(x_t - expand(level.alpha, x_t) * denoised) / jnp.square(expand(level.sigma, x_t))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("alphas", "sigmas", "times"),
    meta_fields=("prior_scale",),
)
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """T noise levels, index 0 the least noise.

    The generator is the denoiser held at the last level; its input is `prior_scale * z` for
    z ~ N(0, I).
    """

    alphas: jax.Array  # [T]
    sigmas: jax.Array  # [T]
    times: jax.Array  # [T]
    prior_scale: float = 1.0

    @classmethod
    def edm(
        cls,
        num_levels: int = 1000,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> NoiseSchedule:
        """EDM: alpha = 1, Karras sigmas from sigma_min to exactly sigma_max (arXiv 2206.00364).

        The bins are those of the authors' code, whose float32 arithmetic is up to 2e-6 off the
        formula in `karras_sigmas`: their ramp and its affine image are rounded to float32 here too.
        """
        index = np.arange(num_levels, dtype=np.float64)
        step = float(np.float32(1.0 / (num_levels - 1)))
        from_the_end = np.float32(1.0 - step * (num_levels - 1 - index))
        ramp = np.where(index < num_levels / 2, np.float32(step * index), from_the_end)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        roots = np.float32(high) + ramp.astype(np.float32) * np.float32(low - high)
        sigmas = roots.astype(np.float64)[::-1] ** rho
        # The generator runs at exactly sigma_max, from which the rounded power is off.
        sigmas[0], sigmas[-1] = sigma_min, sigma_max
        return cls(*edm_level(sigmas), prior_scale=sigma_max)

    @classmethod
    def scaled_linear(
        cls, num_levels: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Stable Diffusion: beta linear in its square root, alpha = sqrt(prod(1 - beta)).

        Source: arXiv 2112.10752 as released; equal to diffusers' "scaled_linear".
        """
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_levels, dtype=np.float64) ** 2
        alpha_bars = np.cumprod(1.0 - betas)
        return cls(
            alphas=jnp.asarray(np.sqrt(alpha_bars), jnp.float32),
            sigmas=jnp.asarray(np.sqrt(1.0 - alpha_bars), jnp.float32),
            times=jnp.arange(num_levels, dtype=jnp.float32),
            prior_scale=1.0,
        )

    @property
    def num_levels(self) -> int:
        return self.sigmas.shape[0]

    def level(self, index: jax.Array) -> NoiseLevel:
        """The levels at integer `index` (any shape), each field of the index's shape."""
        return NoiseLevel(self.alphas[index], self.sigmas[index], self.times[index])

    def generator_level(self, batch_size: int) -> NoiseLevel:
        """The constant last level that a one-step generator is held at, arrays [batch_size]."""
        return self.level(jnp.full((batch_size,), self.num_levels - 1))


def few_step_indices(num_levels: int, num_steps: int) -> tuple[int, ...]:
    """The levels of a generator of several steps, most noise first: 999, 749, 499, 249 for four.

    They count down from the last of T levels by T / num_steps (arXiv 2405.14867, section 4.4).

    Raises:
      UserError: num_steps does not divide num_levels.
    """
    if num_steps < 1 or num_levels % num_steps:
        raise UserError(
            f"{num_steps} steps of a generator; expected a number of at least 1 that divides the "
            f"schedule's {num_levels} levels"
        )
    return tuple(range(num_levels - 1, -1, -(num_levels // num_steps)))


def karras_sigmas(
    num_levels: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Karras' sigmas from sigma_max down to sigma_min, float64 [num_levels] (2206.00364, Eq. 5)."""
    ramp = np.linspace(0.0, 1.0, num_levels)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho
