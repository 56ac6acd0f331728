"""What is known of a compiled program, as numbers."""

from __future__ import annotations

from typing import Any

from dmd_jax.performance.compilation import dumps, hlo
from dmd_jax.performance.compilation.kernels import kernel_cycles
from dmd_jax.performance.compilation.topology import Chip

# Of a chip's memory, what a program may take: the rest is the runtime's and other programs'.
MOST_MEMORY = 0.92


def figures(compiled: Any, chip: Chip | None, *, flops: float, images: int) -> dict[str, Any]:
    """Per device, JSON-able; bytes and seconds.

    Args:
      compiled: of `lowered.compile()`.
      chip: None where it is for a processor of no published figures.
      flops: of one device's share of the step, as its model needs them.
      images: of one step on all devices.

    Returns:
      "memory" with "arguments", "outputs", "aliased" (outputs in the place of arguments),
      "temporaries", "code" and "total"; "aliased_outputs", their number; "collective_bytes" by
      kind; "flops"; "xla_cost", XLA's own cost_analysis, which counts a loop's body once and a
      kernel as -1 second. With a chip also memory's "share" of it, "fits", "cycles" as the
      compiler estimates them and of these the "costliest" operators', "kernel_cycles" and
      "collective_seconds" as we do, "step_seconds" as if nothing of these overlapped,
      "images_per_second" and "utilisation".
    """
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]
    text = compiled.as_text()
    totals = hlo.totals(hlo.parse(text))
    cost = compiled.cost_analysis() or {}
    names = ("flops", "bytes accessed", "optimal_seconds")
    found = _shared(memory, text, totals, flops, chip)
    found["xla_cost"] = {name: cost[name] for name in names if name in cost}
    if chip is None:
        return found
    in_kernels = sum(
        count * kernel_cycles(kernel, chip) for kernel, count in totals.kernels.items()
    )
    # An all-reduce is a reduce-scatter and an all-gather of the sums.
    sent = totals.collective_bytes.total() + totals.collective_bytes["all-reduce"]
    on_links = sent / chip.interconnect
    seconds = (totals.cycles + in_kernels) / chip.clock + on_links
    return found | {
        "cycles": totals.cycles,
        "costliest": dict(totals.operators.most_common(12)),
        "kernel_cycles": in_kernels,
        "collective_seconds": on_links,
        "step_seconds": seconds,
        "images_per_second": images / seconds,
        "utilisation": flops / seconds / chip.peak_flops,
    }


def early_figures(assigned: dumps.Assigned, chip: Chip, *, flops: float) -> dict[str, Any]:
    """What is known before the machine code is made: of `figures` the memory but for the code, the
    traffic and the FLOPs; and "largest", the largest buffers."""
    memory = dumps.memory_of(assigned.buffers)
    memory["total"] = sum(memory.values())
    totals = hlo.totals(hlo.parse(assigned.program))
    found = _shared(memory, assigned.program, totals, flops, chip)
    return found | {"largest": dumps.largest_of(assigned.report)}


def _shared(
    memory: dict[str, Any], text: str, totals: hlo.Totals, flops: float, chip: Chip | None
) -> dict[str, Any]:
    found = {
        "memory": memory,
        "aliased_outputs": hlo.aliased(text),
        "collective_bytes": dict(totals.collective_bytes),
        "flops": flops,
    }
    if chip is not None:
        memory["share"] = memory["total"] / chip.hbm_bytes
        found["fits"] = memory["share"] <= MOST_MEMORY
    return found
