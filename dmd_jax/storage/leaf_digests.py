"""A digest of each leaf of a state: by it a checkpoint knows that what it reads is what it wrote.

A leaf's digest is two sums modulo 2^32 over its elements, each element's bits mixed with its place
by the last step of MurmurHash3. Sums need no order, so every device adds up the part that it holds,
the hosts add up those, and the digest is the same on any mesh. One changed element always changes
both sums, since the mixing is one to one; any other change escapes them with a chance of 2^-64.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmd_jax.parallel.processes import settle
from dmd_jax.parallel.sharding import named_leaves

# Odd, so that multiplying by them loses no bit: 2^32 over the golden ratio, and MurmurHash3's.
_PLACE, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_ROWS = 1 << 18  # elements that are mixed at a time on a host: in its cache


def leaf_digests(tree: Any) -> dict[str, str]:
    """The digest, 16 hexadecimal digits, of each leaf by its name "a/b/c".

    Arrays on devices are summed where they lie, without collectives; of those that several
    processes share, all processes have to call this together. NumPy arrays are summed on the host.

    Args:
      tree: of arrays of 1, 2 or 4 bytes an element.
    """
    leaves = named_leaves(tree)
    # All are under way before the first is waited for.
    sums = [_own_sums(leaf) for leaf in leaves.values()]
    sums = [np.concatenate(jax.device_get(parts)).astype(np.uint64).sum(axis=0) for parts in sums]
    sums = [[int(part) for part in pair] for pair in sums]
    arrays = [leaf for leaf in leaves.values() if isinstance(leaf, jax.Array)]
    if not all(array.is_fully_addressable for array in arrays):
        sums = settle(sums, lambda every: np.sum(every, axis=0).tolist())
    return {
        name: "".join(f"{part % (1 << 32):08x}" for part in pair)
        for name, pair in zip(leaves, sums, strict=True)
    }


def _own_sums(leaf: Any) -> list[Any]:
    """Arrays uint32 [N, 2] of sums over the parts of a leaf that this process answers for."""
    if not isinstance(leaf, jax.Array):
        return [_sums_on_host(np.asarray(leaf))]
    if not isinstance(leaf.sharding, NamedSharding):
        return [_sums_of_whole(leaf)]
    sums = _sums_on(leaf.sharding.mesh, leaf.sharding.spec)(leaf)
    return [shard.data for shard in sums.addressable_shards]


@functools.cache
def _sums_on(mesh: Mesh, spec: PartitionSpec):
    """leaf -> [devices, 2], a row a device; rows of further copies of a part are zero."""
    axes = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    others = set(mesh.axis_names).difference(*axes)

    def local(part: jax.Array) -> jax.Array:
        own = axes + [()] * (part.ndim - len(axes))
        whole = [
            size * math.prod(mesh.shape[axis] for axis in over)
            for size, over in zip(part.shape, own)
        ]
        start = [
            jax.lax.axis_index(over) * size if over else 0 for size, over in zip(part.shape, own)
        ]
        copies = sum((jax.lax.axis_index(axis) for axis in sorted(others)), 0)
        return jnp.where(copies == 0, _sums(part, whole, start), np.uint32(0))

    rows = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=rows, check_vma=False)
    return jax.jit(mapped)


@jax.jit
def _sums_of_whole(leaf: jax.Array) -> jax.Array:
    return _sums(leaf, leaf.shape, [0] * leaf.ndim)


def _sums(part: jax.Array, whole: Any, start: Any) -> jax.Array:
    """uint32 [1, 2]: of a part of an array of shape `whole`, which begins at `start`."""
    place, stride = jnp.zeros(part.shape, jnp.uint32), 1
    for axis in reversed(range(part.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis)
        index += jnp.asarray(start[axis], jnp.uint32)
        place += index * np.uint32(stride % (1 << 32))
        stride *= whole[axis]
    if part.dtype != jnp.bool_:
        part = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
    # One reduction of both: XLA makes it a single pass over the leaf, many times as fast as two.
    zero = np.uint32(0)
    sums = jax.lax.reduce(
        _mixed(part.astype(jnp.uint32), place),
        (zero, zero),
        lambda sums, more: (sums[0] + more[0], sums[1] + more[1]),
        tuple(range(part.ndim)),
    )
    return jnp.stack(sums)[None]


def _sums_on_host(leaf: np.ndarray) -> np.ndarray:
    bits = leaf.reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(bits), _ROWS):
        part = bits[start : start + _ROWS].astype(np.uint32)
        place = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32)
        sums += np.array([each.sum(dtype=np.uint32) for each in _mixed(part, place)], np.uint32)
    return sums[None]


def _mixed(bits: Any, place: Any) -> tuple[Any, Any]:
    """uint32 arrays of NumPy or of JAX: the bits mixed with their place, and those weighted by it.

    The weights are odd.
    """
    mixed = bits ^ (place * _PLACE)
    mixed = (mixed ^ (mixed >> 16)) * _FIRST
    mixed = (mixed ^ (mixed >> 13)) * _SECOND
    mixed = mixed ^ (mixed >> 16)
    return mixed, mixed * (place * 2 + 1)
