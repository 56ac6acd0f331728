"""The MLP denoiser of points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.method.schedules import edm_level
from dmd_jax.models import build_denoiser

NETWORK = {"name": "mlp", "dim": 2, "width": 16, "depth": 2}
X = jax.random.normal(jax.random.key(1), (4, 2))
LEVEL = edm_level(jnp.array([0.01, 0.5, 3.0, 80.0]))


def test_zero_init_starts_as_the_skip_connection():
    denoiser = build_denoiser(NETWORK | {"zero_init": True})
    params = denoiser.init(jax.random.key(0))
    c_skip = 0.25 / (0.25 + np.asarray(LEVEL.sigma, np.float64) ** 2)
    expected = c_skip[:, None] * np.asarray(X)
    np.testing.assert_allclose(denoiser.denoise(params, X, LEVEL, None), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "embedding_type, dtype", [("positional", "float32"), ("fourier", "bfloat16")]
)
def test_every_parameter_that_trains_gets_a_gradient(embedding_type, dtype):
    network = NETWORK | {"embedding_type": embedding_type, "label_dim": 3}
    denoiser = build_denoiser(network, dtype=dtype)
    params = denoiser.init(jax.random.key(0))
    cond = jnp.array([0, 1, 2, 1])

    def loss(params):
        return jnp.sum(denoiser.denoise(params, X, LEVEL, cond) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    frozen = grads.pop("map_noise", None)
    assert (frozen is None) == (embedding_type == "positional")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == jnp.float32, path
        assert np.all(np.isfinite(leaf)) and np.any(leaf), path


def test_the_noise_level_and_the_label_matter():
    denoiser = build_denoiser(NETWORK | {"label_dim": 3})
    params = denoiser.init(jax.random.key(0))
    x = jnp.zeros((3, 2))  # c_skip and c_in have no influence
    same_level = edm_level(jnp.full(3, 0.5))
    by_label = denoiser.denoise(params, x, same_level, jnp.arange(3))
    assert np.abs(np.diff(by_label, axis=0)).max() > 1e-2
    levels = edm_level(jnp.array([10.0, 20.0, 40.0]))  # c_out is sigma_data to 0.2 %
    by_level = denoiser.denoise(params, x, levels, jnp.zeros(3, jnp.int32))
    assert np.abs(np.diff(by_level, axis=0)).max() > 1e-2
