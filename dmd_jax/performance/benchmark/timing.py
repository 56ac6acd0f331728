"""Times rivals in turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# A unit of work, which returns when it is done.
Work = Callable[[], Any]


def in_turns(
    rivals: Mapping[str, Work],
    rounds: int,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, np.ndarray]:
    """Seconds of each rival's unit of work in each round, [rounds].

    Every second round is in the opposite order, so that none always runs on another's heels.

    Args:
      rounds: that are counted, at least 1. warm_up: rounds before them, which are not.
      told: how many rounds are done, after each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warm_up + rounds):
        for name in list(rivals)[:: -1 if number % 2 else 1]:
            began = clock()
            rivals[name]()
            seconds[name].append(clock() - began)
        told(number + 1)
    return {name: np.array(all_of_it[warm_up:]) for name, all_of_it in seconds.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """The median of some durations, and how they spread."""
    return {**_spread(seconds), "fastest": float(np.min(seconds)), "count": len(seconds)}


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How many times longer than `base` something took: medians, and the rounds' spread.

    Args:
      seconds, base: of the same rounds, from `in_turns`.

    Returns:
      "median", the ratio of the medians; "p10" and "p90" of the ratios of the single rounds.
    """
    rounds = _spread(np.asarray(seconds) / np.asarray(base))
    return rounds | {"median": float(np.median(seconds) / np.median(base))}


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "p10": float(low), "p90": float(high)}
