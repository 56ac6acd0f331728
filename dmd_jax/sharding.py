"""Where arrays live: the mesh, and rules that give every leaf of a state its sharding."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# (regular expression searched in the leaf's path, tactic); the first that matches decides.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((".*", "fsdp"),)
# Below this many elements a leaf costs more to gather than it saves.
MIN_SHARDED_SIZE = 1024


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor"); one size may be -1 and takes the devices left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    shown = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{shown}: expected sizes of at least 1, and at most one of -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"{shown} does not multiply to the {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def infer_shardings(abstract: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs.

    Tactics: "fsdp" splits the largest dimension that the fsdp axis divides (leaves under
    MIN_SHARDED_SIZE elements stay whole); "replicate" keeps a copy on each device. Optimiser
    moments and EMA have their parameter's path and shape inside them, so they fall alike.
    """

    def infer(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        tactic = next((tactic for pattern, tactic in rules if re.search(pattern, name)), None)
        if tactic == "replicate":
            return replicated(mesh)
        if tactic == "fsdp":
            return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"]))
        raise UserError(f"sharding rule for {name} is {tactic!r}; expected 'fsdp' or 'replicate'")

    return jax.tree_util.tree_map_with_path(infer, abstract)


def _fsdp_spec(shape: tuple[int, ...], size: int) -> PartitionSpec:
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(["fsdp" if axis == largest else None for axis in range(largest + 1)]))


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulation: int = 1, name: str) -> None:
    """Raises a UserError unless each device gets a whole part of each micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    if batch_size < 1 or batch_size % parts:
        detail = f" times {accumulation} micro-batches" if accumulation > 1 else ""
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        raise UserError(
            f"{name}={batch_size} does not divide over {devices} devices (data x fsdp){detail}; "
            f"expected a multiple of {parts}"
        )


def to_mesh(local_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process's rows of a batch, joined to global arrays over data and fsdp."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in local_batch.items()
    }


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree of arrays or ShapeDtypeStructs, with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays on their devices, leaf by leaf; every process holds the same values."""

    def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)
