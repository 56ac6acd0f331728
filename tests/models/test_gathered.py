"""Convolutions whose kernels are split over the devices."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.models.ops.layers import conv
from dmd_jax.parallel.sharding import (
    batch_sharding,
    gathered,
    infer_shardings,
    make_mesh,
    program_for,
)

WIDTH = 64


def test_its_gradients_are_those_of_one_device():
    """In float32 to 1e-5 of the largest."""
    mesh = make_mesh(1, 8)
    module = conv(WIDTH, 3, name="conv", dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((16, 8, 8, WIDTH), np.float32)
    params = module.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(module.apply(params, x) ** 2)

    def of_mesh(params, x):
        with program_for(mesh):
            return loss(params, x)

    shardings = infer_shardings(params, mesh), batch_sharding(mesh)
    assert not shardings[0]["params"]["kernel"].is_fully_replicated
    program = jax.jit(jax.grad(of_mesh, (0, 1)), in_shardings=shardings, out_shardings=shardings)
    with jax.default_matmul_precision("highest"):
        actual, expected = program(params, x), jax.grad(loss, (0, 1))(params, x)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_where_data_splits_the_rows_too_it_is_left_to_xla():
    kernel = jnp.ones((3, 3, 8, 8))
    for mesh in (None, make_mesh(8, 1), make_mesh(2, 4)):
        with program_for(mesh):
            assert gathered(kernel) is kernel


FOR_TPU = f"""
import jax
import jax.numpy as jnp
from dmd_jax.performance.compilation import hlo
from dmd_jax.performance.compilation.topology import devices_of
from dmd_jax.models.ops.layers import conv
from dmd_jax.parallel.sharding import *

mesh = make_mesh(1, 16, devices=devices_of("v5e:4x4"))
module = conv({WIDTH}, 3, name="conv", dtype=jnp.bfloat16)
x = jax.ShapeDtypeStruct((32, 32, 32, {WIDTH}), jnp.bfloat16, sharding=batch_sharding(mesh))
params = jax.eval_shape(module.init, jax.random.key(0), x)
params = with_shardings(params, infer_shardings(params, mesh))

def loss(params, x):
    with program_for(mesh):
        return jnp.sum(jax.nn.silu(module.apply(params, x)).astype(jnp.float32))

text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile().as_text()
print(dict(hlo.totals(hlo.parse(text)).collective_bytes))
"""


@pytest.mark.tpu
def test_a_tpu_gathers_the_kernel_and_convolves_once():
    """Left to XLA, parts of the kernel go round from chip to chip, by collective-permute."""
    command = [sys.executable, "-c", FOR_TPU]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "'all-gather'" in result.stdout, result.stderr
    assert "collective-permute" not in result.stdout
