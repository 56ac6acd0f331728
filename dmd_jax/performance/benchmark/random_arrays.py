"""Arrays of ordinary size in place of weights and data: speed does not depend on their values."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dmd_jax.errors import UserError
from dmd_jax.parallel.sharding import leaf_name, with_shardings


def in_host_memory(abstract: Any) -> Any:
    """A tree of ShapeDtypeStructs for the host's CPU, which JAX has beside other devices.

    Raises:
      UserError: JAX was told to do without it.
    """
    try:
        cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    except RuntimeError:
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms} leaves out the CPU; expected "
            f"JAX_PLATFORMS={jax.config.jax_platforms},cpu"
        ) from None
    return with_shardings(abstract, jax.tree.map(lambda _: cpu, abstract))


def random_weights(abstract: Any) -> Any:
    """Random parameters made on their devices, leaf by leaf; the same in every process.

    Kernels have about unit gain, biases are zero, and scales and the like are one, so that nothing
    in a network overflows or dies out.

    Args:
      abstract: a tree of ShapeDtypeStructs with shardings.
    """

    def make(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = leaf_name(path)
        if len(leaf.shape) >= 2:
            return _floats(leaf)(_seed(name), 1 / math.sqrt(math.prod(leaf.shape[:-1])))
        value = 0.0 if name.endswith("bias") else 1.0
        return _filled(leaf)(value)

    return jax.tree_util.tree_map_with_path(make, abstract)


def random_batch(abstract: Any, limits: Mapping[str, int]) -> Any:
    """A random batch on its devices; floats have a standard deviation of one.

    Args:
      abstract: nested dicts of ShapeDtypeStructs with shardings.
      limits: of integers by the last of their names: they are drawn below it.
    """

    def make(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return _floats(leaf)(_seed(name), 1.0)
        return _integers(leaf)(_seed(name), limits[path[-1].key])

    return jax.tree_util.tree_map_with_path(make, abstract)


def _seed(name: str) -> np.uint32:
    return np.uint32(zlib.crc32(name.encode()))


def _bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """A hash of each element's number: jax.random takes seconds to compile for some hundred shapes.

    The mixer is a published one of 32 bits, with two multiplications.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)


# One program for each shape, however many leaves have it.
@functools.cache
def _floats(leaf: jax.ShapeDtypeStruct):
    def make(seed, scale):
        uniform = _bits(leaf.shape, seed).astype(jnp.float32) * 2.0**-31 - 1
        return (math.sqrt(3) * scale * uniform).astype(leaf.dtype)

    return jax.jit(make, out_shardings=leaf.sharding)


@functools.cache
def _integers(leaf: jax.ShapeDtypeStruct):
    def make(seed, limit):
        return (_bits(leaf.shape, seed) % jnp.uint32(limit)).astype(leaf.dtype)

    return jax.jit(make, out_shardings=leaf.sharding)


@functools.cache
def _filled(leaf: jax.ShapeDtypeStruct):
    return jax.jit(
        lambda value: jnp.full(leaf.shape, value, leaf.dtype), out_shardings=leaf.sharding
    )
