"""Noise-image pairs of the teacher: ArrayRecord shards beside a metadata.json.

A folder holds metadata.json (the fields of PairsMetadata) and the shards
pairs-00000-of-00040.array_record, …; shard s holds the pairs s * shard_size and following. One
record is one pair: z_ref and y_ref as little-endian float32 in row-major order, then the label as
little-endian int32, which is 8 * H * W * C + 4 bytes. ArrayRecord keeps and checks a 64-bit hash
of every record, so a record that was damaged on disk is noticed when it is read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import operator
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dmd_jax.data.pairs_metadata import METADATA_FILE, PairsMetadata, read_metadata
from dmd_jax.errors import UserError

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files


def write_pairs(
    folder: str | os.PathLike,
    metadata: PairsMetadata,
    make_shard: Callable[[int, int], Mapping[str, np.ndarray]],
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the shards of this process that are not finished yet: process_index::process_count.

    A shard is written under a temporary name and renamed when it is whole and on the disk, so a
    run that was stopped anywhere is continued by the same call. A shard under its own name that
    does not hold its number of pairs is torn: it is reported through logging and made again.

    Args:
      folder: made if need be; all processes share it.
      metadata: must equal that of the folder, if it has one.
      make_shard: (start, stop) -> "z_ref" and "y_ref" float32 [stop - start, *sample_shape] and
        "label" integers [stop - start], for the pairs with these numbers. To be a function of
        the two alone, or a resumed run differs from one that was never stopped.
      progress: called with this process's pairs that are done and its pairs in all; first with
        what was found finished, then after each shard.

    Raises UserError if the folder holds other pairs (naming the keys that differ; nothing is
    overwritten), if it cannot be written to (finished shards are kept), and if make_shard
    returns non-finite values or labels outside 0..num_classes-1.
    """
    folder = Path(folder)
    _claim_folder(folder, metadata, process_index)
    shards = range(process_index, metadata.num_shards, process_count)
    sizes = {shard: len(range(*metadata.shard_range(shard))) for shard in shards}
    missing = [s for s in shards if not _is_whole(folder / metadata.shard_name(s), sizes[s])]
    total = sum(sizes.values())
    done = total - sum(sizes[shard] for shard in missing)
    if progress:
        progress(done, total)
    for shard in missing:
        start, stop = metadata.shard_range(shard)
        records = _pack(make_shard(start, stop), metadata, start, stop)
        _write_shard(folder / metadata.shard_name(shard), records)
        done += stop - start
        if progress:
            progress(done, total)


class PairSource:
    """The pairs of a finished folder as a random-access source for the loader.

    source[i] -> {"z_ref": float32 [H, W, C], "y_ref": float32 [H, W, C], "label": int32}; the
    arrays are read-only. Shards are opened when they are first read. May be pickled, and
    read from several threads.

    Args:
      folder: as write_pairs left it.
      sample_shape, num_classes: what the reader's configuration expects.

    Raises UserError if metadata.json is missing, damaged or differs from what is expected; if
    shards are missing or truncated; and, when a pair is read, if its record is damaged or its
    label is outside 0..num_classes-1.
    """

    def __init__(
        self, folder: str | os.PathLike, *, sample_shape: tuple[int, ...], num_classes: int
    ):
        self._folder = Path(folder)
        self.metadata = read_metadata(folder)
        self.sample_shape = self.metadata.sample_shape
        self.num_classes = self.metadata.num_classes
        self._check_expected(tuple(sample_shape), num_classes)
        self._check_shards()
        self._dtype = self.metadata.record_dtype
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()

    def _check_expected(self, sample_shape: tuple[int, ...], num_classes: int) -> None:
        for name, found, expected in (
            ("resolution", self.sample_shape[:-1], sample_shape[:-1]),
            ("channels", self.sample_shape[-1], sample_shape[-1]),
            ("num_classes", self.num_classes, num_classes),
        ):
            if found != expected:
                raise UserError(
                    f"{self._folder}: pairs have {name} {found}, expected {expected} "
                    "as the configuration says"
                )

    def _check_shards(self) -> None:
        shards = range(self.metadata.num_shards)
        present = set(os.listdir(self._folder))
        missing = [name for name in map(self.metadata.shard_name, shards) if name not in present]
        if missing:
            named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"{self._folder}: {len(missing)} of {len(shards)} shards are missing ({named}): "
                "not finished, run pairs again"
            )
        for shard in shards:
            path = self._folder / self.metadata.shard_name(shard)
            start, stop = self.metadata.shard_range(shard)
            found = _count_records(path)
            if found != stop - start:
                raise UserError(
                    f"{path}: truncated or damaged, {found} pairs are readable, expected "
                    f"{stop - start}: run pairs again to make this shard anew"
                )

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard, row = divmod(index, self.metadata.shard_size)
        try:
            (record,) = self._reader(shard).read([row])
        except (RuntimeError, IndexError) as error:
            raise self._damaged(shard, row, str(error).partition(";")[0]) from error
        if len(record) != self._dtype.itemsize:
            detail = f"{len(record)} bytes, expected {self._dtype.itemsize}"
            raise self._damaged(shard, row, detail)
        pair = np.frombuffer(record, self._dtype)[0]
        if not 0 <= pair["label"] < max(self.num_classes, 1):
            expected = f"0..{max(self.num_classes, 1) - 1}"
            raise self._damaged(shard, row, f"label {pair['label']}, expected {expected}")
        return {name: pair[name] for name in ("z_ref", "y_ref", "label")}

    def _damaged(self, shard: int, row: int, detail: str) -> UserError:
        path = self._folder / self.metadata.shard_name(shard)
        return UserError(
            f"{path}: record {row} is damaged ({detail}): delete the shard and run pairs again"
        )

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                reader = _open_reader(self._folder / self.metadata.shard_name(shard))
            self._readers[shard] = reader
            # Not closed here: another thread may be reading from it, and the last one closes it.
            if len(self._readers) > MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()


