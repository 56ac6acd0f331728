"""Products of bfloat16 whose float32 sums are handed on, against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products_of

from dmd_jax.models.ops.doubling import DoublingConv
from dmd_jax.models.ops.layers import conv
from dmd_jax.models.ops.products import linear, product_in

RNG = np.random.default_rng(0)
X, KERNEL, COTANGENT = (
    jnp.asarray(RNG.standard_normal(shape, "f4"), jnp.bfloat16)
    for shape in ((5, 64), (64, 7), (5, 7))
)
wide = functools.partial(product_in, jnp.matmul, result=jnp.float32)


def exact(x, y):
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)


def test_the_sums_are_not_rounded():
    """To 1e-6 of the largest, where bfloat16 is off by 1e-3."""
    expected = exact(X, KERNEL)
    result, rounded = wide(X, KERNEL), product_in(jnp.matmul, X, KERNEL)
    assert result.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    largest = np.abs(expected).max()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * largest)
    assert np.abs(np.asarray(rounded, np.float64) - expected).max() > 1e-3 * largest


def test_gradients_and_tangents_are_those_of_bfloat16():
    """Relative to 2^-8, the rounding of what comes out; all that is multiplied is bfloat16."""
    loss = lambda x, kernel: jnp.sum(wide(x, kernel) * COTANGENT)  # noqa: E731
    gradients = jax.grad(loss, argnums=(0, 1))(X, KERNEL)
    expected = exact(COTANGENT, KERNEL.T), exact(X.T, COTANGENT)
    for ours, truth in zip(gradients, expected):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype("f4"), truth, rtol=2**-8, atol=1e-6)
    for product in products_of(jax.grad(loss, argnums=(0, 1)), X, KERNEL):
        assert product.dtypes == ("bfloat16", "bfloat16")
    _, tangent = jax.jvp(wide, (X, KERNEL), (jnp.ones_like(X), jnp.zeros_like(KERNEL)))
    np.testing.assert_allclose(tangent, exact(np.ones(X.shape), KERNEL), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("make", [functools.partial(conv, size=3), DoublingConv, linear])
def test_layers_round_their_operands_and_not_their_bias(make):
    """What float32 makes of the rounded operands, to 1e-6 of the largest."""
    x = jnp.asarray(RNG.standard_normal((1, 4, 6, 8)), jnp.float32)
    kernel = RNG.standard_normal((8, 5) if make is linear else (3, 3, 8, 5))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.linspace(0.1, 1, 5)}
    result = make(5, name=None, dtype=jnp.bfloat16, result=jnp.float32).apply({"params": params}, x)
    rounded = params | {"kernel": params["kernel"].astype(jnp.bfloat16).astype(jnp.float32)}
    operand = x.astype(jnp.bfloat16).astype(jnp.float32)
    expected = make(5, name=None, dtype=jnp.float32).apply({"params": rounded}, operand)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
