"""Batches of a random-access source, the same on any number of processes, through Grain."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from dmd_jax.errors import UserError

# Each element in flight is a whole batch, so few are enough and more would only fill the memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


def batches(
    source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    start: int = 0,
    rows: Sequence[int] | None = None,
    used: Callable[[int], bool] = lambda number: True,
) -> grain.DatasetIterator:
    """An endless iterator of batches, each a dict of NumPy arrays stacked along a first axis.

    The global batch k is a function of the source, batch_size, seed, start and k alone: the epochs
    follow each other without a gap (a batch may span several), each visits every record once,
    and each is shuffled differently. A process gets its rows of it and reads only those records.

    get_state() is a JSON-able dict that counts the batches handed out, not those read ahead, and
    is the same for every process of any number; set_state() continues exactly there.

    Args:
      source: anything with `len(source)` and `source[i] -> dict of arrays`, safe to read from
        several threads, such as `open_images` and `PairSource` give. Where it has an attribute
        `at_once`, so many records of a batch are asked for at the same time.
      batch_size: examples in the global batch.
      seed: any whole number of at least 0.
      start: examples that were taken before, perhaps in batches of another size.
      rows: this process's, by their numbers in the global batch (`sharding.own_rows`); all of them
        by default.
      used: whether anyone looks at batch k; of one that nobody does no record is read, and its
        arrays are zeros.

    Raises UserError for an empty source, a negative seed, and a batch_size below 1. Errors of the
    source come out of next().
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: expected at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: expected a whole number of at least 0")
    if len(source) == 0:
        raise UserError("the data set is empty, expected at least one example")
    rows = range(batch_size) if rows is None else rows
    order = EpochOrder(len(source), seed) if shuffle else None
    local = _LocalBatches(source, batch_size, start, [int(row) for row in rows], order, used)
    return iter(grain.MapDataset.source(local).to_iter_dataset(_READ_OPTIONS))


class Together:
    """Several endless iterators of batches as one, whose batches are {name: that one's batch}.

    get_state() and set_state() are those of all, by name. It may be of none.
    """

    def __init__(self, iterators: Mapping[str, grain.DatasetIterator]):
        self._iterators = iterators

    def __iter__(self) -> Iterator[dict[str, dict[str, np.ndarray]]]:
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        return {name: next(iterator) for name, iterator in self._iterators.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: iterator.get_state() for name, iterator in self._iterators.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, iterator in self._iterators.items():
            iterator.set_state(state[name])


class EpochOrder:
    """Endless positions to the records of epochs that follow each other without a gap.

    order(position) is a record's number in 0..size-1; each epoch has every record once, in an
    order of its own, which is a function of the seed and the epoch. May be used from threads.

    Grain's own shuffle is not used: it takes milliseconds for each record of a source of fewer
    than a hundred, and its epoch e with seed s is epoch 0 of seed s + e.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        # The threads work on neighbouring batches, so on two epochs at most unless they are tiny.
        self._permutation = functools.lru_cache(maxsize=2)(self._permuted)

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self._size)
        return int(self._permutation(epoch)[offset])

    def _permuted(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._size)


class _LocalBatches:
    """Item k is these rows of the global batch k."""

    def __init__(
        self,
        source,
        batch_size: int,
        start: int,
        rows: list[int],
        order: EpochOrder | None,
        used: Callable[[int], bool],
    ):
        self._source = source
        self._batch_size, self._start, self._rows = batch_size, start, rows
        self._order, self._used = order, used
        self._unread: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        if not self._used(k):
            if self._unread is None:
                self._unread = {
                    name: np.zeros((len(self._rows), *np.shape(value)), np.asarray(value).dtype)
                    for name, value in self._source[0].items()
                }
            return self._unread
        first = k * self._batch_size + self._start
        positions = [first + row for row in self._rows]
        at_once = getattr(self._source, "at_once", 1)
        if at_once == 1:
            records = [self._record(position) for position in positions]
        else:
            with ThreadPoolExecutor(at_once) as pool:
                records = list(pool.map(self._record, positions))
        return {name: np.stack([record[name] for record in records]) for name in records[0]}

    def _record(self, position: int) -> dict[str, np.ndarray]:
        return self._source[self._order(position) if self._order else position % len(self._source)]
