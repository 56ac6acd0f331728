"""Processes on CPU get to know each other before they compile."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dmd_jax.parallel.processes import wait_for_all


def introduce(mesh: Mesh) -> None:
    """Connects the processes of CPU devices along every set of the mesh's axes.

    Gloo gives processes 30 seconds to come to what they first exchange in a group of devices. They
    compile first, which on a machine that is loaded takes one of them longer than that. Where the
    connections are there already, nobody is late.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [
        group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)
    ]

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False)
    def exchange():
        return [jax.lax.psum(jnp.ones(()), group) for group in groups]

    compiled = exchange.lower().compile()
    wait_for_all()
    jax.block_until_ready(compiled())
