"""The table of a network's parameters that a run begins with."""

from __future__ import annotations

import sys
from typing import Any

from clu import parameter_overview

_MOST = 24  # lines of the table; the total is of all


def tell_parameters(command: str, name: str, params: Any) -> None:
    """Prints on stderr the names, shapes, types, sizes and shardings of a tree's leaves.

    Args:
      command: that prints it. name: of the network.
      params: arrays, or ShapeDtypeStructs with shardings.
    """
    table = parameter_overview.get_parameter_overview(
        params, include_stats="sharding", max_lines=_MOST
    )
    print(f"{command}: the parameters of the {name}\n{table}", file=sys.stderr, flush=True)
