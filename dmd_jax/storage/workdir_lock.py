"""One run at a time in a folder: who holds it, and how the end of its holder is known.

On a disk the holder's process has an flock on FOLDER/.lock, which ends with the process however
that ends. A bucket has no such locks: there the holder writes the object FOLDER/.lock anew several
times a minute, and whoever finds one that stays as it is takes it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd_jax.errors import UserError
from dmd_jax.parallel.processes import settle
from dmd_jax.storage.files import in_bucket

log = logging.getLogger(__name__)

_LOCK = ".lock"
_REFRESH_SECONDS = 15.0  # between two writes of a bucket's lock
_DEAD_SECONDS = 60.0  # without one, after which its holder counts as dead


@contextmanager
def locked(folder: Path, *, first: bool = True) -> Iterator[None]:
    """Keeps every other run out of a folder while the block runs.

    The folder is made for that, and is not left behind where nothing was put into it.

    Args:
      first: False on every process but the first of a run, which holds it for all.

    Raises:
      UserError: another process holds it, which is named with its host, or the folder cannot be
        written; the same in all processes.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if first:
            try:
                stack.enter_context((_in_bucket if in_bucket(folder) else _on_disk)(folder))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{folder} cannot be written: {error}"
        if problem := settle(problem, lambda every: every[0]):
            raise UserError(problem)
        yield


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    log.warning("%s cannot be locked (%s): run one at a time", folder, error)
                    yield
                    return
                raise UserError(_refusal(folder, file.read())) from error
            if not _is_still(path, file):
                continue  # its holder has ended, and taken the file away, since it was opened
            file.truncate()
            file.write(_holder())
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                if made:
                    with contextlib.suppress(OSError):  # it is not empty
                        folder.rmdir()
            return


def _is_still(path: Path, file) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _in_bucket(folder: Path) -> Iterator[None]:
    path = folder / _LOCK
    while not path.create(_holder()):
        _wait_for_its_end(folder)
        path.unlink(missing_ok=True)
    done = threading.Event()
    thread = threading.Thread(target=_refresh, args=(path, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _refresh(path: Path, done: threading.Event) -> None:
    while not done.wait(_REFRESH_SECONDS):
        with contextlib.suppress(OSError):  # the next one may come through
            path.write_bytes(_holder())


def _wait_for_its_end(folder: Path) -> None:
    """Returns once the holder of a bucket's folder counts as dead."""
    found = folder.files().get(_LOCK)
    if found is None:
        return
    holder = (folder / _LOCK).read_bytes()
    if _is_dead_here(holder):
        return
    print(
        f"{folder} is held by {_describe(holder)}: waiting {_DEAD_SECONDS:g} s for a sign of life",
        file=sys.stderr,
    )
    deadline = time.monotonic() + _DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(_REFRESH_SECONDS / 3, _DEAD_SECONDS))
        if folder.files().get(_LOCK) != found:
            raise UserError(_refusal(folder, holder))


def _is_dead_here(holder: bytes) -> bool:
    """Whether it was a process of this host that is there no more."""
    match _read(holder):
        case {"host": host, "process": int(process)} if host == socket.gethostname():
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return True
            except (OSError, OverflowError):
                return False
    return False


def _holder() -> bytes:
    return json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode()


def _read(holder: bytes) -> object:
    try:
        return json.loads(holder)
    except (ValueError, RecursionError):
        return None


def _describe(holder: bytes) -> str:
    match _read(holder):
        case {"host": str(host), "process": int(process)}:
            return f"process {process} on {host!r:.100}"
    return "another process"


def _refusal(folder: Path, holder: bytes) -> str:
    return (
        f"{folder} is in use by {_describe(holder)}; expected one run at a time there, or another "
        "folder"
    )
