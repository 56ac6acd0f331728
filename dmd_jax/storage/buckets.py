"""Paths of Google Cloud Storage, gs://BUCKET/NAME, for the code that takes paths on a disk.

Needs the extra [gcs]. Objects are whole or not there, and are listed as soon as they are written:
nothing is cached here, for Orbax and other processes write beside us.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
import fsspec.config

from dmd_jax.errors import UserError, first_line

# Before etils and gcsfs are imported. etils would take TensorFlow where that is installed; gcsfs
# would ask another service, over gRPC, what kind of bucket each is, which only zonal ones need, and
# would not see what others write.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

from etils.epath.gpath import PosixGPath  # noqa: E402


class Stored(NamedTuple):
    """An object as a listing of its folder tells."""

    size: int  # bytes
    generation: str  # of its content; another one after each write


class BucketPath(PosixGPath):
    """A gs:// path with the methods of pathlib.Path that this project and Orbax use.

    What goes wrong is an OSError, as on a disk; `exists`, `is_dir` and `is_file`, which code asks
    without expecting any, raise a UserError where there is no answer, as without credentials.
    """

    def exists(self) -> bool:
        return self._kind() is not None

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def files(self) -> dict[str, Stored]:
        """The objects directly in this folder by their names; none where there is no folder."""
        try:
            with self._as_oserror():
                entries = _files().ls(str(self), detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rpartition("/")[2]: Stored(entry["size"], entry["generation"])
            for entry in entries
            if entry["type"] == "file"
        }

    def read_bytes(self) -> bytes:
        with self._as_oserror("no such object"):
            return _files().cat_file(str(self))

    def read_range(self, start: int, stop: int, generation: str) -> bytes:
        """The bytes start to stop - 1 of the object, which has to be of that generation yet."""
        with self._as_oserror("no such object"):
            try:
                _, content = _files().call(
                    "GET",
                    _files().url(str(self)),
                    headers={"Range": f"bytes={start}-{stop - 1}"},
                    ifGenerationMatch=generation,
                )
            except FileExistsError as error:  # gcsfs's for any condition that does not hold
                raise OSError("it was written again or removed since it was opened") from error
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came, expected {stop - start}")
        return content

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> int:
        with self._as_oserror("no such bucket"):
            _files().pipe_file(str(self), bytes(data))
        return len(data)

    def create(self, data: bytes) -> bool:
        """Writes an object that is not there yet; False where it is, which is left as it is."""
        try:
            with self._as_oserror("no such bucket"):
                _files().pipe_file(str(self), bytes(data), mode="create")
        except FileExistsError:
            return False
        return True

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode("utf-8"))

    def upload(self, local: Path) -> None:
        """Makes this object of a local file."""
        with self._as_oserror("no such bucket"):
            _files().put_file(str(local), str(self))

    def upload_folder(self, local: Path) -> None:
        """Makes objects below this path of all files of a local folder and of those in it."""
        for path in sorted(local.rglob("*")):
            if path.is_file():
                (self / path.relative_to(local)).upload(path)

    def download(self, local: Path) -> None:
        """Makes a local file of this object."""
        with self._as_oserror("no such object"):
            _files().get_file(str(self), str(local))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        # A bucket has no folders to make, and is itself not made in passing. It is asked for since
        # Orbax does, but not before it deletes a checkpoint, hours into a run, and fails then
        # where the account may use objects alone and lacks storage.buckets.get.
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "exists already", str(self))
        with self._as_oserror("no such bucket"):
            _files().call("GET", f"b/{self.parts[2]}")

    def iterdir(self) -> Iterator[BucketPath]:
        with self._as_oserror("no such folder"):
            yield from list(super().iterdir())

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        with self._as_oserror("no such folder"):
            yield from list(super().glob(pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        with self._as_oserror("no such object"):
            super().unlink(missing_ok=missing_ok)

    def rename(self, target: os.PathLike) -> BucketPath:
        with self._as_oserror("no such object"):
            return super().rename(target)

    def _kind(self) -> str | None:
        """ "file", "directory", or None for nothing."""
        try:
            with self._as_oserror():
                return _files().info(str(self))["type"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{self} cannot be reached: {error}; expected a bucket that this account may "
                "use, see `gcloud auth application-default login`"
            ) from error

    @contextmanager
    def _as_oserror(self, missing: str = "nothing there") -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, missing, str(self)) from error
        except OSError:
            raise
        except Exception as error:  # gcsfs, google.auth and aiohttp each have kinds of their own
            raise OSError(first_line(error)) from error


def check_installed() -> None:
    """Raises an ImportError where gcsfs is not installed."""
    fsspec.get_filesystem_class("gcs")


def _files() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("gcs", finalize_on_close=True)
