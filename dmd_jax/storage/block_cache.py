"""A bounded cache on this host of ranges of objects in buckets.

Each process has a folder of its own in `blocks` of the cache folder, so that processes of one host
do not touch each other's files. The folder is removed when its process ends; the folder of a
process that was killed is removed when the next process makes its own.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import math
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import IO, NamedTuple

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.bucket_copies import cache_folder, locked_folder

DEFAULT_GIGABYTES = 20.0
_GIGABYTE = 1e9
_PAGE = 4096  # bytes; what a file takes on a disk is a multiple of it


class _Block(NamedTuple):
    path: Path
    size: int  # bytes on the disk


class BlockCache:
    """Blocks of bytes by their keys, each in a file; the least recently used is removed first.

    May be used from several threads. A block that several ask for at once is fetched once.

    Args:
      limit: bytes on the disk, for the blocks and for the folders that `admits` lets in.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._used = 0  # by the blocks, those that are being written among them
        self._copied: dict[str, int] = {}  # bytes of whole folders
        self._blocks: OrderedDict[Hashable, _Block] = OrderedDict()
        self._fetching: set[Hashable] = set()
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._folder: Path | None = None

    def admits(self, folder: str, size: int) -> bool:
        """Whether a folder may be copied whole; what it takes is then no longer there for blocks.

        It may where it takes at most half of what other whole folders leave.
        """
        with self._changed:
            others = sum(taken for name, taken in self._copied.items() if name != folder)
            if 2 * size > self._limit - others:
                return False
            self._copied[folder] = size
            self._make_room(0)
            return True

    def get(self, key: Hashable, fetch: Callable[[], bytes]) -> bytes:
        """The block of that key, fetched where the cache does not hold it.

        Raises:
          UserError: the disk is full or cannot be written to. What `fetch` raises comes through.
        """
        with self._changed:
            self._changed.wait_for(lambda: key not in self._fetching)
            held = self._open(key)
            if held is None:
                self._fetching.add(key)
        if held is not None:
            with held:
                return held.read()
        try:
            content = fetch()
            self._keep(key, content)
            return content
        finally:
            with self._changed:
                self._fetching.remove(key)
                self._changed.notify_all()

    def scratch_file(self) -> IO[bytes]:
        """A temporary file with a name in the cache's folder, to be removed by the caller."""
        with self._changed:
            folder = self._own_folder()
        return tempfile.NamedTemporaryFile(dir=folder, delete=False)

    def _open(self, key: Hashable) -> IO[bytes] | None:
        block = self._blocks.get(key)
        if block is None:
            return None
        try:
            file = block.path.open("rb")
        except FileNotFoundError:  # somebody has emptied the cache folder
            self._remove(key)
            return None
        self._blocks.move_to_end(key)
        return file

    def _keep(self, key: Hashable, content: bytes) -> None:
        size = -(-len(content) // _PAGE) * _PAGE
        with self._changed:
            if not self._make_room(size):
                return
            self._used += size
            path = self._own_folder() / str(next(self._numbers))
        try:
            path.write_bytes(content)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            with self._changed:
                self._used -= size
            raise UserError(
                f"{path.parent} cannot be written ({first_line(error)}); expected room for "
                f"{self._option}, or DMD_JAX_CACHE=FOLDER with room"
            ) from error
        with self._changed:
            self._blocks[key] = _Block(path, size)

    def _make_room(self, size: int) -> bool:
        """Removes what is least recently used; whether a block of `size` fits then."""
        room = self._limit - sum(self._copied.values())
        if size > room:
            return False
        while self._blocks and self._used + size > room:
            self._remove(next(iter(self._blocks)))
        return self._used + size <= room

    def _remove(self, key: Hashable) -> None:
        block = self._blocks.pop(key)
        block.path.unlink(missing_ok=True)
        self._used -= block.size

    def _own_folder(self) -> Path:
        if self._folder is None:
            try:
                folder, lock = _claim_folder()
            except OSError as error:
                raise UserError(f"{cache_folder()} cannot be used: {first_line(error)}") from error
            free = shutil.disk_usage(folder).free
            if free < self._limit:
                _give_up(folder, lock)
                raise UserError(
                    f"{cache_folder()} has {free / _GIGABYTE:,.1f} GB free; expected room for "
                    f"{self._option}, or DMD_JAX_CACHE=FOLDER with room"
                )
            weakref.finalize(self, _give_up, folder, lock)
            self._folder = folder
        return self._folder

    @property
    def _option(self) -> str:
        return f"--cache-gb {self._limit / _GIGABYTE:g}"


_shared = BlockCache(int(DEFAULT_GIGABYTES * _GIGABYTE))


def shared_cache() -> BlockCache:
    """The cache of this process."""
    return _shared


def limit_cache(gigabytes: float) -> None:
    """Gives this process a new cache of at most so many gigabytes (10^9 bytes)."""
    global _shared
    _shared = BlockCache(int(gigabytes * _GIGABYTE))


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --cache-gb, for `limit_cache`."""
    parser.add_argument(
        "--cache-gb",
        metavar="GB",
        type=_gigabytes,
        default=DEFAULT_GIGABYTES,
        help="disk that each process may use for pairs and prompts that are in a bucket "
        f"(default: {DEFAULT_GIGABYTES:g})",
    )


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size; expected gigabytes, more than 0")
    return value


def _claim_folder() -> tuple[Path, IO[str]]:
    """A new folder, and its locked file; removes the folders whose processes are gone."""
    blocks = cache_folder() / "blocks"
    with locked_folder(blocks):
        for other in blocks.iterdir():
            if other.is_dir() and not _is_in_use(other):
                shutil.rmtree(other, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=blocks))
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _is_in_use(folder: Path) -> bool:
    try:
        with (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or another user's
        return True
    return False


def _give_up(folder: Path, lock: IO[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
