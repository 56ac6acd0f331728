"""The linear layer of embeddings on several devices."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.models.ops.layers import dense
from dmd_jax.parallel.sharding import batch_sharding, infer_shardings, make_mesh, program_for
from dmd_jax.performance.compilation import hlo

WIDTH = 512


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.silu(dense(2 * WIDTH, name="map_layer0")(x))
        return dense(WIDTH, name="map_layer1")(hidden)


def gradients(rows, mesh):
    """The gradients' program for weights split over fsdp and rows over all, and its arguments."""
    module = Embedding()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, WIDTH), np.float32))
    params = module.init(jax.random.key(0), x)

    def loss(params, x):
        with program_for(mesh):
            return jnp.sum(module.apply(params, x) ** 2)

    shardings = infer_shardings(params, mesh), batch_sharding(mesh)
    program = jax.jit(jax.grad(loss, (0, 1)), in_shardings=shardings, out_shardings=shardings)
    return program, (params, x)


def test_the_weights_travel_and_no_examples():
    """Twice the examples are no more traffic, though all of them are smaller than the weights."""
    mesh = make_mesh(1, 8)
    traffic = []
    for rows in (16, 32):
        program, arguments = gradients(rows, mesh)
        text = program.lower(*arguments).compile().as_text()
        traffic.append(hlo.totals(hlo.parse(text)).collective_bytes)
    assert traffic[0] == traffic[1]
    weights = 2 * 2 * WIDTH * WIDTH * 4
    assert traffic[0]["all-gather"] == pytest.approx(weights, rel=0.01)


def test_its_gradients_are_those_of_one_device():
    program, arguments = gradients(16, make_mesh(1, 8))
    with jax.default_matmul_precision("highest"):
        actual = program(*arguments)
        alone = jax.grad(lambda *args: jnp.sum(Embedding().apply(*args) ** 2), (0, 1))
        expected = alone(*arguments)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_rows_that_the_devices_do_not_divide_stay_as_they_are():
    with program_for(make_mesh(1, 8)):
        x = jnp.ones((1, WIDTH))
        assert Embedding().init_with_output(jax.random.key(0), x)[0].shape == (1, WIDTH)
