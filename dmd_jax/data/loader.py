"""Batches of a random-access source, the same on any number of processes, through Grain."""

from __future__ import annotations

import functools
import sys

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
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of batches, each a dict of NumPy arrays stacked along a first axis.

    The global batch k is a function of the source, batch_size, seed and k alone: the epochs
    follow each other without a gap (a batch may span several), each visits every record once,
    and each is shuffled differently. Process p of P gets the rows [p * b, (p + 1) * b) of it,
    with b = batch_size / P, and reads only those records.

    get_state() is a JSON-able dict that counts the batches handed out, not those read ahead, and
    is the same for every process and every P; set_state() continues exactly there.

    Args:
      source: anything with `len(source)` and `source[i] -> dict of arrays`, safe to read from
        several threads, such as `open_images` and `PairSource` give.
      batch_size: examples in the global batch.
      seed: any whole number of at least 0.

    Raises UserError for an empty source, a negative seed, and a batch_size that the processes
    cannot share equally. Errors of the source come out of next().
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size}: expected a multiple of the number of processes, "
            f"{process_count}"
        )
    if seed < 0:
        raise UserError(f"seed {seed}: expected a whole number of at least 0")
    if len(source) == 0:
        raise UserError("the data set is empty, expected at least one example")
    share = batch_size // process_count
    local = _LocalBatches(source, batch_size, process_index * share, share, seed, shuffle)
    return iter(grain.MapDataset.source(local).to_iter_dataset(_READ_OPTIONS))


class _LocalBatches:
    """Item k is `share` rows of the global batch k, from row `first` on.

    Grain's own shuffle is not used: it takes milliseconds for each record of a source of fewer
    than a hundred, and its epoch e with seed s is epoch 0 of seed s + e.
    """

    def __init__(self, source, batch_size: int, first: int, share: int, seed: int, shuffle: bool):
        self._source = source
        self._batch_size, self._first, self._share = batch_size, first, share
        self._seed, self._shuffle = seed, shuffle
        # The threads work on neighbouring batches, so on two epochs at most unless they are tiny.
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        first = k * self._batch_size + self._first
        records = [self._record(position) for position in range(first, first + self._share)]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}

    def _record(self, position: int) -> dict[str, np.ndarray]:
        epoch, offset = divmod(position, len(self._source))
        return self._source[int(self._order(epoch)[offset]) if self._shuffle else offset]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
