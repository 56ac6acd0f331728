"""ArrayRecord shards beside a metadata.json, which pairs and prompts have in common.

A folder holds metadata.json and the shards KIND-00000-of-00040.array_record, …; shard s holds the
records s * shard_size and following, and after them its label: a record that says which shard of
which metadata.json it is, so that a shard with another's name is noticed when the folder is opened.
Shards of earlier versions have no label; they are read without that check and with a warning.
ArrayRecord keeps and checks a 64-bit hash of every record, so a record that was damaged on disk is
noticed when it is read. ArrayRecord reads and writes files on a disk alone: the shards of a bucket
are written on this host and then copied there, and are copied to this host, all of them, before
they are read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dmd_jax.data.shards_metadata import (
    METADATA_FILE,
    ShardedMetadata,
    metadata_sha256,
    read_metadata,
)
from dmd_jax.errors import UserError, differing
from dmd_jax.files import in_bucket, path_of, replacing
from dmd_jax.local_copies import local_folder
from dmd_jax.seals import sealed
from dmd_jax.stand_ins import check_real_file, is_there

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files
_LABEL = b"\0dmd_jax shard\n"  # a label's beginning, which no pair of floats and no prompt has


def write_shards(
    folder: str | os.PathLike,
    metadata: ShardedMetadata,
    records: Callable[[int, int], Iterable[bytes]],
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the shards of this process that are not finished yet: process_index::process_count.

    A shard is written under a temporary name and renamed when it is whole and on the disk, so a
    run that was stopped anywhere is continued by the same call. A shard under its own name that
    does not hold its number of records is torn: it is reported through logging and made again. One
    that says of itself that it is another is refused.

    Args:
      folder: made if need be; all processes share it.
      metadata: must equal that of the folder, if it has one.
      records: (start, stop) -> the records with these numbers; asked in ascending order.
      progress: called with this process's records that are done and its records in all; first with
        what was found finished, then after each shard.

    Raises UserError if the folder holds others (naming the keys that differ; nothing is
    overwritten) or a shard under another's name, and if it cannot be written to (finished shards
    are kept).
    """
    folder = path_of(folder)
    _claim_folder(folder, metadata, process_index)
    shards = _shards(metadata, metadata_sha256(folder))[process_index::process_count]
    if in_bucket(folder):
        present = folder.files()  # each was counted before it was copied there
        missing = [shard for shard in shards if shard.name not in present]
    else:
        missing = [shard for shard in shards if not _is_whole(folder / shard.name, shard)]
    total = sum(shard.size for shard in shards)
    done = total - sum(shard.size for shard in missing)
    if progress:
        progress(done, total)
    for shard in missing:
        _write_shard(folder / shard.name, records(shard.start, shard.stop), shard)
        done += shard.size
        if progress:
            progress(done, total)


class ShardReader:
    """The records of a finished folder. May be pickled, and read from several threads.

    Shards are opened when they are first read; those of a bucket are copied to this host at once.

    Raises UserError if shards are missing, truncated or under another's name, or cannot be copied,
    and, when a record is read, if it is damaged.
    """

    def __init__(self, folder: str | os.PathLike, metadata: ShardedMetadata, metadata_sha256: str):
        self._folder, self._metadata = path_of(folder), metadata
        self._local = self._folder  # where they are read
        self._check_shards(_shards(metadata, metadata_sha256))
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()

    def _check_shards(self, shards: Sequence[_Shard]) -> None:
        kind = self._metadata.KIND
        present = {path.name for path in self._folder.iterdir()}
        names = [shard.name for shard in shards]
        missing = [name for name in names if name not in present]
        if missing:
            named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"{self._folder}: {len(missing)} of {len(shards)} shards are missing ({named}): "
                f"not finished, run {kind} again"
            )
        self._local = local_folder(self._folder, names)
        unlabelled = 0
        for shard in shards:
            path = self._folder / shard.name
            check_real_file(self._local / shard.name, f"a shard of {kind}", may_be_empty=True)
            found, labelled = _count_records(self._local / shard.name, shard, named=path)
            unlabelled += not labelled
            if found != shard.size:
                raise UserError(
                    f"{path}: truncated or damaged, {found} {kind} are readable, "
                    f"expected {shard.size}: run {kind} again to make this shard anew"
                )
        if unlabelled:
            log.warning(
                "%s: %d of %d shards do not say which they are, as %s of earlier versions do not; "
                "a shard under another's name would not be noticed",
                *(self._folder, unlabelled, len(shards), kind),
            )

    def __len__(self) -> int:
        return self._metadata.count

    def __getitem__(self, index: int) -> bytes:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"number {index} of {len(self)} {self._metadata.KIND}")
        shard, row = divmod(index, self._metadata.shard_size)
        try:
            (record,) = self._reader(shard).read([row])
        except (RuntimeError, IndexError) as error:
            raise self.damaged(index, str(error).partition(";")[0]) from error
        return record

    def damaged(self, index: int, detail: str) -> UserError:
        """The error that names the record of that number and what is wrong with it."""
        shard, row = divmod(index, self._metadata.shard_size)
        path = self._folder / self._metadata.shard_name(shard)
        return UserError(
            f"{path}: record {row} is damaged ({detail}): delete the shard and run "
            f"{self._metadata.KIND} again"
        )

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                reader = _open_reader(self._local / self._metadata.shard_name(shard))
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


