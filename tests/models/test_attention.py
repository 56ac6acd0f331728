"""The attention function against its equation, in NumPy's float64."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products_of

from dmd_jax.errors import UserError
from dmd_jax.models.ops import attention
from dmd_jax.models.ops.attention import attend
from dmd_jax.models.ops.splash import splash
from dmd_jax.parallel.sharding import make_mesh, program_for

B, L, S, H, K = 2, 5, 7, 3, 4


def by_hand(q, k, v, seen):
    logits = np.einsum("blhk,bshk->bhls", *(x.astype(np.float64) for x in (q, k))) / math.sqrt(K)
    weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhls,bshk->blhk", weights, v.astype(np.float64))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_its_equation(masked, causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, size, H, K), np.float32) * 2 for size in (L, S, S))
    seen = np.ones((B, H, L, S), bool)
    mask = None
    if masked:
        mask = rng.random((B, 1, 1, S)) < 0.6
        mask[..., 0] = True  # each query sees something
        seen &= mask
    if causal:
        seen &= np.tril(np.ones((L, S), bool))
    actual = attend(q, k, v, mask=None if mask is None else jnp.asarray(mask), causal=causal)
    assert actual.shape == (B, L, H, K) and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, by_hand(q, k, v, seen), rtol=0, atol=2e-6)


def test_logits_and_softmax_are_float32_in_bfloat16():
    """Logits of 256 and 256.5, which bfloat16 cannot tell apart, and values of 0 and 1."""
    q = jnp.array([16.0, 16.0, 1.0, 0.0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[32.0, 0, 0, 0], [32.0, 0, 1, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[0.0] * 4, [1.0] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    actual = attend(q, k, v)
    assert actual.dtype == jnp.bfloat16
    expected = 1 / (1 + math.exp(-0.5))  # 0.622; equal weights would give 0.5
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=0, atol=2**-8)


def test_what_does_not_fit_is_refused():
    q, k = jnp.zeros((B, L, H, K)), jnp.zeros((B, S, H, K))
    for other in (jnp.zeros((B, S, H, 8)), jnp.zeros((B, S, 1, K)), jnp.zeros((1, S, H, K))):
        with pytest.raises(
            UserError, match=r"attention of q \(2, 5, 3, 4\) to k .* \[B, S, H, K\]"
        ):
            attend(q, other, other)
    with pytest.raises(UserError, match="and v"):
        attend(q, k, k[:, :3])
    wrong = (jnp.zeros((B, H, L, S)), jnp.ones((L, S), bool), jnp.ones((B, H, S, L), bool))
    for mask in wrong:
        with pytest.raises(UserError, match=r"attention mask is .* to \(2, 3, 5, 7\)"):
            attend(q, k, k, mask=mask)


@pytest.mark.parametrize("platform, expected", [("gpu", "parts"), ("cpu", "heads")])
def test_many_queries_in_parts_are_all_at_once_in_less_memory(platform, expected, monkeypatch):
    """Above MOST_LOGITS: values and gradients to 5e-6 of the largest, a part of the memory."""
    monkeypatch.setattr(attention, "device_in_use", lambda: SimpleNamespace(platform=platform))
    rng = np.random.default_rng(0)
    length = 4 * attention.CHUNK
    q, k, v, weight = rng.standard_normal((4, 2, length, 2, 8)).astype(np.float32)
    assert attention.implementation(q, k, free=True) == expected

    def plain(q, k, v):
        logits = jnp.einsum("blhk,bshk->bhls", q, k) / np.sqrt(8)
        return jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(logits), v)

    def gradients(function):
        loss = lambda *inputs: jnp.sum(function(*inputs) * weight)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    (value, found), (loss, expected) = (gradients(f)(q, k, v) for f in (attend, plain))
    np.testing.assert_allclose(attend(q, k, v), plain(q, k, v), rtol=0, atol=1e-6)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())

    def temporaries(function):
        return gradients(function).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(attend) < 0.5 * temporaries(plain)


@pytest.mark.parametrize("keys", [128, 77])
def test_the_kernel_for_tpu_is_the_equation_on_each_devices_rows(keys):
    """By Pallas' interpreter: in float32 to 2e-6, gradients to 1e-5 of the largest."""
    rng = np.random.default_rng(0)
    mesh = make_mesh(2, 1, devices=jax.devices()[:2])
    q, k, v, weight = rng.standard_normal((4, 2, 256, 2, 40)).astype(np.float32)
    k, v = k[:, :keys], v[:, :keys]

    def gradients(function):
        loss = lambda *inputs: jnp.vdot(function(*inputs), weight)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    kernel = functools.partial(splash, mesh=mesh, interpret=True)
    np.testing.assert_allclose(kernel(q, k, v), attend(q, k, v), rtol=0, atol=2e-6)
    (_, found), (_, expected) = gradients(kernel), gradients(attend)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_the_kernel_for_tpu_takes_one_pass_whatever_the_precision_around(monkeypatch):
    """Forward and backward; its gradient is traced where the network's precision is forgotten."""
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(attention, "implementation", lambda *_, **options: "splash")
    monkeypatch.setattr(attention, "splash", functools.partial(splash, interpret=True))
    q = jnp.zeros((1, 128, 2, 40), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v).astype(jnp.float32))

    with jax.default_matmul_precision("highest"), program_for(mesh):
        forward = products_of(attend, q, q, q)
        both = products_of(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    assert 2 <= len(forward) < len(both)
    assert {product.precision for product in both} == {("DEFAULT", "DEFAULT")}


def mesh_of(device, rows=4):
    """What is asked of a mesh whose devices are not here: a platform, and a GPU's capability."""
    platform, _, capability = device.partition(" ")
    devices = np.array([SimpleNamespace(platform=platform, compute_capability=capability)])
    return SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": rows})


@pytest.mark.parametrize(
    "device, shape, keys, dtype, expected",
    [
        ("tpu", (8, 4096, 8, 40), 4096, "bfloat16", "splash"),
        ("tpu", (8, 1024, 8, 80), 1024, "bfloat16", "splash"),
        ("tpu", (6, 4096, 8, 40), 4096, "bfloat16", "parts"),  # four devices
        ("tpu", (8, 4096, 1, 512), 4096, "bfloat16", "parts"),
        ("tpu", (8, 4096, 8, 40), 77, "bfloat16", "splash"),
        ("tpu", (8, 256, 8, 160), 256, "bfloat16", "xla"),
        ("tpu", (8, 4096, 8, 40), 4096, "float32", "parts"),
        ("gpu 9.0", (8, 4096, 8, 40), 4096, "bfloat16", "cudnn"),
        ("gpu 10.3", (8, 4096, 8, 40), 77, "bfloat16", "cudnn"),
        ("gpu 9.0", (8, 4096, 1, 512), 4096, "bfloat16", "parts"),
        ("gpu 9.0", (8, 4096, 8, 40), 4096, "float32", "parts"),
        ("gpu 7.5", (8, 4096, 8, 40), 4096, "bfloat16", "parts"),
        ("gpu gfx942", (8, 4096, 8, 40), 4096, "bfloat16", "parts"),
        ("cpu", (8, 4096, 8, 40), 4096, "bfloat16", "heads"),
        ("cpu", (8, 256, 8, 40), 256, "float32", "heads"),
        ("cpu", (8, 256, 8, 40), 77, "float32", "heads"),
        ("cpu", (8, 64, 8, 40), 77, "float32", "xla"),
    ],
)
def test_what_attends_where(device, shape, keys, dtype, expected):
    q = jax.ShapeDtypeStruct(shape, dtype)
    k = jax.ShapeDtypeStruct((shape[0], keys, *shape[2:]), dtype)
    with program_for(mesh_of(device)):
        assert attention.implementation(q, k, free=True) == expected
        assert attention.implementation(q, k, free=False) == "xla"


# The chip with the least scratch memory left.
FOR_TPU = """
import sys
import jax
from dmd_jax.performance.compilation.topology import devices_of
from dmd_jax.models.ops.splash import splash
from dmd_jax.parallel.sharding import batch_sharding, make_mesh

mesh = make_mesh(1, 4, devices=devices_of("v4:2x2x1"))
shape = (4, int(sys.argv[1]), 2, int(sys.argv[2]))
q = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=batch_sharding(mesh))
loss = lambda q: splash(q, q, q, mesh).astype("float32").sum()
print(jax.jit(jax.grad(loss)).lower(q).compile().as_text().count("tpu_custom_call"))
"""


@pytest.mark.tpu
@pytest.mark.parametrize("length, channels", [(4096, 40), (4096, 128), (1024, 128)])
def test_the_kernels_blocks_fit_in_the_scratch_memory(length, channels):
    command = [sys.executable, "-c", FOR_TPU, str(length), str(channels)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.stdout == "2\n", result.stderr  # forward and backward
