"""ArrayRecord shards beside a metadata.json, which pairs and prompts have in common.

A folder holds metadata.json and the shards KIND-00000-of-00040.array_record, …; shard s holds the
records s * shard_size and following, and after them its label: a record that says which shard of
which metadata.json it is, so that a shard with another's name is noticed when the folder is opened.
Shards of earlier versions have no label; they are read without that check and with a warning.
ArrayRecord keeps and checks a 64-bit hash of every record, so a record that was damaged on disk is
noticed when it is read. ArrayRecord reads and writes files on a disk alone: the shards of a bucket
are written on this host and then copied there. They are read from copies where block_cache.py has
room for all of them, else record by record through data/shard_stream.py.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dmd_jax.data.shard_labels import Shard, count_records, shards_of
from dmd_jax.data.shard_stream import ShardStream, open_reader
from dmd_jax.data.shards_metadata import (
    METADATA_FILE,
    ShardedMetadata,
    metadata_sha256,
    read_metadata,
)
from dmd_jax.errors import UserError, differing, first_line
from dmd_jax.progress import Pace, Progress
from dmd_jax.storage.block_cache import shared_cache
from dmd_jax.storage.bucket_copies import local_folder
from dmd_jax.storage.files import in_bucket, path_of, replacing
from dmd_jax.storage.real_files import check_real_file, is_there
from dmd_jax.storage.seals import sealed

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files
MAX_OPEN_STREAMS = 128  # each is two files
AT_ONCE = 16  # requests to a bucket, each of which takes tens of milliseconds


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
    shards = shards_of(metadata, metadata_sha256(folder))[process_index::process_count]
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

    Shards are opened when they are first read. Those of a bucket are copied to this host at once
    where the cache has room for them, else only what is asked for is read of them.

    Raises UserError if shards are missing, truncated or under another's name, or cannot be copied,
    and, when a record is read, if it is damaged, or if the shard in the bucket cannot be reached
    or was written again since the folder was opened.
    """

    def __init__(self, folder: str | os.PathLike, metadata: ShardedMetadata, metadata_sha256: str):
        self._folder, self._metadata = path_of(folder), metadata
        self._streamed = None  # the objects by their names, where they are streamed
        self._local = self._folder  # where the others are read
        self._check_shards(shards_of(metadata, metadata_sha256))
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()

    def _check_shards(self, shards: Sequence[Shard]) -> None:
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
        self._fetch(names)
        unlabelled = sum(not labelled for labelled in self._checked(shards))
        if unlabelled:
            log.warning(
                "%s: %d of %d shards do not say which they are, as %s of earlier versions do not; "
                "a shard under another's name would not be noticed",
                *(self._folder, unlabelled, len(shards), kind),
            )

    def _fetch(self, names: Sequence[str]) -> None:
        """Copies the shards of a bucket, or lists them where there is no room for copies."""
        if in_bucket(self._folder):
            stored = self._folder.files()
            shards = {name: stored[name] for name in names if name in stored}
            size = sum(one.size for one in shards.values())
            if not shared_cache().admits(str(self._folder), size):
                self._streamed = shards
                return
        self._local = local_folder(self._folder, names)

    def _checked(self, shards: Sequence[Shard]) -> Iterator[bool]:
        """Whether each shard has a label; raises a UserError at the first that is not whole."""
        if self._streamed is None:
            yield from map(self._is_labelled, shards)
            return
        progress, pace = Progress(f"open {self._folder}", len(shards), unit="shards"), Pace()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for done, labelled in enumerate(pool.map(self._is_labelled, shards), start=1):
                    if pace.due():
                        progress.update(done)
                    yield labelled
            finally:
                pool.shutdown(cancel_futures=True)

    def _is_labelled(self, shard: Shard) -> bool:
        path, kind = self._folder / shard.name, shard.kind
        expected = f"a shard of {kind}"
        if self._streamed is None:
            check_real_file(self._local / shard.name, expected, may_be_empty=True)
        with self._reading(path):
            reader = self._open(shard.name)
            found, labelled = count_records(reader, path, shard)
            if isinstance(reader, ShardStream) and not found:
                reader.check_kind(expected)
        if found != shard.size:
            raise UserError(
                f"{path}: truncated or damaged, {found} {kind} are readable, "
                f"expected {shard.size}: run {kind} again to make this shard anew"
            )
        return labelled

    @property
    def at_once(self) -> int:
        """How many records are worth asking for at the same time."""
        return 1 if self._streamed is None else AT_ONCE

    def __len__(self) -> int:
        return self._metadata.count

    def __getitem__(self, index: int) -> bytes:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"number {index} of {len(self)} {self._metadata.KIND}")
        shard, row = divmod(index, self._metadata.shard_size)
        try:
            with self._reading(self._folder / self._metadata.shard_name(shard)):
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

    def _reader(self, shard: int) -> ArrayRecordReader | ShardStream:
        with self._lock:
            reader = self._readers.get(shard)
        # Not under the lock: a stream may wait for the bucket. Two threads may open the same.
        reader = reader or self._open(self._metadata.shard_name(shard))
        with self._lock:
            self._readers[shard] = reader
            self._readers.move_to_end(shard)
            # Not closed here: another thread may be reading from it, and the last one closes it.
            if len(self._readers) > (MAX_OPEN_STREAMS if self._streamed else MAX_OPEN_SHARDS):
                self._readers.popitem(last=False)
        return reader

    def _open(self, name: str) -> ArrayRecordReader | ShardStream:
        if self._streamed is None:
            return open_reader(self._local / name)
        return ShardStream(self._folder / name, self._streamed[name], shared_cache())

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Names the shard in a bucket that cannot be read."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {first_line(error)}; expected the shard as it was when "
                "the run began"
            ) from error

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()


def _is_whole(path: Path, shard: Shard) -> bool:
    if not path.is_file():
        return False
    found, _ = count_records(open_reader(path), path, shard)
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


def _write_shard(path: Path, records: Iterable[bytes], shard: Shard) -> None:
    try:
        with _appearing(path, ".tmp") as temporary:
            # Groups of one record are what random access wants; noise does not compress.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                for record in itertools.chain(records, [shard.label]):
                    writer.write(record)
            finally:
                writer.close()  # most write failures surface only here
            if count_records(open_reader(temporary), path, shard) != (shard.size, True):
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