class _Shard(NamedTuple):
    """Which records a shard holds, of which folder; and that is what its label says."""

    kind: str
    name: str
    start: int
    stop: int
    metadata_sha256: str

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> bytes:
        return _LABEL + json.dumps(self._asdict()).encode()


def _shards(metadata: ShardedMetadata, metadata_sha256: str) -> list[_Shard]:
    """All shards of a folder with this metadata.json."""
    kind, digest = metadata.KIND, metadata_sha256
    return [
        _Shard(kind, metadata.shard_name(number), *metadata.shard_range(number), digest)
        for number in range(metadata.num_shards)
    ]


def _count_records(path: Path, shard: _Shard, *, named: Path | None = None) -> tuple[int, bool]:
    """How many records of a shard can be read, its label left out, and whether it has one.

    A file without a whole index or last record, such as a truncated one, counts as 0.

    Args:
      named: the path for a message, where the file is a copy.

    Raises:
      UserError: it has another shard's label.
    """
    # Closing the reader of a torn file raises, so it is left to be closed when it is dropped.
    reader = _open_reader(path)
    found = reader.num_records()
    try:
        (last,) = reader.read([found - 1]) if found else (b"",)
    except (RuntimeError, IndexError):
        return 0, False
    if not last.startswith(_LABEL):
        return found, False
    if last != shard.label:
        raise _mistaken(named or path, last, shard)
    return found - 1, True


def _mistaken(path: Path, label: bytes, expected: _Shard) -> UserError:
    """The error for a shard that has another's label."""
    try:
        found = _Shard(**json.loads(label.removeprefix(_LABEL)))
    except (ValueError, TypeError):
        return UserError(f"{path}: its label {label!r:.200} is none, expected {expected.label!r}")
    if found.metadata_sha256 != expected.metadata_sha256:
        return UserError(
            f"{path}: is {found.name!r:.100} of a folder with another {METADATA_FILE}, expected a "
            f"shard of this folder, and its {METADATA_FILE} as it was written"
        )
    return UserError(
        f"{path}: is {found.name!r:.100}, expected {expected.kind} {expected.start} to "
        f"{expected.stop - 1}: give it back its name, or delete it and run {expected.kind} again"
    )


def _is_whole(path: Path, shard: _Shard) -> bool:
    if not path.is_file():
        return False
    found, _ = _count_records(path, shard)
    if found != shard.size:
        log.warning(
            "%s is torn: %d of %d %s readable; making it again",
            *(path, found, shard.size, shard.kind),
        )
    return found == shard.size


def _claim_folder(folder: Path, metadata: ShardedMetadata, process_index: int) -> None:
    path, kind = folder / METADATA_FILE, metadata.KIND
    # In this order: another process may write both in between, the metadata first.
    has_shards = any(folder.glob(f"{kind}-*.array_record"))
    if is_there(path):
        theirs = dataclasses.asdict(read_metadata(folder, type(metadata)))
        ours = dataclasses.asdict(metadata)
        if different := differing(theirs, ours, "{} {!r} there, {!r} now"):
            raise UserError(
                f"{folder}: already holds other {kind} ({different}); "
                "expected the same settings or another folder"
            )
        return
    if has_shards:
        raise UserError(f"{folder}: holds shards but no {METADATA_FILE}, expected another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All processes write the same bytes, so it does not matter whose file stays.
        with _appearing(path, f".{process_index}.tmp") as temporary:
            content = sealed(dataclasses.asdict(metadata))
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise _not_written(path, error, kind) from error


def _write_shard(path: Path, records: Iterable[bytes], shard: _Shard) -> None:
    try:
        with _appearing(path, ".tmp") as temporary:
            # Groups of one record are what random access wants; noise does not compress.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                for record in itertools.chain(records, [shard.label]):
                    writer.write(record)
            finally:
                writer.close()  # most write failures surface only here
            if _count_records(temporary, shard) != (shard.size, True):
                raise OSError(f"fewer than its {shard.size} {shard.kind} can be read back")
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error, shard.kind) from error


@contextlib.contextmanager
def _appearing(path: Path, suffix: str) -> Iterator[Path]:
    """As files.replacing, but what takes the name `path` is on the disk first.

    Args:
      suffix: of the temporary name beside it, to which a run that was killed leaves its file.
    """
    if in_bucket(path):
        with replacing(path) as temporary:
            yield temporary
        return
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        _rename_synced(temporary, path)
    finally:
        # What cannot be removed is written over by the next run, and hides no earlier error here.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _rename_synced(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _not_written(path: Path, error: Exception, kind: str) -> UserError:
    detail = str(error).partition(";")[0]
    return UserError(
        f"{path}: cannot be written ({detail}); finished shards are kept: run {kind} again "
        "when that is put right"
    )
