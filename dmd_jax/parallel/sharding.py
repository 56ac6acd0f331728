"""Where arrays live: the mesh, and rules that give every leaf of a state its sharding."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmd_jax.errors import UserError
from dmd_jax.parallel.flags import warn_of_fall_back

AXES = ("data", "fsdp")
# (regular expression searched in the leaf's path, tactic); the first that matches decides.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((".*", "fsdp"),)
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
# Below this many elements a leaf costs more to gather than it saves.
MIN_SHARDED_SIZE = 1024


def make_mesh(data: int = -1, fsdp: int = 1, *, devices=None) -> Mesh:
    """The mesh ("data", "fsdp"); one size may be -1 and takes the devices left.

    Where the devices are those of several slices (TPU) or hosts (GPU), data runs over these and
    fsdp stays inside of each, as the network between them is slow.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slices of TPUs do not
        divide data.
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform == "cpu":
        warn_of_fall_back()
    sizes = [data, fsdp]
    shown = f"mesh data={data}, fsdp={fsdp}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{shown}: expected sizes of at least 1, and at most one of -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"{shown} does not multiply to the {len(devices)} devices")
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % slices and devices[0].platform == "tpu":
        raise UserError(
            f"{shown}: data={sizes[0]} over {slices} slices; expected a multiple of {slices}, as "
            "fsdp stays inside a slice"
        )
    return Mesh(_arranged(sizes, slices, devices), AXES, axis_types=(AxisType.Auto,) * 2)


def _arranged(sizes: list[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of these sizes, neighbours of an axis near each other."""
    if sizes[0] % slices:
        return np.asarray(devices).reshape(sizes)  # fsdp from host to host, as was asked for
    inside = (sizes[0] // slices, sizes[1])
    for split in (False, True):  # an axis over parts of two of the torus's is the second choice
        try:
            if slices == 1:
                return mesh_utils.create_device_mesh(
                    inside, devices, allow_split_physical_axes=split
                )
            return mesh_utils.create_hybrid_device_mesh(
                inside, (slices, 1), devices, allow_split_physical_axes=split
            )
        except NotImplementedError as error:
            problem = error
    raise UserError(f"a mesh of data, fsdp = {sizes} cannot be laid out: {problem}")


@contextmanager
def program_for(mesh: Mesh | None) -> Iterator[None]:
    """Functions that are traced inside know the mesh that they will run on (`mesh_in_use`)."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def mesh_in_use() -> Mesh | None:
    """The mesh of the `program_for` around; None where there is none."""
    return _MESH.get()


def device_in_use() -> jax.Device:
    """One of the devices that a program is for."""
    mesh = mesh_in_use()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def platform_in_use() -> str:
    """Of the devices that a program is for: JAX's name, such as "tpu"."""
    return device_in_use().platform


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def keep_rows(x: jax.Array) -> jax.Array:
    """x [B, …], and its gradient, split as a batch is in a program for a mesh, if B divides."""
    mesh = mesh_in_use()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def gathered(kernel: jax.Array) -> jax.Array:
    """A convolution's kernel, whole on each device of a program's mesh, and its gradient likewise.

    Where fsdp alone splits the rows, XLA does not gather a kernel that fsdp splits too: it
    convolves with each device's part in turn, which takes a TPU up to twelve times as long by its
    compiler's estimate. Where data splits the rows as well it gathers by itself.
    """
    mesh = mesh_in_use()
    if mesh is None or mesh.shape["fsdp"] == 1 or mesh.shape["data"] > 1:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, replicated(mesh))


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's name "a/b/c", of its path in a tree as jax.tree_util has it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their names, in its order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {leaf_name(path): leaf for path, leaf in leaves}


def infer_shardings(abstract: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs.

    Tactics: "fsdp" splits the largest dimension that the fsdp axis divides (leaves under
    MIN_SHARDED_SIZE elements stay whole); "replicate" keeps a copy on each device. Optimiser
    moments and EMA have their parameter's path and shape inside them, so they fall alike.
    """

    def infer(path, leaf) -> NamedSharding:
        name = leaf_name(path)
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


def check_batch_size(
    batch_size: int, mesh: Mesh, *, accumulation: int = 1, name: str, axes: Sequence[str] = AXES
) -> None:
    """Raises a UserError unless each part of the mesh gets a whole part of each micro-batch.

    Args:
      axes: those of the mesh that the rows must divide over.
    """
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size < 1 or batch_size % (devices * accumulation):
        detail = f" times {accumulation} micro-batches" if accumulation > 1 else ""
        raise UserError(
            f"{name}={batch_size} does not divide over {devices} devices ({' x '.join(axes)})"
            f"{detail}; expected a multiple of {devices * accumulation}"
        )


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """The leading dimension over data and fsdp; over data alone where both do not divide it."""
    if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
        return batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec("data"))


def on_rows(batch: Any, mesh: Mesh) -> Any:
    """The shapes of a whole batch, arrays or ShapeDtypeStructs, with its rows' shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=rows_sharding(mesh, leaf.shape[0])
        ),
        batch,
    )


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The numbers of the rows of a batch that this process's devices hold, ascending."""
    places = rows_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))


def to_mesh(local_batch: Any, whole: Any) -> Any:
    """Each process's rows of a batch (`own_rows`), joined to global arrays of these shapes.

    Args:
      whole: a tree of ShapeDtypeStructs with shardings (`on_rows`), of local_batch's structure.
    """

    def join(rows: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
        own = own_rows(shape.sharding.mesh, shape.shape[0])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape.shape[0])
            first = np.searchsorted(own, start)
            return rows[first : first + stop - start]

        return jax.make_array_from_callback(shape.shape, shape.sharding, part)

    return jax.tree.map(join, local_batch, whole)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree of arrays or ShapeDtypeStructs, with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def bytes_a_device(tree: Any) -> int:
    """Of the parts of a tree of ShapeDtypeStructs with shardings that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def to_host(leaf: jax.Array) -> np.ndarray:
    """A copy of a whole leaf on the host, put together from its devices' parts.

    Every process calls it for the same leaves in the same order and gets the whole. Where a process
    does not hold all parts, the leaf is whole on each device meanwhile; nothing of it stays there.
    """
    parts: dict[int, set] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        parts.setdefault(device.process_index, set()).add(_bounds(index))
    if any(own != set.union(*parts.values()) for own in parts.values()):
        leaf = _whole(leaf, replicated(leaf.sharding.mesh))
    whole, done = np.empty(leaf.shape, leaf.dtype), set()
    for shard in leaf.addressable_shards:
        if (bounds := _bounds(shard.index)) not in done:
            # An array keeps what NumPy makes of it on the host, and the copy goes with it.
            whole[shard.index] = np.asarray(jnp.copy(shard.data))
            done.add(bounds)
    return whole


@functools.partial(jax.jit, static_argnums=1)
def _whole(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, sharding)


def _bounds(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    """An index of slices as something that sets can hold."""
    return tuple((part.start, part.stop) for part in index)


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays on their devices, leaf by leaf; every process holds the same values."""

    def put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)
