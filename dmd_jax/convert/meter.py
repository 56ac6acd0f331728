"""The progress line of a conversion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dmd_jax.progress import Pace, Progress


class Meter:
    """Counts parameters, and now and then shows how many of `total` there are."""

    def __init__(self, total: int, *, name: str = "convert", enabled: bool = True):
        self._progress = Progress(name, total, unit="parameters", enabled=enabled)
        self._done, self._pace = 0, Pace()

    def add(self, count: int) -> None:
        self._done += count
        if self._pace.due():
            self._progress.update(self._done)

    def watching(self, leaf_of: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """The same function, whose arrays are counted."""

        def counted(name: str) -> np.ndarray:
            array = leaf_of(name)
            self.add(array.size)
            return array

        return counted
