"""The progress line of a conversion."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dmd_jax.metrics import Progress

_SECONDS_BETWEEN_UPDATES = 2.0


class Meter:
    """Counts parameters, and now and then shows how many of `total` there are."""

    def __init__(self, total: int, *, name: str = "convert", enabled: bool = True):
        self._progress = Progress(name, total, unit="parameters", enabled=enabled)
        self._done, self._updated = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._updated > _SECONDS_BETWEEN_UPDATES:
            self._progress.update(self._done)
            self._updated = time.monotonic()

    def watching(self, leaf_of: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """The same function, whose arrays are counted."""

        def counted(name: str) -> np.ndarray:
            array = leaf_of(name)
            self.add(array.size)
            return array

        return counted
