"""What the TPU compiler says of a program that does not fit."""

from __future__ import annotations

import re
from typing import Any

from dmd_jax.errors import first_line

# Its wordings: of a whole program, and of one whose temporaries alone are too large.
_SIZES = (
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm",
    r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)",
)


def refusal(error: BaseException) -> dict[str, Any]:
    """The facts of a refusal, JSON-able.

    Returns:
      "message", a line; where it is the memory, "used" and "available" as the compiler writes
      them, such as "19.9G" and "15.75G"; "largest", the buffers that it names, largest first:
      "size", "shape" and "operator", JAX's name of what makes it.
    """
    text = str(error)
    found: dict[str, Any] = {"message": first_line(error), "largest": []}
    for pattern in _SIZES:
        if sizes := re.search(pattern, text):
            found |= {"used": sizes[1], "available": sizes[2]}
            break
    for part in re.split(r"\n\s*\d+\. ", text)[1:9]:
        if size := re.search(r"Size: (\S+)", part):
            shape = re.search(r"Shape: (\S+)", part)
            operator = re.search(r'op_name="([^"]*)"', part)
            found["largest"].append(
                {
                    "size": size[1],
                    "shape": shape[1] if shape else "",
                    "operator": operator[1] if operator else "",
                }
            )
    return found
