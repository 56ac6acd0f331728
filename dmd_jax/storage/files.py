"""Files that appear whole or not at all, on a disk or in a bucket."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmd_jax.errors import UserError

_BUCKET = "gs://"
_BUCKET_PATH = re.compile(r"gs://[a-z0-9][a-z0-9._-]*(/[^*?\[\]#]*)?", re.ASCII)


class PathError(UserError, argparse.ArgumentTypeError):
    """A path that cannot be meant; argparse puts the argument's name before it."""


def path_of(path: str | os.PathLike) -> Path:
    """The path as an object: pathlib's, or a BucketPath with the same methods for gs://BUCKET/NAME.

    Raises:
      UserError: another kind of URL, no name of a bucket, a name with *, ?, [, ], # or .., or gs://
        without the extra [gcs].
    """
    text = os.fspath(path)
    if not text.startswith(_BUCKET):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise PathError(
                f"{text}: unknown kind of path; expected one on this host, or {_BUCKET}…"
            )
        return _on_this_host(path)
    if not _BUCKET_PATH.fullmatch(text) or ".." in text.split("/"):
        raise PathError(f"{text}: expected {_BUCKET}BUCKET/NAME, without *, ?, [, ], # and ..")
    try:
        from dmd_jax.storage.buckets import BucketPath, check_installed

        check_installed()
    except ImportError as error:
        raise PathError(
            f'{text} needs the package gcsfs; expected pip install "dmd_jax[gcs]"'
        ) from error
    return BucketPath(text)


def local_path(path: str | os.PathLike) -> Path:
    """The path of something that has to be on this host.

    Raises:
      UserError: a URL, gs:// among them.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise PathError(f"{text}: expected a path on this host")
    return _on_this_host(path)


def _on_this_host(path: str | os.PathLike) -> Path:
    """The path with a leading ~ or ~USER as that home, which shells leave as it is after an =."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PathError(f"{path}: expected a user with a home folder after ~") from error


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether that is a path of a bucket, gs://…"""
    return os.fspath(path).startswith(_BUCKET)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, which takes the name `path` once the block has ended well.

    Its folder is made. Nobody, and no interrupted run, ever sees half a file under `path`; after an
    exception what was there before is still there, and the temporary is gone. The temporary is on
    this host, and is copied at the end if `path` is in a bucket.
    """
    path = path_of(path)
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            path.upload(temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes bytes through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes indented JSON through `replacing`."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
