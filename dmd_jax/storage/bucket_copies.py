"""Copies on this host of files in buckets, for readers that need a file on a disk.

They lie in gs/BUCKET/… of the cache folder, which DMD_JAX_CACHE names, else ~/.cache/dmd_jax. What
was copied once is copied again only after it was written again in the bucket; the folder may be
deleted when no run reads from it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dmd_jax.errors import UserError, first_line
from dmd_jax.progress import Pace, Progress
from dmd_jax.storage.files import in_bucket, path_of

_COPIED_AT_ONCE = 4
_MEGABYTE = 1e6


def local_copy(path: str | os.PathLike) -> Path:
    """The file itself, or its copy on this host if it is in a bucket.

    Raises:
      UserError: as `local_folder`.
    """
    path = path_of(path)
    return local_folder(path.parent, [path.name]) / path.name


def local_folder(folder: str | os.PathLike, names: Sequence[str]) -> Path:
    """The folder itself, or a folder on this host with copies of its files of these names.

    Processes of one host wait for each other, so that each file is copied once.

    Raises:
      UserError: the folder is in a bucket and has no file of a name, cannot be read, or does not
        fit on the disk.
    """
    folder = path_of(folder)
    if not in_bucket(folder):
        return folder
    copies = cache_folder() / os.fspath(folder).replace("://", "/", 1)
    try:
        stored = folder.files()
        for name in names:
            if name not in stored:
                raise UserError(f"{folder / name}: no such file; expected one")
        with locked_folder(copies):
            _remove_all_but(stored, copies)
            marks = {name: f"{stored[name].generation} {stored[name].size}" for name in names}
            missing = [name for name in names if not _is_current(copies / name, marks[name])]
            _copy(folder, copies, {name: stored[name].size for name in missing}, marks)
    except OSError as error:
        raise UserError(f"{folder} cannot be copied to {copies}: {first_line(error)}") from error
    return copies


def _copy(folder, copies: Path, sizes: dict[str, int], marks: dict[str, str]) -> None:
    total, free = sum(sizes.values()), shutil.disk_usage(copies).free
    if total > free:
        raise UserError(
            f"{folder} has {total / _MEGABYTE:,.0f} MB to copy to {copies}, where "
            f"{free / _MEGABYTE:,.0f} MB are free; expected DMD_JAX_CACHE=FOLDER with room for it"
        )

    def copy(name: str) -> int:
        temporary, mark = copies / f".{name}.tmp", _mark_of(copies / name)
        mark.unlink(missing_ok=True)
        (folder / name).download(temporary)
        if temporary.stat().st_size != sizes[name]:
            raise OSError(f"{name} came with {temporary.stat().st_size} of {sizes[name]} bytes")
        os.replace(temporary, copies / name)
        mark.write_text(marks[name])
        return sizes[name]

    progress = Progress(
        f"copy {folder}", round(total / _MEGABYTE), unit="MB", enabled=total > _MEGABYTE
    )
    done, pace = 0, Pace()
    with ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
        try:
            for size in pool.map(copy, sizes):
                done += size
                if done == total or pace.due():
                    progress.update(round(done / _MEGABYTE))
        finally:
            pool.shutdown(cancel_futures=True)


def _remove_all_but(names: Container[str], copies: Path) -> None:
    for mark in copies.glob(".*.of"):
        name = mark.name.removeprefix(".").removesuffix(".of")
        if name not in names:
            mark.unlink()
            (copies / name).unlink(missing_ok=True)


def _is_current(copy: Path, mark: str) -> bool:
    try:
        return _mark_of(copy).read_text() == mark and copy.stat().st_size == int(mark.split()[1])
    except FileNotFoundError:
        return False


def _mark_of(copy: Path) -> Path:
    """The file beside a copy that tells which content it is of."""
    return copy.with_name(f".{copy.name}.of")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes of this host waiting that want it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where what is kept of buckets lies on this host."""
    return Path(os.environ.get("DMD_JAX_CACHE") or "~/.cache/dmd_jax").expanduser().absolute()
