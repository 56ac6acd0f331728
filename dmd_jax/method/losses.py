"""The losses of Distribution Matching Distillation and its family as pure functions of arrays.

No parameters, no randomness, no configuration: they work under jit, grad, vmap and shard_map.
Everything is computed in float32, whatever the inputs' type. Source: arXiv 2311.18828, or the one
that a function names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from dmd_jax.method.schedules import NoiseLevel, expand

WEIGHTINGS = ("normalized", "sigma_over_alpha", "sigma3_over_alpha")
# f-divergence D_f(real || fake) -> h(r) = r^2 f''(r) up to a factor, of the ratio r = real / fake.
DIVERGENCES: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "rkl": jnp.ones_like,  # reverse KL, DMD's own
        "kl": lambda r: r,
        "js": lambda r: r / (1.0 + r),
        "softened_rkl": lambda r: 1.0 / (1.0 + r),
        "hellinger": jnp.sqrt,  # squared
        "jeffreys": lambda r: 1.0 + r,
        "neyman": lambda r: 1.0 / r,
    }
)
_ABBREVIATIONS = {"sf": "softened_rkl", "sh": "hellinger", "jf": "jeffreys"}  # FastGen's names
_MOST_LOGIT = 10.0  # whose exponential is the largest ratio, before it is clipped
# How far a prediction is from its target, [B, ...] twice -> [B].
DISTANCES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = MappingProxyType(
    {
        "l1": lambda x, y: jnp.abs(x - y).mean(axis=_sample_axes(x)),
        "l2": lambda x, y: jnp.square(x - y).mean(axis=_sample_axes(x)),
    }
)


def distribution_matching_gradient(
    x: jax.Array,
    denoised_real: jax.Array,
    denoised_fake: jax.Array,
    *,
    level: NoiseLevel,
    weighting: str = "normalized",
    alpha_factor: bool = False,
    epsilon: float = 0.0,
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
      epsilon: added to Eq. 8's denominator; NVIDIA's FastGen has 1e-6.

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
        gradient = difference / (distance + epsilon) * (alpha if alpha_factor else 1.0)
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


def gan_generator_loss(fake_logits: jax.Array) -> jax.Array:
    """mean softplus(-logit): the generator's part of DMD2's GAN (arXiv 2405.14867, Eq. 4).

    Descending it makes the generator's samples look real to the head.

    Args:
      fake_logits: of generator samples, of any shape; the head's logit is ln(real / fake).

    Returns:
      A scalar.
    """
    return jax.nn.softplus(-_float32(fake_logits)).mean()


def gan_head_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """mean softplus(logit of fake) + mean softplus(-logit of real): the head's part of the GAN.

    At its minimum over functions a logit is ln(real / fake), the log ratio of the densities. Each
    part is a mean of its own, since there may be more of one kind. Source: arXiv 2405.14867, Eq. 4.

    Args:
      real_logits, fake_logits: of any shapes.

    Returns:
      A scalar.
    """
    real, fake = _float32(real_logits), _float32(fake_logits)
    return jax.nn.softplus(fake).mean() + jax.nn.softplus(-real).mean()


def density_ratio(logits: jax.Array, *, lower: float = 0.1, upper: float = 20.0) -> jax.Array:
    """real / fake at each sample, by a head's logit: exp(logit) clipped to lower..upper.

    Args:
      logits: [B] or [B, 1].

    Returns:
      float32 [B], which no gradient flows through.

    Raises:
      ValueError: more than one logit an example.
    """
    if logits.size != logits.shape[0]:
        raise ValueError(f"logits have shape {logits.shape}; expected one for each example")
    logits = jax.lax.stop_gradient(_float32(logits)).reshape(-1)
    return jnp.clip(jnp.exp(jnp.clip(logits, -_MOST_LOGIT, _MOST_LOGIT)), lower, upper)


def divergence_weight(
    logits: jax.Array,
    *,
    divergence: str,
    lower: float = 0.1,
    upper: float = 20.0,
    typical: jax.Array | None = None,
) -> jax.Array:
    """h(r) / mean h(r): what f-distill multiplies each sample's matching gradient by.

    With r = real / fake at x_t, the gradient of the divergence D_f(real || fake) is that of reverse
    KL, sample by sample, times h(r) = r^2 f''(r), one of DIVERGENCES (arXiv 2502.15681, Theorem 1).

    Args:
      logits: of the head on generator samples at their own x_t, [B] or [B, 1].
      divergence: a name in DIVERGENCES, or FastGen's "sf", "sh" or "jf".
      lower, upper: what r is clipped to.
      typical: [B], what r is divided by, as its running mean at the sample's noise level
        (`ratio_means`); None leaves it as it is.

    Returns:
      float32 [B] of mean one, which no gradient flows through.

    Raises:
      ValueError: an unknown divergence, or more than one logit an example.
    """
    divergence = _ABBREVIATIONS.get(divergence, divergence)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(DIVERGENCES)}")
    ratio = density_ratio(logits, lower=lower, upper=upper)
    if typical is not None:
        ratio = ratio / jax.lax.stop_gradient(typical)
    weight = DIVERGENCES[divergence](ratio)
    return weight / weight.mean()


def ratio_means(means: jax.Array, ratio: jax.Array, bins: jax.Array, *, rate: float) -> jax.Array:
    """The running mean of the density ratio in each bin of noise levels (arXiv 2502.15681).

    Args:
      means: [N], before this batch; they start at one.
      ratio: [B], `density_ratio`. bins: integers [B], 0..N-1.
      rate: how much of the former mean is kept; 0 is this batch's mean. A bin that no sample is in
        keeps its mean.

    Returns:
      float32 [N].
    """
    here = jax.nn.one_hot(bins, means.shape[0], dtype=jnp.float32)
    count = here.sum(axis=0)
    mean = _float32(ratio) @ here / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, rate * means + (1.0 - rate) * mean, means)


def sid_loss(
    x: jax.Array, denoised_real: jax.Array, denoised_fake: jax.Array, *, a: float = 1.2
) -> jax.Array:
    """Score identity distillation's generator loss (arXiv 2404.04057, Eq. 23), [B].

    (mu_real - mu_fake) . ((mu_real - x) - a (mu_real - mu_fake)) / mean|mu_real - x|, summed over
    a sample's elements; the denominator, at least 1e-5, is a constant to the gradient. In contrast
    to distribution matching, gradients flow through both denoisers, at x_t, to x.

    Args:
      x: generator samples [B, ...].
      denoised_real, denoised_fake: predictions from the same x_t = alpha x + sigma noise.
      a: 1.2 in all published runs; at 1 and above it lowers what the fake score's error adds.

    Returns:
      float32 [B]; the method takes its mean.

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes(x=x, denoised_real=denoised_real, denoised_fake=denoised_fake)
    x, real, fake = map(_float32, (x, denoised_real, denoised_fake))
    axes = _sample_axes(x)
    distance = jax.lax.stop_gradient(jnp.abs(x - real).mean(axis=axes, keepdims=True))
    product = (real - fake) * ((real - x) - a * (real - fake))
    return (product / jnp.maximum(distance, 1e-5)).sum(axis=axes)


