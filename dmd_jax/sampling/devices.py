"""A process's devices, which share the rows of batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dmd_jax.parallel.sharding import batch_sharding, make_mesh, place, program_for, replicated


class LocalDevices:
    """This process's devices, which share the rows of batches of one size.

    Args:
      batch_size: rows at a time; rounded up to a multiple of the devices.
      devices: all of them by default.
    """

    def __init__(self, batch_size: int, devices: Sequence[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        self._mesh = make_mesh(devices=devices)
        self.batch_size = -(-batch_size // len(devices)) * len(devices)

    def replicate(self, tree: Any) -> Any:
        """A copy of a tree of host arrays on each device."""
        return place(tree, jax.tree.map(lambda _: replicated(self._mesh), tree))

    def compile(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """`function` under jit; its result is a batch."""

        def on_mesh(*args: Any) -> jax.Array:
            with program_for(self._mesh):
                return function(*args)

        return jax.jit(on_mesh, out_shardings=batch_sharding(self._mesh))

    def batches(self, rows: Any) -> Iterator[tuple[int, int, Any]]:
        """Of a tree of arrays [N, …]: each batch's first row, its number of rows, and the batch.

        A batch that has fewer rows is filled up, since one shape is one program.
        """
        sharding = batch_sharding(self._mesh)
        total = len(jax.tree.leaves(rows)[0])
        for start in range(0, total, self.batch_size):
            stop = min(start + self.batch_size, total)
            part = lambda array: pad_rows(array[start:stop], self.batch_size)  # noqa: B023, E731
            yield start, stop - start, jax.device_put(jax.tree.map(part, rows), sharding)


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """rows [N, …] to [count, …], count >= N >= 1, by repeating the last row."""
    missing = count - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
