"""Denoisers: what a network becomes once it predicts the clean image from any noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule, expand
from dmd_jax.method.types import Denoise, Params

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Denoiser(NamedTuple):
    """A denoiser and what is needed to use it without knowing its network."""

    init: Callable[[jax.Array], Params]  # key -> params
    denoise: Denoise  # (params, x_t [B, *sample_shape], level, cond) -> x0, float32
    sample_shape: tuple[int, ...]  # of one example, (H, W, C) or (D,)
    num_classes: int  # 0: unconditional
    schedule: NoiseSchedule  # the levels that the network was trained with
    # of one example's text embedding, (tokens, width); None where cond is labels or None
    cond_shape: tuple[int, ...] | None = None
    # (params, x_t, level, cond) -> the network's bottleneck [B, ...], float32, without its decoder;
    # None where it has none.
    features: Denoise | None = None
    sigma_data: float | None = None  # of EDM's preconditioning; None where it is another


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
        seen = _seen_by_edm(x_t, variance, level, cond, label_dim)
        return c_skip * x_t + c_out * _checked(apply(params, *seen, **options), x_t)

    return denoise


def edm_features(
    apply: Callable[..., jax.Array], *, sigma_data: float = 0.5, label_dim: int = 0
) -> Denoise:
    """The features of a raw network as `edm_denoiser` asks it.

    Args:
      apply: as for edm_denoiser, but with features [B, ...] as its result.

    Returns:
      features(params, x_t, level, cond) -> float32 [B, ...].
    """

    def features(params: Params, x_t: jax.Array, level: NoiseLevel, cond) -> jax.Array:
        x_t = x_t.astype(jnp.float32)
        variance = expand(level.sigma.astype(jnp.float32), x_t) ** 2 + sigma_data**2
        seen = _seen_by_edm(x_t, variance, level, cond, label_dim)
        return apply(params, *seen).astype(jnp.float32)

    return features


def discrete_denoiser(
    apply: Callable[..., jax.Array], *, prediction_type: str = "epsilon"
) -> Denoise:
    """A network trained on discrete levels, as Stable Diffusion's, made to predict x0.

    With x_t = alpha x0 + sigma noise the network predicts, by `prediction_type`,

    - "epsilon", the noise: x0 = (x_t - sigma raw) / alpha.
    - "v_prediction", v = alpha noise - sigma x0 (arXiv 2202.00512, appendix D), where
      alpha^2 + sigma^2 = 1: x0 = alpha x_t - sigma raw.
    - "sample", x0 itself.

    Args:
      apply: the raw network as apply(params, x_t, time, cond) -> array of x_t's shape and any
        dtype. x_t is float32; time is the level's, [B].
      prediction_type: one of PREDICTION_TYPES.

    Returns:
      denoise(params, x_t, level, cond, **options) -> x0, float32 of x_t's shape. cond and
      `options` go to `apply` as they are.

    Raises:
      UserError: an unknown prediction_type, or (when called) an output of another shape.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"prediction_type is {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}"
        )

    def denoise(params: Params, x_t: jax.Array, level: NoiseLevel, cond, **options) -> jax.Array:
        x_t = x_t.astype(jnp.float32)
        alpha = expand(level.alpha.astype(jnp.float32), x_t)
        sigma = expand(level.sigma.astype(jnp.float32), x_t)
        raw = _checked(apply(params, x_t, level.time, cond, **options), x_t)
        if prediction_type == "epsilon":
            return (x_t - sigma * raw) / alpha
        if prediction_type == "v_prediction":
            return alpha * x_t - sigma * raw
        return raw

    return denoise


def guided(denoise: Denoise, guidance: float, *, at_once: bool = True) -> Denoise:
    """Classifier-free guidance: uncond + guidance (cond - uncond), on x0 (arXiv 2207.12598).

    x0 is affine in the noise and in v, so guiding it guides either.

    Args:
      denoise: the denoiser to ask, with and without the condition.
      guidance: 1 is the condition alone, for which the denoiser is asked once; 0 is without it.
      at_once: asks as one batch of 2B; else twice, which takes half the memory and longer.

    Returns:
      denoise(params, x_t, level, (cond, uncond), **options) -> x0. cond and uncond are equal
      pytrees of arrays [B, ...]; those of uncond may be [1, ...], one for every example.

    Raises:
      UserError: guidance below 0 or not finite.
    """
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance is {guidance}; expected a number of at least 0")

    def denoise_guided(params: Params, x_t: jax.Array, level: NoiseLevel, cond, **options):
        cond, uncond = cond
        if guidance == 1:
            return denoise(params, x_t, level, cond, **options)
        uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), uncond, cond)
        if at_once:
            both = denoise(
                params,
                _interleave(x_t, x_t),
                NoiseLevel(*map(_interleave, level, level)),
                jax.tree.map(_interleave, cond, uncond),
                **options,
            )
            both = both.reshape(x_t.shape[0], 2, *both.shape[1:])
            with_cond, without = both[:, 0], both[:, 1]
        else:
            with_cond, without = jax.lax.map(
                lambda cond: denoise(params, x_t, level, cond, **options),
                jax.tree.map(lambda *each: jnp.stack(each), cond, uncond),
            )
        return without + guidance * (with_cond - without)

    return denoise_guided


def _seen_by_edm(
    x_t: jax.Array, variance: jax.Array, level: NoiseLevel, cond, label_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What a raw network is given: c_in x_t, c_noise, and the labels where it has classes.

    Args:
      variance: sigma^2 + sigma_data^2, [B, 1, ...].
    """
    c_noise = jnp.log(level.sigma.astype(jnp.float32)) / 4
    labels = _one_hot(cond, label_dim, x_t.shape[0]) if label_dim else None
    return 1 / jnp.sqrt(variance) * x_t, c_noise, labels


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """[B, ...] twice -> [2B, ...], an example's two side by side.

    A batch that is split over devices then stays where it is; end to end it would be sent about.
    """
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])


def _checked(raw: jax.Array, x_t: jax.Array) -> jax.Array:
    """The network's output in float32."""
    if raw.shape != x_t.shape:
        raise UserError(f"network output has shape {raw.shape}; expected x_t's, {x_t.shape}")
    return raw.astype(jnp.float32)


def _one_hot(cond, label_dim: int, batch_size: int) -> jax.Array:
    if cond is None:
        return jnp.zeros((batch_size, label_dim), jnp.float32)
    return jax.nn.one_hot(cond, label_dim, dtype=jnp.float32)
