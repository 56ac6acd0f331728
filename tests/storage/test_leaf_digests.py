"""Digests of a state's leaves: their values, on any mesh, and that they see every changed bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.storage.leaf_digests import leaf_digests

TYPES = ("float32", "int32", "uint32", "int8", "bool", "float16", ml_dtypes.bfloat16)


def murmur3_of_nothing(seed):
    """MurmurHash3_x86_32 of no bytes: its last step alone, in whole numbers."""
    seed ^= seed >> 16
    seed = seed * 0x85EBCA6B % 2**32
    seed ^= seed >> 13
    seed = seed * 0xC2B2AE35 % 2**32
    return seed ^ seed >> 16


def stated(array):
    """The digest, element by element in whole numbers."""
    bits = np.ascontiguousarray(array).reshape(-1)
    bits = bits.view(f"u{bits.dtype.itemsize}").tolist()
    mixed = [murmur3_of_nothing(b ^ i * 0x9E3779B1 % 2**32) for i, b in enumerate(bits)]
    second = sum(each * (2 * i + 1) for i, each in enumerate(mixed))
    return f"{sum(mixed) % 2**32:08x}{second % 2**32:08x}"


def test_the_published_vector_of_murmur3():
    assert murmur3_of_nothing(1) == 0x514E28B7
    assert leaf_digests({"a": jnp.uint32(1)}) == {"a": "514e28b7514e28b7"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 2, 4), (0, 3)])
def test_on_devices_and_on_the_host_it_is_the_stated_one(dtype, shape):
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    tree = {"on": {"device": jnp.asarray(array)}, "host": array}
    assert leaf_digests(tree) == {"on/device": stated(array), "host": stated(array)}


def test_it_is_the_same_on_any_mesh_and_in_any_part():
    array = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    expected = leaf_digests([array])
    for shape in ((8, 1), (2, 4)):
        mesh = make_mesh(*shape)
        for spec in (
            PartitionSpec(),
            PartitionSpec("data", "fsdp"),
            PartitionSpec(("data", "fsdp")),
        ):
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert leaf_digests([placed]) == expected
    # More than the host mixes at a time.
    long = np.arange(600_000, dtype=np.float32)
    assert leaf_digests([long]) == leaf_digests([jnp.asarray(long)])


def test_every_bit_and_every_exchange_changes_it():
    array = np.array([0.0, 1.0, -2.5], np.float32)
    seen = {leaf_digests([array])["0"]}
    for element in range(3):
        for bit in range(32):
            changed = array.copy()
            changed.view(np.uint32)[element] ^= np.uint32(1) << bit
            seen.add(leaf_digests([changed])["0"])
    seen.add(leaf_digests([array[::-1].copy()])["0"])
    assert len(seen) == 1 + 3 * 32 + 1