def _open_reader(path: Path) -> ArrayRecordReader:
    # No read-ahead and no thread of its own: records are read one by one in random order.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return ArrayRecordReader(str(path), options, file_reader_buffer_size=32768)


def _count_records(path: Path) -> int:
    # A file without a whole index at its end, such as a truncated one, counts as 0. Closing such
    # a reader raises, so it is left to be closed when it is dropped.
    return _open_reader(path).num_records()


def _is_whole(path: Path, size: int) -> bool:
    if not path.exists():
        return False
    found = _count_records(path)
    if found != size:
        log.warning("%s is torn: %d of %d pairs readable; making it again", path, found, size)
    return found == size


def _claim_folder(folder: Path, metadata: PairsMetadata, process_index: int) -> None:
    path = folder / METADATA_FILE
    # In this order: another process may write both in between, the metadata first.
    has_shards = any(folder.glob("pairs-*.array_record"))
    if path.exists():
        ours, theirs = dataclasses.asdict(metadata), dataclasses.asdict(read_metadata(folder))
        differing = [
            f"{name} {theirs[name]!r} there, {value!r} now"
            for name, value in ours.items()
            if value != theirs[name]
        ]
        if differing:
            raise UserError(
                f"{folder}: already holds other pairs ({'; '.join(differing)}); "
                "expected the same settings or another folder"
            )
        return
    if has_shards:
        raise UserError(f"{folder}: holds shards but no {METADATA_FILE}, expected another folder")
    # All processes write the same bytes, so it does not matter whose file stays.
    temporary = folder / f"{METADATA_FILE}.{process_index}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(metadata), indent=2) + "\n")
        _rename_synced(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        _remove(temporary)


def _pack(
    arrays: Mapping[str, np.ndarray], metadata: PairsMetadata, start: int, stop: int
) -> np.ndarray:
    records = np.empty(stop - start, metadata.record_dtype)
    where = f"pairs {start} to {stop - 1}"
    for name in ("z_ref", "y_ref"):
        value, expected = np.asarray(arrays[name]), records[name].shape
        if value.dtype != np.float32 or value.shape != expected:
            raise UserError(
                f"{where}: {name} is {value.dtype} {value.shape}, expected float32 {expected}"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{where}: {name} holds NaN or infinity, expected finite values")
        records[name] = value
    labels, limit = np.asarray(arrays["label"]), max(metadata.num_classes, 1)
    if labels.dtype.kind not in "iu" or labels.shape != records.shape:
        raise UserError(
            f"{where}: label is {labels.dtype} {labels.shape}, expected integers {records.shape}"
        )
    if labels.min() < 0 or labels.max() >= limit:
        raise UserError(
            f"{where}: labels from {labels.min()} to {labels.max()}, expected 0..{limit - 1}"
        )
    records["label"] = labels
    return records


def _write_shard(path: Path, records: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        # Groups of one record are what random access wants; noise does not compress.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record.tobytes())
        finally:
            writer.close()  # most write failures surface only here
        if _count_records(temporary) != len(records):
            raise OSError(f"fewer than its {len(records)} pairs can be read back")
        _rename_synced(temporary, path)
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from error
    finally:
        _remove(temporary)


def _rename_synced(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _remove(temporary: Path) -> None:
    # What cannot be removed is written over by the next run, and hides no earlier error here.
    with contextlib.suppress(OSError):
        temporary.unlink()


def _not_written(path: Path, error: Exception) -> UserError:
    detail = str(error).partition(";")[0]
    return UserError(
        f"{path}: cannot be written ({detail}); finished shards are kept: run pairs again "
        "when that is put right"
    )
