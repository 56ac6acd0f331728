"""Benchmark results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmd_jax.method.precision import products

_UNKNOWN = "unknown"
_HEADS = (
    "",
    "median",
    "10 to 90 %",
    "images/s",
    "TFLOP/s",
    "utilisation",
    "memory",
    "compiled in",
    "times ours",
)


def table(results: dict[str, Any]) -> str:
    """The results of `dmd-jax bench` as lines of text."""
    parts = [results["machine"], f"{results['config']}, {products(results)}"]
    for heat in results["heats"]:
        gigaflops = heat["flops"] / 1e9
        title = f"{heat['title']}, {heat['images']} images, {gigaflops:,.1f} GFLOP"
        ran = [_row(rival) for rival in heat["rivals"] if "error" not in rival]
        failed = [
            f"{rival['name']} did not run: {rival['error']}"
            for rival in heat["rivals"]
            if "error" in rival
        ]
        parts += ["", title, *_aligned([_HEADS, *ran]), *failed]
        ours = heat["rivals"][0]
        if "donated" in ours:
            parts.append(f"the state's memory is taken over by each step: {_yes(ours['donated'])}")
    return "\n".join(parts)


def _row(rival: dict[str, Any]) -> tuple[str, ...]:
    seconds, compiled = rival["seconds"], rival.get("compile_seconds")
    utilisation, memory = rival["utilisation"], rival.get("peak_bytes")
    return (
        rival["name"],
        _milliseconds(seconds["median"]),
        f"{_milliseconds(seconds['p10'])} to {_milliseconds(seconds['p90'])}",
        f"{rival['images_per_second']:.4g}",
        f"{rival['flops_per_second'] / 1e12:.4g}",
        _UNKNOWN if utilisation is None else f"{utilisation:.1%}",
        _UNKNOWN if memory is None else f"{memory / 2**30:.2f} GiB",
        "" if compiled is None else f"{compiled:.1f} s",
        _times(rival.get("ratio")),
    )


def _times(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _yes(true: bool) -> str:
    return "yes" if true else "NO"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
