"""The losses of Distribution Matching Distillation as pure functions of arrays.

No parameters, no randomness, no configuration: they work under jit, grad, vmap and shard_map.
Everything is computed in float32, whatever the inputs' type. Source: arXiv 2311.18828.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmd_jax.method.schedules import NoiseLevel, expand

WEIGHTINGS = ("normalized", "sigma_over_alpha", "sigma3_over_alpha")


def distribution_matching_gradient(
    x: jax.Array,
    denoised_real: jax.Array,
    denoised_fake: jax.Array,
    *,
    level: NoiseLevel,
    weighting: str = "normalized",
    alpha_factor: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of KL(fake || real) on the generator's samples, Eq. 7 as denoisers' difference.

    In terms of scores it is w_t alpha_t (s_fake - s_real). The weightings w_t are

    - "normalized", Eq. 8: (mu_fake - mu_real) / mean|mu_real - x|, the mean over each sample's
      elements. This is Algorithm 2; the equation itself has a factor alpha_t, which
      `alpha_factor=True` adds (for EDM alpha_t = 1 and the two agree).
    - "sigma_over_alpha", w_t = sigma_t / alpha_t: (alpha_t / sigma_t)(mu_fake - mu_real).
    - "sigma3_over_alpha", w_t = sigma_t^3 / alpha_t: alpha_t sigma_t (mu_fake - mu_real).

    Descending it moves x from where the fake distribution is denser to where the real one is. No
    gradient flows through the result.

    Args:
      x: generator samples [B, ...].
      denoised_real, denoised_fake: predictions of the clean image from the same x_t, of x's shape.
      level: the level that x was diffused to, arrays of shape [B].
      weighting: one of WEIGHTINGS.
      alpha_factor: multiply by alpha_t as Eq. 8 does; for "normalized" only.

    Returns:
      (gradient, nonfinite): gradient float32 of x's shape, with zeros where it was not finite;
      nonfinite int32 [B], how many elements of each sample were zeroed so.

    Raises:
      ValueError: shapes differ, or the weighting is unknown.
    """
    _check_shapes(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    x, denoised_real, denoised_fake = map(_float32, (x, denoised_real, denoised_fake))
    alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
    difference = denoised_fake - denoised_real
    if weighting == "normalized":
        distance = jnp.abs(denoised_real - x).mean(axis=_sample_axes(x), keepdims=True)
        gradient = difference / distance * (alpha if alpha_factor else 1.0)
    elif weighting == "sigma_over_alpha":
        gradient = alpha / sigma * difference
    elif weighting == "sigma3_over_alpha":
        gradient = alpha * sigma * difference
    else:
        raise ValueError(f"weighting is {weighting!r}; expected one of {', '.join(WEIGHTINGS)}")
    finite = jnp.isfinite(gradient)
    nonfinite = jnp.sum(~finite, axis=_sample_axes(x), dtype=jnp.int32)
    return jax.lax.stop_gradient(jnp.where(finite, gradient, 0.0)), nonfinite


def distribution_matching_loss(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The scalar whose derivative on x is gradient / x.size: 0.5 mean((x - sg(x - gradient))^2).

    The mean over all elements is part of the method: the regression weight is calibrated against
    it. Its value, 0.5 mean(gradient^2), measures nothing about the samples' quality.

    Args:
      x: generator samples [B, ...]; the loss differentiates on them alone.
      gradient: of x's shape, from `distribution_matching_gradient`.

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes(x=x, gradient=gradient)
    x = _float32(x)
    # x - sg(x - gradient), without the rounding of adding a small gradient to x and taking x away.
    residual = (x - jax.lax.stop_gradient(x)) + jax.lax.stop_gradient(_float32(gradient))
    return 0.5 * jnp.mean(jnp.square(residual))


def denoising_loss(denoised: jax.Array, x0: jax.Array, *, weight: jax.Array) -> jax.Array:
    """weight * mean((denoised - sg(x0))^2) of each example: Eq. 6, the fake score's loss.

    Args:
      denoised: prediction of the clean image [B, ...]. x0: the clean image, of that shape.
      weight: [B], `edm_weight` or `snr_weight` of the level.

    Returns:
      float32 [B]; the method takes its mean. Its minimiser over functions is E[x0 | x_t].

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes(denoised=denoised, x0=x0)
    error = _float32(denoised) - jax.lax.stop_gradient(_float32(x0))
    return weight * jnp.mean(jnp.square(error), axis=_sample_axes(error))


def edm_weight(level: NoiseLevel, *, sigma_data: float = 0.5) -> jax.Array:
    """1/sigma^2 + 1/sigma_data^2, EDM's weight of the denoising loss (arXiv 2206.00364), [B]."""
    return 1.0 / jnp.square(level.sigma) + 1.0 / sigma_data**2


def snr_weight(level: NoiseLevel) -> jax.Array:
    """alpha^2/sigma^2, with which the denoising loss is the noise prediction's plain MSE, [B]."""
    return jnp.square(level.alpha / level.sigma)


def regression_loss(
    x: jax.Array,
    y: jax.Array,
    *,
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The distance of each generator sample to the teacher's image of the same noise (Eq. 9).

    Args:
      x: G(z_ref) [B, ...]. y: y_ref, of that shape.
      distance: (x, y) -> [B], such as LPIPS; the mean squared error if None.

    Returns:
      float32 [B]; the method takes its mean.

    Raises:
      ValueError: shapes differ, or the distance does not return one number an example.
    """
    _check_shapes(x=x, y=y)
    x, y = _float32(x), _float32(y)
    if distance is None:
        return jnp.mean(jnp.square(x - y), axis=_sample_axes(x))
    result = distance(x, y)
    if result.shape != x.shape[:1]:
        raise ValueError(f"distance returned shape {result.shape}; expected {x.shape[:1]}")
    return result


def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _sample_axes(array: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _check_shapes(**arrays: jax.Array) -> None:
    """Broadcasting would hide a wrong shape, so all must be equal."""
    if len({array.shape for array in arrays.values()}) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"expected equal shapes, got {shapes}")
