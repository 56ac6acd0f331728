"""GroupNorm's values and gradients against the closed form in float64, far from the origin too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.models.ops.layers import GroupNorm

SHAPE, GROUPS, EPSILON = (2, 4, 6, 16), 4, 1e-5
NORM = GroupNorm(EPSILON, GROUPS)


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_values_and_gradients_are_the_closed_form(dtype, rtol):
    """To 1e-5 of the largest in float32; in bfloat16 to its own 2^-8 and a little.

    The mean is 30 standard deviations: in bfloat16 a quarter of one is what rounding x changes.
    """
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal(SHAPE) + at, dtype) for at in (30, 0))
    scale, bias = rng.standard_normal((2, SHAPE[-1])).astype(np.float32)
    values, gradient = _closed_form(x, g, scale, bias)
    params = {"params": {"scale": scale, "bias": bias}}
    found, pull = jax.vjp(lambda x: NORM.apply(params, x), x)
    (pulled,) = pull(g)
    assert found.dtype == pulled.dtype == x.dtype
    for got, wanted in ((found, values), (pulled, gradient)):
        error = np.abs(np.asarray(got, np.float64) - wanted).max()
        assert error <= rtol * np.abs(wanted).max(), error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, 0.1, 300.0])
def test_an_image_of_one_colour_is_zero(dtype, value):
    """To what rounding its mean leaves, 2^-22 of it over the square root of epsilon."""
    x = jnp.full(SHAPE, value, dtype)
    params = NORM.init(jax.random.key(0), x)
    found, gradient = jax.value_and_grad(lambda x: NORM.apply(params, x).sum())(x)
    assert abs(float(found)) <= x.size * value * 2**-22 / EPSILON**0.5
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def _closed_form(x, g, scale, bias):
    """[B, H, W, C] and its cotangent -> the values and x's cotangent, in float64."""
    grouped = (SHAPE[0], SHAPE[1] * SHAPE[2], GROUPS, SHAPE[-1] // GROUPS)
    x, g = np.asarray(x, np.float64).reshape(grouped), np.asarray(g, np.float64).reshape(grouped)
    scale, bias = scale.reshape(grouped[2:]), bias.reshape(grouped[2:])

    def mean(array):
        return array.mean(axis=(1, 3), keepdims=True)

    deviation = np.sqrt(mean((x - mean(x)) ** 2) + EPSILON)
    normal, g = (x - mean(x)) / deviation, g * scale[None, None]
    gradient = (g - mean(g) - normal * mean(g * normal)) / deviation
    return (normal * scale + bias).reshape(SHAPE), gradient.reshape(SHAPE)
