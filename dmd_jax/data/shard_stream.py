"""An ArrayRecord shard in a bucket, read through ranges that a bounded local cache keeps.

Records are read in random order over all shards, so a cache holds a record by chance when it is
asked for, and whatever else was fetched with it is wasted: the unit is one record where records are
large, as pairs are, and a run of neighbours where they are small, as prompts are, for a request
takes as long as the transfer of some tens of kilobytes.

ArrayRecord reads files on a disk alone. Each open shard has a file there of the shard's size
without content, into which the bytes of a record are put while ArrayRecord reads it; so the bytes
are checked, and damage is reported, as of a local shard.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dmd_jax.data.shard_index import BLOCK, ShardIndex, index_start, read_index
from dmd_jax.errors import UserError
from dmd_jax.storage.block_cache import BlockCache
from dmd_jax.storage.real_files import stand_in

if TYPE_CHECKING:  # which needs the extra [gcs]
    from dmd_jax.storage.buckets import BucketPath, Stored

LEAST_UNIT = 1 << 16  # bytes, about, of neighbours that are asked for together
_END = 2 * BLOCK  # bytes at the end that are asked for first; mostly they hold the index
_LARGEST_INDEX = 64 << 20  # bytes


def open_reader(path: Path) -> ArrayRecordReader:
    # No read-ahead and no thread of its own: records are read one by one in random order.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=32768)


class ShardStream:
    """The records of a shard in a bucket, with the methods of ArrayRecordReader that are used.

    May be read from several threads. A shard without a whole index has no records.

    Args:
      stored: the object as it was listed; another content of that name is refused.

    Raises:
      OSError: the object cannot be read, or was written again; here and in `read`.
      UserError: it is a shard whose index is not plain; the cache cannot be written to.
    """

    def __init__(self, path: BucketPath, stored: Stored, cache: BlockCache):
        self._path, self._stored, self._cache = path, stored, cache
        self._lock = threading.Lock()
        start, end = self._read_end()
        index = _index_of(end, start, stored.size)
        self._reader = self._open_window(start, end)
        self._num_records = self._reader.num_records()
        if index is None:
            if self._num_records:
                raise UserError(
                    f"{path}: its index is compressed or has more than {_LARGEST_INDEX >> 20} MB, "
                    "so it cannot be streamed; expected a shard as `pairs` and `prompts` write "
                    "it, or --cache-gb with twice the room for the folder"
                )
            index = ShardIndex(np.zeros(1, np.int64), 1)
        self._starts, self._group = index
        chunks, taken = len(self._starts) - 1, int(self._starts[-1] - self._starts[0])
        self._chunks_in_unit = max(1, LEAST_UNIT * chunks // max(taken, 1))

    def num_records(self) -> int:
        return self._num_records

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The record of one row, as a list.

        Raises:
          RuntimeError, IndexError: as ArrayRecordReader does.
        """
        (row,) = rows
        chunk, chunks = row // self._group, len(self._starts) - 1
        if not 0 <= chunk < chunks:
            raise IndexError(f"row {row} of {self._num_records}")
        first = chunk - chunk % self._chunks_in_unit
        unit = int(self._starts[first])
        content = self._range(unit, int(self._starts[min(first + self._chunks_in_unit, chunks)]))
        start, stop = (int(at) for at in self._starts[chunk : chunk + 2])
        with self._lock, self._shown(content[start - unit : stop - unit], start):
            return self._reader.read(rows)

    def check_kind(self, expected: str) -> None:
        """Raises a UserError where the object's first bytes show that it is no shard.

        Args:
          expected: for the message.
        """
        beginning = self._range(0, min(self._stored.size, 1024))
        if beginning and (problem := stand_in(beginning)):
            raise UserError(f"{self._path}: {problem}; expected {expected}")

    def _read_end(self) -> tuple[int, bytes]:
        """The bytes from the index on, and where they begin; fewer where there is none."""
        size = self._stored.size
        start = max(0, size - _END)
        end = self._range(start, size)
        try:
            first = index_start(end[-BLOCK:], size)
        except ValueError:
            return start, end
        if first < start and size - first <= _LARGEST_INDEX:
            return first, self._range(first, start) + end
        return start, end

    def _open_window(self, start: int, end: bytes) -> ArrayRecordReader:
        """Opens the file that ArrayRecord reads, which has no name from then on."""
        self._window = self._cache.scratch_file()
        try:
            with self._shown(end, start):
                return open_reader(Path(self._window.name))
        finally:
            os.unlink(self._window.name)

    @contextmanager
    def _shown(self, content: bytes, start: int) -> Iterator[None]:
        """While this lasts, the file that ArrayRecord reads has these bytes."""
        try:
            self._window.seek(start)
            self._window.write(content)
            self._window.truncate(self._stored.size)
            yield
        finally:
            self._window.truncate(0)
            self._window.truncate(self._stored.size)

    def _range(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        generation = self._stored.generation
        return self._cache.get(
            (str(self._path), generation, start, stop),
            lambda: self._path.read_range(start, stop, generation),
        )


def _index_of(end: bytes, start: int, size: int) -> ShardIndex | None:
    """The index among the last bytes of a shard; None where it is not there or not plain."""
    try:
        first = index_start(end[-BLOCK:], size)
        if first < start:
            return None
        return read_index(end[first - start : len(end) - BLOCK], first)
    except ValueError:
        return None
