"""What XLA writes while it compiles: the program's memory is known long before its code is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)", re.M)
_LARGE = re.compile(r"^\s+\S+\(\s*\d+%\);\s+(\S+);\s+\d+;\s+\d+; (.+)$", re.M)
_BUFFERS = "after_optimizations-buffer-assignment.txt"
_REPORT = "after_optimizations-memory-usage-report.txt"
_PROGRAM = "after_optimizations_after_buffer_assignment.txt"


def compiler_options(folder: Path) -> dict[str, Any]:
    """For `lowered.compile`, so that XLA writes to the folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


class Assigned(NamedTuple):
    """A program whose buffers have their places."""

    buffers: str  # each allocation and what lies there
    report: str  # on the largest
    program: str  # in its final order


def find(folder: Path) -> Assigned | None:
    """What the TPU compiler wrote, once it is whole."""
    found = [_largest(folder, name) for name in (_BUFFERS, _REPORT, _PROGRAM)]
    # The program is written last.
    if None in found or not _ends_well(found[2]):
        return None
    return Assigned(*(path.read_text(errors="replace") for path in found))


def _largest(folder: Path, name: str) -> Path | None:
    """The main program's file: those of the shapes' keys are small, and for this processor."""
    paths = [path for path in folder.glob(f"*.{name}") if ".cpu_" not in path.name]
    return max(paths, key=lambda path: path.stat().st_size, default=None)


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 16, 0))
        return file.read().rstrip().endswith(b"}")


def memory_of(buffers: str) -> dict[str, int]:
    """Bytes of a chip's HBM by a buffer assignment: "arguments", with the outputs in their place,
    and "temporaries" with all else. The code and the runtime's own are not among them."""
    memory = {"arguments": 0, "temporaries": 0}
    for size, rest in _ALLOCATION.findall(buffers):
        if "color " in rest or "thread-local" in rest:
            continue  # in the chip's own memory
        memory["arguments" if "parameter" in rest else "temporaries"] += int(size)
    return memory


def largest_of(report: str, count: int = 8) -> list[dict[str, str]]:
    """The largest buffers of a memory report: "size" and the "shape" of what lies there."""
    report = report.partition("Memory Space: vmem")[0]
    found = [{"size": size, "shape": shape.strip()} for size, shape in _LARGE.findall(report)]
    return found[:count]
