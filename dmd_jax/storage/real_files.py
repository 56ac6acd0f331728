"""Files that stand where a file was meant: Git LFS pointers, HTML pages, links to nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import in_bucket, path_of

_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")
_BEGINNING = 1024


def check_real_file(path: str | os.PathLike, expected: str, *, may_be_empty: bool = False) -> None:
    """Raises a UserError unless there is a file with content of its own.

    Looks at the file before a parser does, whose complaint would blame the content: at its kind,
    without opening what would block, and at its first bytes.

    Args:
      path: on this host or in a bucket.
      expected: what the reader takes, for the message.
      may_be_empty: an empty file is one, such as a list of nothing.

    Raises:
      UserError: no such file, a link that leads nowhere, a folder, pipe, socket or device, an empty
        file, a Git LFS pointer, or an HTML page.
    """
    path = path_of(path)
    try:
        problem = None if in_bucket(path) else _unreadable(path)
        if problem is None:
            beginning = _beginning(path)
            problem = stand_in(beginning) if beginning or not may_be_empty else None
    except FileNotFoundError:
        problem = "no such file"
    except OSError as error:
        problem = f"cannot be read ({first_line(error)})"
    if problem:
        raise UserError(f"{path}: {problem}; expected {expected}")


def answered(test: Callable[[], bool]) -> bool:
    """What `path.exists`, `path.is_dir` or `path.is_file` answers.

    Raises:
      UserError: nothing, for the name is too long, or a folder on the way may not be read.
    """
    try:
        return test()
    except OSError as error:
        raise UserError(f"{first_line(error)}; expected a path that can be read") from error


def is_there(path: Path) -> bool:
    """Whether something has this name, a link that leads nowhere included."""
    return path.exists() or path.is_symlink()


def stand_in(beginning: bytes) -> str | None:
    """What these first bytes of a file show it to be in place of data, or None.

    Args:
      beginning: 1,024 bytes, or all of a shorter file.
    """
    if not beginning:
        return "is empty"
    if beginning.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself (git lfs pull brings it)"
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return "is an HTML page, not the file itself (a download that asked for a login?)"
    return None


def _unreadable(path: Path) -> str | None:
    """What keeps a path of this host from being read as a file, or None."""
    if link := _dangling_link(path):
        return f"is {link}"
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "is a folder"
    return None if stat.S_ISREG(mode) else "is no regular file but a pipe, socket or device"


def _dangling_link(path: Path) -> str | None:
    """Where a link leads that leads nowhere, as the end of a sentence; None for anything else."""
    if not path.is_symlink() or path.exists():
        return None
    return (
        f"a link to {os.readlink(path)!a}, which is not there (a copy of a cache of the hub needs "
        "its blobs as well)"
    )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_BEGINNING)
