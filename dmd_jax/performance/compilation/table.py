"""The figures of a compiled program as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmd_jax.method.precision import products
from dmd_jax.performance.compilation.figures import MOST_MEMORY


def table(result: dict[str, Any]) -> str:
    """Lines of a name and a value; the dictionary is that of `dmd-jax compile --json`."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    slices = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    rows = [
        ("program", f"{result['what']} of {result['config']}"),
        ("devices", f"{slices}{result['topology']}: {result['devices']}, mesh {mesh}"),
        ("batch", _batch(result)),
    ]
    if "refusal" in result:
        rows += _refused(result["refusal"])
    else:
        rows += _memory(result) + _work(result)
    traced = f", traced in {result['trace_seconds']:.0f} s" if "trace_seconds" in result else ""
    rows.append(("compiled in", f"{result['compile_seconds']:.0f} s{traced}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One row a program, in Markdown; per device."""
    columns = {
        "program": _program,
        "slice": lambda one: one["topology"],
        "devices": lambda one: str(one["devices"]),
        "mesh": lambda one: "x".join(str(size) for size in one["mesh"].values()),
        "images": lambda one: f"{one['images']:,}",
        "products": products,
        "state": lambda one: size(one["state_bytes"]),
        "HBM": lambda one: f"{one['memory']['share']:.1%}",
        "FLOPs": lambda one: _operations(one["flops"]),
        "XLA's FLOPs": lambda one: _operations(one["xla_cost"]["flops"]),
        "collectives": lambda one: size(sum(one["collective_bytes"].values())),
        "step": lambda one: f"{one['step_seconds'] * 1e3:,.1f} ms",
        "utilisation": lambda one: f"{one['utilisation']:.1%}",
    }
    rows = [list(columns), ["---"] * len(columns)]
    for result in results:
        rows.append([_cell(column, result) for column in columns.values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _program(result: dict[str, Any]) -> str:
    """Such as "cifar10_cond" or "cifar10_cond, sample"."""
    name = Path(result["config"].split()[0].partition(":")[0]).stem
    return name if result["what"] == "train" else f"{name}, {result['what']}"


def _cell(column: Callable[[dict[str, Any]], str], result: dict[str, Any]) -> str:
    """A figure, or a dash where there is none: of a refusal, or before the code is made."""
    try:
        return column(result)
    except KeyError:
        return "–"


def size(count: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _operations(count: float) -> str:
    return f"{count / 1e12:,.2f} T" if count >= 1e11 else f"{count / 1e9:,.3f} G"


def _batch(result: dict[str, Any]) -> str:
    text = f"{result['images']:,} images, {result['images'] / result['devices']:g} a device"
    if "accumulation" in result:
        text += (
            f", and {result['regression_images']:,} pairs; {result['accumulation']} micro-batches, "
            f"remat {result['remat']}"
        )
    else:
        text += f"; {result['sampler']}, {result['sampling_steps']} steps"
    return f"{text}, {products(result)}"


def _refused(refusal: dict[str, Any]) -> list[tuple[str, str]]:
    if "used" in refusal:
        rows = [("does not fit", f"{refusal['used']} of {refusal['available']} HBM a chip")]
    else:
        rows = [("refused", refusal["message"])]
    return rows + [
        ("largest buffer", f"{one['size']}  {one['shape']}  {one['operator']}")
        for one in refusal["largest"]
    ]


def _memory(result: dict[str, Any]) -> list[tuple[str, str]]:
    memory = result["memory"]
    parts = ", ".join(
        f"{name} {size(memory[name])}"
        for name in ("arguments", "outputs", "aliased", "temporaries", "code")
        if name in memory
    )
    rows = [("memory a device", f"{size(memory['total'])} ({parts})")]
    if "share" in memory:
        word = "fits" if result["fits"] else "does not fit"
        before = "" if "code" in memory else " before the machine code, which adds to it"
        used = f"{memory['share']:.1%} of the chip's HBM{before}"
        rows.append((word, f"{used}; at most {MOST_MEMORY:.0%} should be"))
    rows += [
        ("large buffer", f"{one['size']}  {one['shape']}") for one in result.get("largest", ())
    ]
    return rows


def _work(result: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{kind} {size(n)}" for kind, n in result["collective_bytes"].items())
    rows = [
        ("model FLOPs a device", _operations(result["flops"])),
        ("collectives a device", kinds or "none"),
    ]
    if "step_seconds" in result:
        rows += [
            (
                "estimate",
                f"{result['step_seconds'] * 1e3:.1f} ms a step: {result['cycles'] / 1e6:,.1f} M "
                f"cycles by the compiler, {result['kernel_cycles'] / 1e6:,.1f} M in kernels and "
                f"{result['collective_seconds'] * 1e3:.1f} ms of traffic by us",
            ),
            ("images a second", f"{result['images_per_second']:,.0f}"),
            ("utilisation", f"{result['utilisation']:.1%} of the chip's peak"),
        ]
        rows += [
            ("cycles of", f"{count / result['cycles']:6.1%}  {operator}")
            for operator, count in result["costliest"].items()
        ]
    return rows
