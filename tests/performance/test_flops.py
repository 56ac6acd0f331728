"""Counts of operations against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dmd_jax.models.ops.attention import at_once, attend
from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.performance.flops import count_flops


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolve(image, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, dimension_numbers=numbers, **options)


def test_a_matmul_is_two_operations_a_product():
    assert count_flops(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(jnp.matmul, array(2, 3, 5), array(2, 5, 7)) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_are_three_times_the_same(stride):
    strided = lambda x, w: convolve(  # noqa: E731
        x, w, window_strides=(stride, stride), padding=((1, 1), (1, 1))
    )
    args = array(2, 8, 8, 3), array(3, 3, 3, 5)
    # Of 8 places three taps fit 6 times and two at both ends: 22 products; every second: 11.
    forward = 2 * 2 * 3 * 5 * (22 if stride == 1 else 11) ** 2
    assert count_flops(strided, *args) == forward
    both = jax.grad(lambda x, w: jnp.sum(strided(x, w) ** 2), argnums=(0, 1))
    assert count_flops(both, *args) == 3 * forward


def test_groups_have_their_own_inputs():
    grouped = lambda x, w: convolve(  # noqa: E731
        x, w, window_strides=(1, 1), padding="VALID", feature_group_count=4
    )
    assert count_flops(grouped, array(1, 4, 4, 8), array(1, 1, 2, 12)) == 2 * 16 * 12 * 2


def test_loops_count_as_often_as_they_run_and_of_branches_the_dearest():
    def body(x, _):
        return x @ x, None

    once = 2 * 4**3
    assert count_flops(lambda x: lax.scan(body, x, None, length=6)[0], array(4, 4)) == 6 * once
    branch = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, x)  # noqa: E731
    assert count_flops(branch, array(4, 4)) == 2 * once
    assert count_flops(jax.jit(jax.checkpoint(lambda x: x @ x)), array(4, 4)) == once
    endless = lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="unknown length"):
        count_flops(endless, array(4, 4))


def test_devices_add_up():
    mesh, rows = make_mesh(data=8), jax.P("data")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert count_flops(split, array(16, 5)) == 8 * 2 * 2 * 2 * 5


def test_attention_in_parts_counts_once():
    """Its logits are made again in the backward pass, to save memory; a model needs them once."""
    shape = array(1, 2048, 1, 8)

    def both():  # another function each time: JAX keeps what it traced of one
        loss = lambda q, k, v: jnp.sum(attend(q, k, v))  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    # Forward q k^T and p v; backward two for each.
    once = 6 * 2 * 2048**2 * 8
    with at_once():
        assert count_flops(both(), shape, shape, shape) == once
    assert count_flops(both(), shape, shape, shape) > once
