"""A digest of each leaf of a state: by it a checkpoint knows that what it reads is what it wrote.

A leaf's digest is two sums modulo 2^32 over its elements, each element's bits mixed with its place
by the last step of MurmurHash3. Sums need no order, so every device adds up the part that it holds
and the digest is the same on any mesh. One changed element always changes both sums, since the
mixing is one to one; any other change escapes them with a chance of 2^-64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dmd_jax.sharding import replicated

# Odd, so that multiplying by them loses no bit: 2^32 over the golden ratio, and MurmurHash3's.
_PLACE, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_ROWS = 1 << 18  # elements that are mixed at a time on a host: in its cache


def leaf_digests(tree: Any) -> dict[str, str]:
    """The digest, 16 hexadecimal digits, of each leaf by its name "a/b/c".

    Arrays on devices are summed where they lie; of those that several processes share, all
    processes have to call this together. NumPy arrays are summed on the host.

    Args:
      tree: of arrays of 1, 2 or 4 bytes an element.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    # All are under way before the first is waited for.
    sums = [_sums_on(leaf) for _, leaf in leaves]
    return {
        name: "".join(f"{int(part):08x}" for part in pair)
        for name, pair in zip(names, jax.device_get(sums), strict=True)
    }


def _sums_on(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return _sums_on_host(np.asarray(leaf))
    sharding = leaf.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return _sums_on_devices(mesh)(leaf)


@functools.cache
def _sums_on_devices(mesh: jax.sharding.Mesh | None):
    return jax.jit(_device_sums, out_shardings=None if mesh is None else replicated(mesh))


def _device_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % (1 << 32))
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        stride *= leaf.shape[axis]
    if leaf.dtype != jnp.bool_:
        leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    # One reduction of both: XLA makes it a single pass over the leaf, many times as fast as two.
    zero = np.uint32(0)
    return jax.lax.reduce(
        _mixed(leaf.astype(jnp.uint32), place),
        (zero, zero),
        lambda sums, more: (sums[0] + more[0], sums[1] + more[1]),
        tuple(range(leaf.ndim)),
    )


def _sums_on_host(leaf: np.ndarray) -> tuple[np.uint32, np.uint32]:
    bits = leaf.reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(bits), _ROWS):
        part = bits[start : start + _ROWS].astype(np.uint32)
        place = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32)
        sums += np.array([each.sum(dtype=np.uint32) for each in _mixed(part, place)], np.uint32)
    return sums[0], sums[1]


def _mixed(bits: Any, place: Any) -> tuple[Any, Any]:
    """uint32 arrays of NumPy or of JAX: the bits mixed with their place, and those weighted by it.

    The weights are odd.
    """
    mixed = bits ^ (place * _PLACE)
    mixed = (mixed ^ (mixed >> 16)) * _FIRST
    mixed = (mixed ^ (mixed >> 13)) * _SECOND
    mixed = mixed ^ (mixed >> 16)
    return mixed, mixed * (place * 2 + 1)
