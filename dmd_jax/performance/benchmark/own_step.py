"""Our side of a training step: the program that `dmd-jax train` runs, on random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.distillation.from_config import shardings_of
from dmd_jax.distillation.program import abstract_program
from dmd_jax.models import complete
from dmd_jax.parallel.sharding import bytes_a_device
from dmd_jax.performance.benchmark.random_arrays import in_host_memory, random_batch, random_weights
from dmd_jax.performance.flops import mean_flops


class OwnStep:
    """The config's train step, compiled, with a state, frozen networks and a batch on the mesh.

    Attributes:
      images: of a step. flops: that its model needs, in the mean over steps, without what is
        computed again for memory. uneven: whether some steps leave a player alone.
      frozen: from `prepare` on, the parameters that the step only reads.
      batch: what it takes besides. state: the TrainState, replaced by each step.

    Raises:
      UserError: the config asks for something impossible.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._config, self._program = config, abstract_program(config, mesh)
        self.images, self.flops = config.batch_size, mean_flops(config)
        self.uneven = config.objective.get("generator_every", 1) > 1

    def prepare(self) -> None:
        """Compiles the step, and makes on the devices what it takes."""
        program = self._program
        lowered = program.step(self._config).lower(*program.arguments(self._config))
        began = time.perf_counter()
        self._compiled = lowered.compile()
        self._facts = {"compile_seconds": time.perf_counter() - began}
        self._facts["state_bytes"] = bytes_a_device(program.state)
        self.frozen, self.batch = self._inputs(lambda abstract: abstract)
        initialize = jax.jit(program.initialize, out_shardings=shardings_of(program.state))
        self.state = initialize(self.frozen, {})

    def on_host(self) -> tuple[Any, Any]:
        """`frozen` and `batch` once more, in NumPy, which takes none of the devices' memory.

        Raises:
          UserError: see in_host_memory.
        """
        return jax.device_get(self._inputs(in_host_memory))

    def _inputs(self, placed: Callable[[Any], Any]) -> tuple[Any, Any]:
        _, frozen, batch = map(placed, self._program.arguments(self._config))
        return random_weights(frozen), random_batch(batch, _limits(self._config))

    def __call__(self) -> dict[str, jax.Array]:
        """One step; returns its metrics, ready."""
        self.state, metrics = self._compiled(self.state, self.frozen, self.batch)
        of_all = {name: value for found in metrics.values() for name, value in found.items()}
        return jax.block_until_ready(of_all)

    def facts(self) -> dict[str, Any]:
        """What is known of it besides its speed, JSON-able. It makes two steps.

        "compile_seconds", without tracing; "state_bytes" on a device; "donated", whether each of
        the two steps took over the memory of the state before; and `memory_facts`.
        """
        taken = []
        for _ in range(2):
            before = jax.tree.leaves(self.state)
            self()
            taken += [leaf.is_deleted() for leaf in before]
        return self._facts | {"donated": all(taken)} | memory_facts(self._compiled)

    def release(self) -> None:
        """Frees the devices' memory."""
        delete((self.state, self.frozen, self.batch))


def memory_facts(compiled: Any) -> dict[str, Any]:
    """The memory of a program that has run, in bytes on a device.

    Returns:
      "memory", the compiler's account, or None where it gives none; "peak_bytes", the device's own
      count of the most that was in use, or, of devices that do not count, what follows from the
      account: arguments, outputs and temporaries, less what outputs take over of the arguments.
    """
    account, analysis = None, compiled.memory_analysis()
    if analysis is not None:
        account = {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "aliased": analysis.alias_size_in_bytes,
        }
    counted = jax.local_devices()[0].memory_stats()
    peak = None if counted is None else counted.get("peak_bytes_in_use")
    if peak is None and account is not None:
        peak = sum(account.values()) - 2 * account["aliased"]
    return {"memory": account, "peak_bytes": peak}


def delete(tree: Any) -> None:
    """Frees the memory of a tree's arrays."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def _limits(config: ConfigDict) -> dict[str, int]:
    """What the integers in a batch are below, by name."""
    network = complete(config.network.to_dict())
    if not config.teacher.text_encoder:
        return {"label": max(network["label_dim"], 1)}
    vocabulary = complete(config.teacher.text_encoder.to_dict())["vocab_size"]
    return {"tokens": vocabulary}
