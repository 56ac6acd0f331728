"""How long one image takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP = 3
PERCENTILES = (50, 90, 99)


def latency(make: Callable[[int], Any], count: int) -> dict[str, Any]:
    """Seconds from the call of `make` until it returns.

    Args:
      make: i -> an image, ready on the host. It is called WARM_UP times more than is counted, for
        compilation and caches, and those calls are left out.
      count: calls that are counted, at least 1.

    Returns:
      "seconds": {"p50", "p90", "p99", "mean"}, the percentiles by linear interpolation; "count"
      and "warm_up".
    """
    seconds = []
    for index in range(WARM_UP + count):
        began = time.perf_counter()
        make(index)
        seconds.append(time.perf_counter() - began)
    counted = seconds[WARM_UP:]
    found = {f"p{p}": float(np.percentile(counted, p)) for p in PERCENTILES}
    found["mean"] = float(np.mean(counted))
    return {"seconds": found, "count": count, "warm_up": WARM_UP}
