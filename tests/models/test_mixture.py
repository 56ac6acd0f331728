"""The exact mixture denoiser against numerical integration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel
from dmd_jax.models import build_denoiser

NETWORK = {
    "name": "gaussian_mixture",
    "means": [[-1.0, 0.5], [1.5, -0.5], [0.0, 1.0]],
    "stds": [0.3, 0.5, 0.2],
    "weights": [0.5, 0.3, 0.2],
}


def posterior_mean(x_t, alpha, sigma):
    """E[x0 | x_t] as the ratio of two integrals, by the trapezoid rule in float64."""
    axis = np.linspace(-5.0, 5.0, 1001)
    x0 = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    prior = sum(
        w / s**2 * np.exp(-0.5 * np.sum((x0 - m) ** 2, axis=-1) / s**2)
        for m, s, w in zip(NETWORK["means"], NETWORK["stds"], NETWORK["weights"])
    )
    likelihood = np.exp(-0.5 * np.sum((x_t - alpha * x0) ** 2, axis=-1) / sigma**2)
    weight = prior * likelihood
    return np.sum(weight[..., None] * x0, axis=(0, 1)) / weight.sum()


def test_denoised_is_the_posterior_mean_at_any_alpha_and_sigma():
    levels = [(1.0, 0.1), (1.0, 0.7), (1.0, 20.0), (0.6, 0.8), (0.05, 0.999)]
    alpha, sigma = np.array(levels).T
    x_t = np.random.default_rng(0).standard_normal((5, 2)) * 0.6
    denoiser = build_denoiser(NETWORK)
    params = denoiser.init(jax.random.key(0))
    level = NoiseLevel(*map(jnp.asarray, (alpha, sigma, sigma)))
    actual = jax.jit(denoiser.denoise)(params, jnp.asarray(x_t), level, None)
    expected = [posterior_mean(x, a, s) for x, (a, s) in zip(x_t, levels)]
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_it_is_finite_with_a_finite_gradient_far_from_every_mode():
    denoiser = build_denoiser(NETWORK)
    params = denoiser.init(jax.random.key(0))
    level = NoiseLevel(jnp.ones(1), jnp.full(1, 0.002), jnp.zeros(1))
    x_t = jnp.array([[40.0, -70.0]])
    value, pullback = jax.vjp(lambda x: denoiser.denoise(params, x, level, None), x_t)
    # The widest component explains the point, and hardly any of the offset is noise.
    np.testing.assert_allclose(value, x_t, rtol=1e-4)
    assert np.all(np.isfinite(pullback(jnp.ones_like(value))[0]))


def test_weights_default_to_equal_and_need_no_normalisation():
    weights = (None, [7, 7, 7])
    denoisers = [build_denoiser(NETWORK | {"weights": value}) for value in weights]
    level = NoiseLevel(jnp.ones(2), jnp.full(2, 0.5), jnp.zeros(2))
    x_t = jnp.array([[0.1, 0.4], [1.0, 0.0]])
    first, second = (d.denoise(d.init(jax.random.key(0)), x_t, level, None) for d in denoisers)
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stds": [0.3, 0.5]}, r"shapes \(3, 2\), \(2,\), \(3,\); expected \[K, D\]"),
        ({"stds": [0.3, 0.5, 0.0]}, "positive stds"),
        ({"means": [[0.0, 1.0], [1.0]]}, "not arrays of numbers"),
    ],
)
def test_bad_mixtures_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(NETWORK | options)
