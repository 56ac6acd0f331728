"""Denoisers: what a network becomes once it predicts the clean image from any noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.schedules import NoiseLevel, expand
from dmd_jax.types import Denoise, Params


class Denoiser(NamedTuple):
    """A denoiser and what is needed to use it without knowing its network."""

    init: Callable[[jax.Array], Params]  # key -> params
    denoise: Denoise  # (params, x_t [B, *sample_shape], level, cond) -> x0, float32
    sample_shape: tuple[int, ...]  # of one example, (H, W, C) or (D,)
    num_classes: int  # 0: unconditional


def edm_denoiser(
    apply: Callable[..., jax.Array], *, sigma_data: float = 0.5, label_dim: int = 0
) -> Denoise:
    """EDM's preconditioning around a raw network (arXiv 2206.00364, Eq. 7 and Table 1).

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), in float32 around an F of any dtype.

    Args:
      apply: F as apply(params, x, c_noise, labels) -> array of x's shape. x is float32 like
        x_t; c_noise is [B]; labels are one-hot float32 [B, label_dim], or None where label_dim
        is 0.
      sigma_data: standard deviation of the data.
      label_dim: number of classes; 0 is unconditional.

    Returns:
      denoise(params, x_t, level, cond, **options) -> x0, float32 of x_t's shape. The level's
      alpha is 1 (EDM's schedule). cond: integer labels [B]; None is the zero label vector;
      ignored where label_dim is 0. `options` go to `apply` as they are.
    """

    def denoise(params: Params, x_t: jax.Array, level: NoiseLevel, cond, **options) -> jax.Array:
        x_t = x_t.astype(jnp.float32)
        sigma = expand(level.sigma.astype(jnp.float32), x_t)
        variance = sigma**2 + sigma_data**2
        c_skip = sigma_data**2 / variance
        c_out = sigma * sigma_data / jnp.sqrt(variance)
        c_in = 1 / jnp.sqrt(variance)
        c_noise = jnp.log(level.sigma.astype(jnp.float32)) / 4

        labels = _one_hot(cond, label_dim, x_t.shape[0]) if label_dim else None
        raw = apply(params, c_in * x_t, c_noise, labels, **options)
        if raw.shape != x_t.shape:
            raise UserError(f"network output has shape {raw.shape}; expected x_t's, {x_t.shape}")
        return c_skip * x_t + c_out * raw.astype(jnp.float32)

    return denoise


def _one_hot(cond, label_dim: int, batch_size: int) -> jax.Array:
    if cond is None:
        return jnp.zeros((batch_size, label_dim), jnp.float32)
    return jax.nn.one_hot(cond, label_dim, dtype=jnp.float32)