def consistency_loss(
    denoised: jax.Array,
    target: jax.Array,
    *,
    weight: jax.Array,
    distance: str | Callable[[jax.Array, jax.Array], jax.Array] = "l2",
) -> jax.Array:
    """weight * distance(denoised, sg(target)) of each example.

    The loss of consistency distillation and training (arXiv 2303.01469, Eq. 7 and 10) and of
    progressive distillation (2202.00512), which differ in their targets (`method.consistency`).

    Args:
      denoised: the student's prediction [B, ...] at the noisier level.
      target: of that shape; no gradient flows into it.
      weight: [B], such as `uniform_weight` of the level.
      distance: "l1" or "l2", means over the elements, or (x, y) -> [B], such as LPIPS.

    Returns:
      float32 [B]; the methods take its mean.

    Raises:
      ValueError: shapes differ, or the distance is unknown.
    """
    _check_shapes(denoised=denoised, target=target)
    if isinstance(distance, str) and distance not in DISTANCES:
        raise ValueError(
            f"distance is {distance!r}; expected one of {', '.join(DISTANCES)}, or a function"
        )
    distance = DISTANCES[distance] if isinstance(distance, str) else distance
    return weight * distance(_float32(denoised), jax.lax.stop_gradient(_float32(target)))


def uniform_weight(level: NoiseLevel) -> jax.Array:
    """1 at every level, [B]."""
    return jnp.ones_like(level.sigma)


def truncated_snr_weight(level: NoiseLevel) -> jax.Array:
    """max(alpha^2/sigma^2, 1), progressive distillation's (arXiv 2202.00512, section 4), [B]."""
    return jnp.maximum(snr_weight(level), 1.0)


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
